"""Loading a frozen Hugging Face decoder, its tokenizer and chat template; fingerprints of decoders."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER
from transformers.utils import logging as transformers_logging

from bindllm.conversation import INPUT_HEADER, check_tokenizer, end_tokens
from bindllm.encoders import hub
from bindllm.errors import DecoderError, InputError, did_you_mean
from bindllm.model.quantize import QUANTIZATIONS, keep_gradients, quantization_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Settings by which some families change the logits after the vocabulary projection, and their neutral values.
# A family in this table needs logits at all positions: its change follows the projection inside its own forward.
_LOGIT_CHANGES = {
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "lm_head_multiplier": (None, 1, 1.0),
}
# Entries of a config that describe the copy, not the model.
_CONFIG_OF_THE_COPY = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
# Enough to notice a changed tensor, and few enough to fingerprint 7B parameters in milliseconds.
_SAMPLED_BYTES = 256

# The texts of Stanford Alpaca (2023). Nothing follows the last colon: the released ImageBind-LLM glues the answer to
# it. A later turn has no preamble; a system text replaces the preamble.
_ALPACA = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if loop.first -%}{{- LEAD -}}{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{{- '\\n\\n### Response:' + message['content'] + eos_token -}}
{%- else -%}
{%- if not loop.first and messages[loop.index0 - 1]['role'] != 'system' -%}{{- '\\n\\n' -}}{%- endif -%}
{%- if message['role'] == 'system' -%}
{{- message['content'] + '\\n\\n' -}}
{%- else -%}
{%- if loop.first -%}
{{- 'Below is an instruction that describes a task' -}}
{%- if INPUT in message['content'] -%}
{{- ', paired with an input that provides further context' -}}
{%- endif -%}
{{- '. Write a response that appropriately completes the request.\\n\\n' -}}
{%- endif -%}
{{- '### Instruction:\\n' + message['content'] -}}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\\n\\n### Response:' -}}{%- endif -%}"""

TEMPLATES = {"alpaca": _ALPACA}


@dataclass
class DecoderConfig:
    """The language model that answers, and its precision."""

    name: str
    """A Hugging Face folder, or the id of a model in the local Hugging Face cache or on the hub."""

    dtype: str = "auto"
    """`float32`, `bfloat16`, `float16`, or `auto`: the fastest type that this machine computes natively."""

    revision: str | None = None
    """Revision of a model on the hub; leave empty for a folder."""

    system: str | None = None
    """System text of every conversation without one; by default the decoder's chat template decides."""

    template: str | None = None
    """`alpaca`: the text template of the released ImageBind-LLM, for a base LLaMA; null: the tokenizer's own."""

    quantize: Literal["nf4", "int8"] | None = None
    """Frozen projections in 4 bits (`nf4`, as in QLoRA) or 8 bits (`int8`), through bitsandbytes; null: as they are."""

    def __post_init__(self) -> None:
        # How to read this: closed choices are checked here, since configs also come from files and Python.
        if self.dtype not in ("auto", *DTYPES):
            raise InputError(
                f"unknown dtype {self.dtype!r}. {did_you_mean(str(self.dtype), ['auto', *DTYPES])}"
            )
        if self.template is not None and self.template not in TEMPLATES:
            raise InputError(
                f"unknown template {self.template!r}. {did_you_mean(str(self.template), TEMPLATES)}"
            )
        if self.quantize is not None and self.quantize not in QUANTIZATIONS:
            raise InputError(
                f"unknown quantization {self.quantize!r}. {did_you_mean(str(self.quantize), QUANTIZATIONS)}"
            )

    def folder(self) -> Path:
        """Return the local folder of the decoder; an id on the hub is downloaded.

        Raises:
            DecoderError: the folder does not exist, or the model cannot be downloaded.
        """
        return hub.find_folder(self.name, self.revision, role="decoder")


def choose_dtype(device: str | torch.device) -> torch.dtype:
    """Return the fastest safe dtype of a frozen decoder on this device.

    bfloat16 if the hardware multiplies bfloat16 matrices: GPUs that report it, and CPUs with AMX tiles. Other CPUs
    convert on the fly and are slower than in float32; `benchmarks` measures it.
    """
    # Emulated bfloat16 of old GPUs would be slower than float16.
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if torch.device(device).type == "cpu":
        return torch.bfloat16 if torch.cpu.get_capabilities().get("amx_bf16") else torch.float32
    return torch.bfloat16


