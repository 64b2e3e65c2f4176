"""The cost of an image: the injection against inline image tokens, in the same decoder with the same text.

Inline models (LLaVA and its relatives) put 64 to 576 image embeddings into the prompt, where every layer computes and
caches them like words. The injection adds one bind vector per image to the existing tokens. Both sides run the
same weights. The floor is the prompt without images.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.measure import Metric, paired, seconds
from benchmarks.parts import bare_decoder, bound_loss, bound_model
from bindllm.model.bindllm import BindLLM

IMAGES, INLINE = (1, 4, 16), (64, 256, 576)
TEXT_TOKENS, ANSWER_TOKENS, NEW_TOKENS = 64, 16, 16
MOST_TRAINED_TOKENS = 5000
"""Longest inline training row: activations of longer rows do not fit into the memory of a small machine."""
NOISY_TOKENS = 2000
"""Up to this many inline tokens, times are medians of three; a longer run takes minutes, where noise is small."""


def metrics() -> list[Metric]:
    """Time to first token, key/value memory, decoding speed and a training step, for each number of images."""
    bare, model = bare_decoder(), bound_model()
    found = []
    for images in IMAGES:
        batch = _text(bare, images)
        for inline in INLINE:
            found += _generation(bare, model.eval(), batch, inline)
            if images * inline <= MOST_TRAINED_TOKENS:
                found.append(_training(bare, model.train(), batch, inline))
    return found


def _text(decoder: PreTrainedModel, images: int) -> dict[str, Tensor]:
    """One row of text whose tokens are spread over the images, and labels on its last tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, decoder.config.vocab_size, (1, TEXT_TOKENS), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWER_TOKENS:] = ids[:, -ANSWER_TOKENS:]
    embeddings = torch.nn.functional.normalize(torch.randn(1, images, 1280, generator=generator), dim=-1)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "media_index": (torch.arange(TEXT_TOKENS) * images // TEXT_TOKENS)[None],
        "embeddings": embeddings,
        "labels": labels,
    }
    return {name: tensor.to(decoder.device) for name, tensor in batch.items()}


def _inline_embeddings(decoder: PreTrainedModel, ids: Tensor, count: int) -> Tensor:
    """The input of an inline model: ``count`` image embeddings, then the text, [1, count + T, D]."""
    words = decoder.get_input_embeddings()(ids)
    # Random values are enough, because they do not change the time.
    image = torch.randn(1, count, words.shape[-1], device=words.device, dtype=words.dtype)
    return torch.cat([image * words.std(), words], dim=1).detach()


def _generation(bare: PreTrainedModel, model: BindLLM, batch: dict[str, Tensor], inline: int) -> list[Metric]:
    images = batch["embeddings"].shape[1]
    inputs = {
        "text": {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]},
        "inline": {"inputs_embeds": _inline_embeddings(bare, batch["input_ids"], images * inline)},
    }
    inputs["inline"]["attention_mask"] = torch.ones(
        inputs["inline"]["inputs_embeds"].shape[:2], device=bare.device
    )

    outputs = {}

    def generate(side: str, tokens: int) -> None:
        outputs[side] = run(side, tokens)

    def run(side: str, tokens: int) -> object:
        fixed = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        if side != "ours":
            return bare.generate(**inputs[side], **fixed, return_dict_in_generate=True)
        # The route of `BindLLM.generate_from`, which returns ids only: here the cache is measured too.
        with model.injection.holding(model.bind(batch["embeddings"]), batch["media_index"]):
            return model.decoder.generate(**inputs["text"], **fixed, return_dict_in_generate=True)

    repeats = 3 if images * inline <= NOISY_TOKENS else 1
    with torch.inference_mode():
        first, ours, theirs = paired(
            lambda: generate("ours", 1), lambda: generate("inline", 1), repeats=repeats
        )
        text = min(seconds(lambda: generate("text", 1)) for _ in range(3))
        # The keys and values of the prompt: the first token is not in the cache yet.
        memory = {side: _cache_bytes(output) for side, output in outputs.items()}
        whole = {
            side: _median(lambda side=side: generate(side, 1 + NEW_TOKENS), repeats)
            for side in tuple(outputs)
        }
    step = {side: whole[side] - start for side, start in (("ours", ours), ("inline", theirs), ("text", text))}
    size = f"{images}x{inline}"
    return [
        Metric(
            f"media_cost_ttft_{size}", first, "ratio of seconds", text / theirs,
            f"time to first token: {ours * 1e3:.0f} ms over {theirs * 1e3:.0f} ms inline; floor: text only",
        ),
        Metric(
            f"media_cost_kv_{size}", memory["ours"] / memory["inline"], "ratio of bytes",
            memory["text"] / memory["inline"],
            f"key/value cache: {memory['ours'] / 1e6:.1f} MB over {memory['inline'] / 1e6:.1f} MB; floor: text only",
        ),
        Metric(
            f"media_cost_decode_{size}", step["inline"] / step["ours"], "ratio of tokens/s",
            step["inline"] / step["text"],
            f"{NEW_TOKENS / step['ours']:.1f} tokens/s over {NEW_TOKENS / step['inline']:.1f}; floor: text only",
        ),
    ]  # fmt: skip


def _training(bare: PreTrainedModel, model: BindLLM, batch: dict[str, Tensor], inline: int) -> Metric:
    images = batch["embeddings"].shape[1]
    count = images * inline
    repeats = 3 if count <= NOISY_TOKENS else 1
    labels = torch.nn.functional.pad(batch["labels"], (count, 0), value=-100)

    def inline_step() -> None:
        # The projector of an inline model learns from the gradient at its image embeddings.
        inputs = _inline_embeddings(bare, batch["input_ids"], count).requires_grad_(True)
        _loss(bare, inputs, labels).backward()

    def text_step() -> None:
        inputs = bare.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_(True)
        _loss(bare, inputs, batch["labels"]).backward()

    ratio, ours, theirs = paired(lambda: bound_loss(model, batch).backward(), inline_step, repeats=repeats)
    text = _median(text_step, 3)
    return Metric(
        f"media_cost_train_{images}x{inline}", ratio, "ratio of seconds", text / theirs,
        f"forward and backward of one row: {ours * 1e3:.0f} ms over {theirs * 1e3:.0f} ms inline; floor: text only",
    )  # fmt: skip


def _loss(decoder: PreTrainedModel, inputs: Tensor, labels: Tensor) -> Tensor:
    """Loss of the supervised tokens; as in our own step, only they are projected to the vocabulary."""
    hidden = decoder.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    logits = decoder.get_output_embeddings()(hidden[rows, columns])
    return torch.nn.functional.cross_entropy(logits.float(), labels[rows, columns + 1])


def _median(run: Callable[[], object], repeats: int) -> float:
    return statistics.median(seconds(run) for _ in range(repeats))


def _cache_bytes(output: object) -> int:
    layers = output.past_key_values.layers
    return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
