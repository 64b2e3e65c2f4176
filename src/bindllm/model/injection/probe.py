"""A few tokens through a decoder with an injection, before anything is trained: does the injection work in it?"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bindllm.errors import BindLLMError, DecoderError
from bindllm.model.decoder import projecting
from bindllm.model.injection import TOKEN_KINDS, Injection
from bindllm.model.layers import USUAL

_LENGTH, _PADDING = 7, 3
# The first token that listens to media.
_FIRST = 3
# Largest differences of equal logits in full precision, and in half precision or with quantized weights: from the same
# products, as a part of the largest logit; and from others, as a distance. Kernels differ with padding, and int8 rounds
# all tokens of a batch together.
_EQUAL, _CLOSE = (1e-4, 1e-2), (1e-2, 0.3)
# Open gates of kind cross, divided by the number of layers: each layer adds a multiple of the hidden state, which would
# overflow in deep decoders. All layers together make it at most e^4 times as large, with context e^8 times.
_OPEN = 0.2


@torch.no_grad()
def probe(decoder: PreTrainedModel, injection: Injection) -> None:
    """Run a decoder with closed and with open gates, and compare logits; without weights it only runs.

    Args:
        injection: the injection of this decoder; its gates are restored.

    Raises:
        DecoderError: the injection does not work in this family of decoders; the message names the difference.
    """
    inputs = _inputs(decoder, injection)
    if decoder.device.type == "meta":
        # transformers cannot compute a mask here; families without attention do not take a whole one.
        ones = torch.ones(1, 1, _LENGTH, _LENGTH, dtype=torch.bool, device="meta")
        for mask in (ones, None):
            try:
                decoder(**inputs, attention_mask=mask, use_cache=False)
                return
            except (BindLLMError, torch.OutOfMemoryError):
                raise
            except Exception:
                # A forward that depends on values fails without weights; the loaded decoder is tried again.
                continue
        return
    try:
        difference = _difference(decoder, injection, inputs)
    except (BindLLMError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise DecoderError(
            f"{type(decoder).__name__} cannot run with an injection ({type(error).__name__}: {error}); use {USUAL}"
        ) from error
    if difference:
        raise DecoderError(
            f"injection kind {injection.kind!r} does not work in {type(decoder).__name__}: {difference}. Use {USUAL}"
        )


def _inputs(decoder: PreTrainedModel, injection: Injection) -> dict[str, Tensor]:
    """Return one row of tokens, the last of which listen to media."""
    device, text = decoder.device, decoder.config.get_text_config()
    # Of its own: a seed of the recipe gives the same numbers with and without this.
    generator = torch.Generator("cpu").manual_seed(0)
    # Two bind tokens: one would not need its queries and keys.
    sizes = (1, 1, 2) if injection.kind in TOKEN_KINDS else (1, 1)
    ids = torch.arange(_LENGTH).add(10).clamp(max=text.vocab_size - 1)
    inputs = {
        "input_ids": ids.unsqueeze(0),
        "media_index": torch.arange(_LENGTH).unsqueeze(0).sub(_FIRST).clamp(-1, 0),
        "bind": torch.randn(*sizes, text.hidden_size, generator=generator, device="cpu"),
    }
    if injection.context_width is not None:
        inputs["context"] = torch.randn(1, 1, 2, injection.context_width, generator=generator, device="cpu")
    return {name: value.to(device) for name, value in inputs.items()}


def _padded(ids: Tensor) -> dict[str, Tensor]:
    """Return a row with padding on the left, as generation of several prompts has it."""
    ones = torch.ones(1, _PADDING + _LENGTH, dtype=ids.dtype, device=ids.device)
    mask = ones.cumsum(1).gt(_PADDING).to(ids.dtype)
    tokens = torch.cat([ids[:, :1].expand(1, _PADDING), ids], 1)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def _distance(found: Tensor, expected: Tensor) -> float:
    """Return how far logits are from others, as a part of how far those are from their mean."""
    return float((found - expected).norm() / (expected - expected.mean(-1, keepdim=True)).norm())


def _difference(decoder: PreTrainedModel, injection: Injection, inputs: dict[str, Tensor]) -> str:
    """Return how the logits differ from those of a working injection; empty: they do not."""

    def run(**changes: Tensor) -> Tensor:
        logits = decoder(**{"input_ids": inputs["input_ids"], **changes}, use_cache=False).logits.float()
        # Some families give infinities to ids without a word.
        return logits.nan_to_num(nan=torch.nan, posinf=0, neginf=0)

    media = {name: value for name, value in inputs.items() if name != "input_ids"}
    plain = run()
    is_rounded = not {p.dtype for p in decoder.parameters()} <= {torch.float32, torch.float64}
    allowed = _EQUAL[is_rounded] * plain.abs().max()
    # As in training, with all positions supervised, so that one forward shows both.
    rows, columns = torch.ones_like(inputs["input_ids"]).nonzero(as_tuple=True)
    with projecting(rows, columns):
        closed = run(**media).view_as(plain)
    if not (closed - plain).abs().max() <= allowed:
        same = (run(**media) - plain).abs().max() <= allowed
        place = (
            "the logits of training are others than those of answers"
            if same
            else "closed gates change its logits"
        )
        return f"{place}, by up to {(closed - plain).abs().max():.2g}"
    padded = run(**_padded(inputs["input_ids"]))[:, _PADDING:]
    if not _distance(padded, plain) <= _CLOSE[is_rounded]:
        return (
            "padding on the left changes its logits, so an answer would depend on the other rows of its batch"
        )
    gates = [gate for gate in (injection.gates, injection.context_gates) if gate is not None]
    kept = [gate.clone() for gate in gates]
    try:
        for gate in gates:
            gate.fill_(_OPEN / len(gate) if injection.kind == "cross" else 1)
        opened = run(**media)
    finally:
        for gate, values in zip(gates, kept, strict=True):
            gate.copy_(values)
    if (opened == plain)[:, _FIRST:].all(-1).any():
        return "with open gates, media do not change the logits of the tokens that listen to them"
    # A decoder that reads both ways, or that mixes up its tokens.
    if not _distance(opened[:, :_FIRST], plain[:, :_FIRST]) <= _CLOSE[is_rounded]:
        return "with open gates, media change the logits of tokens before them"
    return ""