def default_device() -> str:
    """Return ``cuda`` or another accelerator if torch finds one, else ``cpu``."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def load_tokenizer(config: DecoderConfig) -> PreTrainedTokenizerBase:
    """Load only the tokenizer. Padding is the end token if no padding token is set, or the decoder has no row for it.

    Template and system text of the config go into the chat template, so that training, evaluation and every
    request render alike. The maximum length is the number of positions of the decoder.

    Raises:
        DecoderError: the tokenizer is missing, lacks offsets, a chat template or an end token, or its template cannot
            be used.
    """
    folder = config.folder()
    hub.never_ask()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"{type(tokenizer).__name__} is several tokenizers in one")
    # Any exception about an untrusted file means that its tokenizer cannot be used.
    except Exception as error:
        raise DecoderError(f"no usable tokenizer in {folder} ({hub.loading_error(folder, error)})") from error
    # An export must not pass on the name of code that was not run here.
    tokenizer.init_kwargs.pop("auto_map", None)
    plain = read_config(folder)
    tokenizer.model_max_length = num_positions(plain) or VERY_LARGE_INTEGER
    # Padding is masked, so the end token can serve as padding. An id without a row in the embedding cannot.
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= plain.get_text_config().vocab_size:
        # Some copies name it as an empty text.
        if not tokenizer.eos_token:
            raise DecoderError(
                f"the tokenizer in {folder} names neither a padding nor an end token; name the token that ends an "
                "answer as eos_token in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = _choose_template(tokenizer.chat_template, folder)
    if config.template is not None:
        apply_template(config.template, tokenizer)
    check_tokenizer(tokenizer)
    if config.system is not None:
        # The system text becomes part of the template, so no caller can forget it.
        message = f"{{'role': 'system', 'content': {json.dumps(config.system, ensure_ascii=False)}}}"
        tokenizer.chat_template = (
            "{%- if messages[0]['role'] != 'system' -%}"
            f"{{%- set messages = [{message}] + messages -%}}"
            "{%- endif -%}" + tokenizer.chat_template
        )
    # Refuses a template that does not end an answer, or takes it apart.
    end_tokens(tokenizer)
    return tokenizer


def _choose_template(templates: dict[str, str], folder: Path) -> str:
    """Return the one of several named templates that renders plain conversations."""
    chosen = templates.get("default") or (next(iter(templates.values())) if len(templates) == 1 else None)
    if chosen is None:
        raise DecoderError(
            f"the tokenizer in {folder} has the chat templates {', '.join(sorted(templates))}, and none is called "
            "default: put the one to use into its chat_template.jinja"
        )
    return chosen


def apply_template(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer the template of a name in `TEMPLATES`.

    Raises:
        DecoderError: the tokenizer has no begin or end token.
    """
    tokens = {"begin": tokenizer.bos_token, "end": tokenizer.eos_token}
    # Some copies of LLaMA name them as empty texts.
    missing = [f"{name} token" for name, token in tokens.items() if not token]
    if missing:
        raise DecoderError(
            f"the template {name!r} starts with the begin token and ends answers with the end token, but the tokenizer "
            f"{tokenizer.name_or_path!r} has no {' and no '.join(missing)}"
        )
    lead = _lead(tokenizer)
    text = TEMPLATES[name].replace("LEAD", repr(lead)).replace("INPUT", repr(INPUT_HEADER))
    tokenizer.chat_template = text


