"""Loading a frozen Hugging Face decoder, its tokenizer and chat template; fingerprints of decoders; their output."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from bindllm.atomic import file_sha256, not_finite, open_tensors, read_json, require_file
from bindllm.conversation import INPUT_HEADER, check_tokenizer, end_tokens
from bindllm.conversation.template import adapt_template
from bindllm.encoders import hub
from bindllm.errors import DecoderError, InputError, check_choice
from bindllm.model.quantize import QUANTIZATIONS, keep_gradients, quantization_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ATTENTIONS = ("eager", "sdpa", "flash_attention_2")

# Files that decide how a text becomes tokens, and where an answer ends.
_PROMPT_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template.*", "additional_chat_templates/*"),
)
# Entries of settings that describe the copy, not the model.
_OF_THE_COPY = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "is_local")
_LANGUAGE_MODEL = "causal language model"
# Enough to notice a changed tensor, and few enough to fingerprint 7B parameters in milliseconds.
_SAMPLED_BYTES = 256

# Rows and columns of the positions that the vocabulary projection computes; None: all.
_CHOSEN: ContextVar[tuple[Tensor, Tensor] | None] = ContextVar("bindllm_chosen", default=None)

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
    """A Jinja chat template: its text, a file that ends in `.jinja`, or `alpaca`, the text template of the released
    ImageBind-LLM, for a base LLaMA; null: the tokenizer's own. A checkpoint keeps the text of a file."""

    template_options: dict[str, Any] | None = None
    """Variables of the chat template, such as `{enable_thinking: true}`: true, false, numbers or texts."""

    quantize: Literal["nf4", "int8"] | None = None
    """Frozen projections in 4 bits (`nf4`, as in QLoRA) or 8 bits (`int8`), through bitsandbytes; null: as they are."""

    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """The attention kernel of a training: `eager` is plain products, `flash_attention_2` needs its package and a GPU;
    null: transformers chooses, mostly `sdpa`. Results are the same up to rounding. A loaded checkpoint has null."""

    compile: bool = False
    """Train with compiled norms and feed-forward parts (torch.compile): faster steps after a first one that takes half
    a minute. Needs a C++ compiler on CPUs. A loaded checkpoint is not compiled."""

    tuned: bool = False
    """Whether a checkpoint holds its weights: `decoder` is then a group of `model.trainable`, and `auto` is
    `float32`."""

    def __post_init__(self) -> None:
        # How to read this: closed choices are checked here, since configs also come from files and Python.
        check_choice("dtype", self.dtype, ("auto", *DTYPES))
        if self.template is not None and self.template.endswith(".jinja"):
            require_file(file := Path(self.template), DecoderError, "give a file with a Jinja template")
            self.template = file.read_text("utf-8")
        if self.template is not None and "{" not in self.template:
            check_choice(
                "template (a name, Jinja text, or a file that ends in .jinja)", self.template, TEMPLATES
            )
        if self.attention is not None:
            check_choice("attention", self.attention, ATTENTIONS)
        for name, value in (self.template_options or {}).items():
            # Jinja knows no NaN and no infinity, and writes nothing for them.
            is_value = isinstance(value, bool | int | str) or (
                isinstance(value, float) and math.isfinite(value)
            )
            if not name.isidentifier() or not is_value:
                raise InputError(
                    f"decoder.template_options has {name}: {value!r}, expected a variable of the template with true, "
                    "false, a number or a text, such as {enable_thinking: true}"
                )
        if self.quantize is not None:
            check_choice("quantization", self.quantize, QUANTIZATIONS)
            if self.tuned:
                raise InputError(
                    f"decoder.quantize is {self.quantize} and decoder.tuned is true: weights in 4 or 8 bits cannot be "
                    "trained, nor replaced by trained ones. Remove quantize, or use an adapter (docs/adapters.md)"
                )

    def torch_dtype(self, device: str | torch.device) -> torch.dtype:
        """Return the precision of the decoder on a device."""
        if self.dtype == "auto":
            # The small steps of training would vanish in half precision.
            return torch.float32 if self.tuned else choose_dtype(device)
        return DTYPES[self.dtype]

    def folder(self) -> Path:
        """Return the local folder of the decoder; an id on the hub is downloaded.

        Raises:
            DecoderError: the folder does not exist, or the model cannot be downloaded.
        """
        return hub.find_folder(self.name, self.revision, role="decoder")


def choose_dtype(device: str | torch.device) -> torch.dtype:
    """Return the fastest safe dtype of a frozen decoder on this device.

    bfloat16 if the hardware multiplies bfloat16 matrices fast: GPUs that report it, CPUs with AMX tiles, and AMD's with
    AVX-512 bfloat16 (Zen 4 and later). On other CPUs it is slower than float32; `benchmarks` measures it.
    """
    # Emulated bfloat16 of old GPUs would be slower than float16.
    if torch.device(device).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if torch.device(device).type == "cpu":
        cpu = torch.cpu.get_capabilities()
        # Intel's cores have the instruction too, but there it takes twice as long as float32.
        is_fast = cpu.get("amx_bf16") or (cpu.get("avx512_bf16") and "AMD" in str(cpu.get("cpu_name")))
        return torch.bfloat16 if is_fast else torch.float32
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
    with hub.loading(folder, part="tokenizer", failure=DecoderError):
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise TypeError(f"{type(tokenizer).__name__} is several tokenizers in one")
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
    if config.template in TEMPLATES:
        apply_template(config.template, tokenizer)
    elif config.template is not None:
        tokenizer.chat_template = config.template
    check_tokenizer(tokenizer)
    # Jinja would ignore a variable that the template does not read.
    words = set(re.findall(r"\w+", tokenizer.chat_template))
    if unread := sorted({*(config.template_options or {})} - words):
        hint = "".join(f" Did you mean {word!r}?" for word in get_close_matches(unread[0], words, 1))
        raise InputError(
            f"decoder.template_options has {unread[0]}, which the chat template of {folder} does not read.{hint}"
        )
    # Into the template too, before the rest of it: training, evaluation and each request get the same.
    # Jinja reads an escape of JSON for half of an emoji as a character of its own.
    dumps = partial(json.dumps, ensure_ascii=False)
    values = [f"{{%- set {n} = {dumps(v)} -%}}" for n, v in (config.template_options or {}).items()]
    tokenizer.chat_template = "".join(values) + tokenizer.chat_template
    adapt_template(tokenizer)
    if config.system is not None:
        # The system text becomes part of the template, so no caller can forget it.
        message = f"{{'role': 'system', 'content': {json.dumps(config.system, ensure_ascii=False)}}}"
        tokenizer.chat_template = (
            "{%- if messages[0]['role'] != 'system' -%}"
            f"{{%- set messages = [{message}] + messages -%}}"
            "{%- endif -%}" + tokenizer.chat_template
        )
    # Refuses a template that does not end an answer, takes it apart, or ignores the system text.
    end_tokens(tokenizer, config.system)
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
        DecoderError: the folder is missing, not a causal language model, holds pickled weights only, lacks a tensor,
            or has weights that are not finite in the dtype.
        MissingExtraError: it is to be quantized, and bitsandbytes is not installed.
    """
    device = device or default_device()
    folder = config.folder()
    # How to read this: the precision is chosen for the device, weights load from safetensors without code of the
    # folder, and the result is frozen.
    dtype = config.torch_dtype(device)
    options: dict[str, Any] = {}
    if config.attention is not None:
        options["attn_implementation"] = config.attention
    if config.quantize is not None:
        # Each projection is quantized on its target device, so the full-precision decoder never exists as a whole.
        options |= {
            "quantization_config": quantization_config(config.quantize, dtype),
            "device_map": {"": device},
        }
    decoder = _load_whole(folder, dtype=dtype, **options)
    # float16 ends at 65504, and larger weights become infinite.
    weights = {name: weight for name, weight in decoder.named_parameters() if weight.dtype in DTYPES.values()}
    if wrong := not_finite(weights):
        raise DecoderError(
            f"{folder} has weights that are not finite in {str(dtype).removeprefix('torch.')}: {wrong}. Set another "
            "dtype (bfloat16 has the range of float32); if these are infinite in every dtype, the files are damaged"
        )
    if config.quantize is not None:
        keep_gradients(decoder)
    else:
        # A quantized decoder was loaded onto its device already and cannot be moved.
        decoder.to(device)
    return decoder.eval().requires_grad_(False)


def _load_whole(folder: Path, **options: Any) -> PreTrainedModel:
    """Load a decoder from safetensors, and refuse one that lacks weights: transformers would fill them at random."""
    config = read_config(folder)
    with hub.loading(folder, part=f"{_LANGUAGE_MODEL} in safetensors", failure=DecoderError):
        decoder, report = model_class(config).from_pretrained(
            folder,
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    if missing := hub.missing_weights(report):
        raise DecoderError(
            f"{folder} has no weights for {missing} of {type(decoder).__name__}, which would be random: copy the whole "
            "folder"
        )
    return decoder


def check_weights(folder: Path) -> None:
    """Check that a decoder's files hold all its weights; they stay on the disk.

    Raises:
        DecoderError: the folder does not hold a whole causal language model in safetensors.
    """
    # In the dtype of the files, tensors are mapped into memory and not read.
    _load_whole(folder, dtype="auto")


def read_config(folder: str | Path) -> PretrainedConfig:
    """Read a decoder's ``config.json``; code of the folder is never run.

    Raises:
        DecoderError: it cannot be read, or its type needs code of the folder.
    """
    with hub.loading(folder, part=_LANGUAGE_MODEL, failure=DecoderError):
        return hub.read_config(folder)


def model_class(config: PretrainedConfig) -> type:
    """Return the class that loads a decoder: a language model, or one that is a part of a model for images."""
    is_inside = (
        type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    )
    return AutoModelForImageTextToText if is_inside else AutoModelForCausalLM


def without_weights(
    folder: str | Path, config: PretrainedConfig | None = None, **options: Any
) -> PreTrainedModel:
    """Build a decoder on the meta device: names and shapes only.

    Args:
        config: used instead of the folder's own.

    Raises:
        DecoderError: it is not a causal language model, or needs code of the folder.
    """
    config = config or read_config(folder)
    # On the meta device a tensor has a shape and no memory.
    with hub.loading(folder, part=_LANGUAGE_MODEL, failure=DecoderError), torch.device("meta"):
        return model_class(config).from_config(config, trust_remote_code=False, **options)


def fingerprint_decoder(folder: str | Path) -> str:
    """Identify a decoder folder without reading its weights whole.

    Hashes the files that change an answer: the config, the tokenizer, the chat templates, the special tokens of the
    generation config, and of each safetensors file the header (names, shapes and types of all tensors) and a few bytes
    of every tensor. So another model, another prompt, a fine-tuned copy or another precision gives another value,
    within milliseconds.

    Returns:
        64 hexadecimal digits.

    Raises:
        DecoderError: the config or the weights are missing or damaged.
    """
    # How to read this: hash the settings and the texts, then samples of every tensor, in a fixed order.
    folder, digest = Path(folder), hashlib.sha256()
    require_file(folder / "config.json", DecoderError, "give the Hugging Face folder of a decoder")
    for file in sorted(file for pattern in _PROMPT_FILES for file in folder.glob(pattern)):
        digest.update(f"{file.name} ".encode())
        if file.suffix == ".json" and isinstance(content := read_json(file, DecoderError), dict):
            digest.update(json.dumps(_settings(file.name, content), sort_keys=True).encode())
        else:
            require_file(file, DecoderError, "copy the whole folder")
            digest.update(bytes.fromhex(file_sha256(file)))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DecoderError(f"{folder} holds no *.safetensors file, so its weights cannot be identified")
    for file in files:
        # Opening it compares the header with the size of the file, so everything that the header names is there.
        with open_tensors(file, DecoderError), file.open("rb") as stream:
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


def _settings(name: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a settings file that change an answer."""
    if name == "generation_config.json":
        return {key: value for key, value in content.items() if key.endswith("_token_id")}
    return {key: value for key, value in content.items() if key not in _OF_THE_COPY}