def _lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the characters between the begin token and a text that let the text keep its own tokens.

    SentencePiece puts a space before a text. Some tokenizers do so after a control token as well, others only at
    the very start; there the space has to be written.
    """
    # Compared by token ids, since the space is invisible in decoded text.
    probe = "Below"
    expected = [tokenizer.bos_token_id, *tokenizer(probe, add_special_tokens=False)["input_ids"]]
    for lead in ("", " "):
        if tokenizer(tokenizer.bos_token + lead + probe, add_special_tokens=False)["input_ids"] == expected:
            return lead
    return ""


def load_decoder(config: DecoderConfig, *, device: str | torch.device | None = None) -> PreTrainedModel:
    """Load a causal language model, frozen and in eval mode.

    Args:
        config: name, dtype, revision and quantization of the decoder.
        device: target device; by default the accelerator that torch finds, else the CPU.

    Raises:
        DecoderError: the folder is missing, not a causal language model, or holds pickled weights only.
        MissingExtraError: it is to be quantized, and bitsandbytes is not installed.
    """
    device = device or default_device()
    folder = config.folder()
    # How to read this: the precision is chosen for the device, weights load from safetensors without code of the
    # folder, and the result is frozen.
    dtype = choose_dtype(device) if config.dtype == "auto" else DTYPES[config.dtype]
    options = {"config": read_config(folder)}
    if config.quantize is not None:
        # Each projection is quantized on its target device, so the full-precision decoder never exists as a whole.
        options |= {
            "quantization_config": quantization_config(config.quantize, dtype),
            "device_map": {"": device},
        }
    quiet = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    try:
        decoder = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options
        )
    except torch.OutOfMemoryError:
        raise
    # Any other error that an untrusted file causes in the library means an unusable decoder.
    except Exception as error:
        raise DecoderError(
            f"{folder} does not hold a causal language model in safetensors ({hub.loading_error(folder, error)})"
        ) from error
    finally:
        transformers_logging.set_verbosity(quiet)
    if config.quantize is not None:
        keep_gradients(decoder)
    else:
        # A quantized decoder was loaded onto its device already and cannot be moved.
        decoder.to(device)
    if (head := decoder.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_in_one_piece)
    return decoder.eval().requires_grad_(False)


def read_config(folder: str | Path) -> PretrainedConfig:
    """Read a decoder's ``config.json``; code of the folder is never run.

    Raises:
        DecoderError: it cannot be read, or its type needs code of the folder.
    """
    try:
        return hub.read_config(folder)
    # Any exception about an untrusted file means that its decoder cannot be used.
    except Exception as error:
        raise DecoderError(
            f"{folder} does not hold a causal language model ({hub.loading_error(folder, error)})"
        ) from error


def without_weights(
    folder: str | Path, config: PretrainedConfig | None = None, **options: Any
) -> PreTrainedModel:
    """Build a decoder on the meta device: names and shapes only.

    Args:
        folder: the decoder, also for messages.
        config: used instead of the folder's own.
        **options: of `from_config`, such as ``dtype``.

    Raises:
        DecoderError: it is not a causal language model, or needs code of the folder.
    """
    config = config or read_config(folder)
    try:
        # On the meta device a tensor has a shape and no memory.
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    except Exception as error:
        raise DecoderError(
            f"{folder} does not hold a causal language model ({hub.loading_error(folder, error)})"
        ) from error


def _in_one_piece(head: nn.Module, args: tuple) -> tuple:
    """Copy the last position of each row next to one another: torch multiplies a slice one row at a time."""
    return (args[0].contiguous(), *args[1:])


def fingerprint_decoder(folder: str | Path) -> str:
    """Identify a decoder folder without reading its weights whole.

    Hashes the files that change an answer: the config, the tokenizer, the chat template, and of each safetensors file
    the header (names, shapes and types of all tensors) and a few bytes of every tensor. So another model, a fine-tuned
    copy or another precision gives another value, within milliseconds.

    Returns:
        64 hexadecimal digits.
    """
    # How to read this: hash the settings, then the texts, then samples of every tensor, in a fixed order.
    digest = hashlib.sha256()
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DecoderError(
            f"{folder} has no readable config.json, so it cannot be identified: {error}"
        ) from error
    entries = {name: value for name, value in config.items() if name not in _CONFIG_OF_THE_COPY}
    digest.update(json.dumps(entries, sort_keys=True).encode())
    for name in ("tokenizer.json", "chat_template.jinja"):
        if (Path(folder) / name).is_file():
            digest.update((Path(folder) / name).read_bytes())
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise DecoderError(f"{folder} holds no *.safetensors file, so its weights cannot be identified")
    for file in files:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
            # Free text of the writer, such as the name of the library.
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items()):
                start, end = entry["data_offsets"]
                stream.seek(8 + size + start + (end - start) // 2)
                digest.update(f"{name} {entry['dtype']} {entry['shape']}".encode())
                digest.update(stream.read(min(_SAMPLED_BYTES, (end - start + 1) // 2)))
    return digest.hexdigest()


def num_positions(config: PretrainedConfig) -> int | None:
    """Return the number of tokens that a decoder was built for, or None if its config gives no limit."""
    positions = config.get_text_config().to_dict().get("max_position_embeddings")
    return positions if isinstance(positions, int) and positions > 0 else None


def has_plain_logits(decoder: PreTrainedModel) -> bool:
    """Return whether the logits are the output projection and nothing after it (no soft-capping, no scaling)."""
    config = decoder.config.get_text_config().to_dict()
    return all(config.get(name) in neutral for name, neutral in _LOGIT_CHANGES.items())