def num_positions(config: PretrainedConfig) -> int | None:
    """Return the number of tokens that a decoder was built for, or None if its config gives no limit."""
    # Not `to_dict`, which copies everything: a server asks for each request.
    positions = vars(config.get_text_config()).get("max_position_embeddings")
    return positions if isinstance(positions, int) and positions > 0 else None


@dataclass
class BindOutput:
    """Output of a forward pass.

    Attributes:
        logits: [B, T, V] without labels; with labels [N, V], at the N positions that predict a supervised token.
        targets: the supervised tokens, [N], or None.
        rows: the row of the batch that each of them is in, [N], or None.
    """

    logits: Tensor
    targets: Tensor | None = None
    rows: Tensor | None = None


@contextmanager
def projecting(rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Let the vocabulary projection compute only N positions in this block, given by row and column, [N] each."""
    token = _CHOSEN.set((rows, columns))
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def choose_positions(head: nn.Module, args: tuple) -> tuple:
    """Before the vocabulary projection: pick hidden states [N, D] out of [B, T, D]."""
    hidden, chosen = args[0], _CHOSEN.get()
    if chosen is None or hidden.ndim != 3:
        # In one piece: torch multiplies a slice, such as the last position of each row, one row at a time.
        return (hidden.contiguous(), *args[1:])
    return (hidden[chosen], *args[1:])
