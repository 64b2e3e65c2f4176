"""Chat templates for decoders that bring none: a base language model was never told how a conversation looks.

A template is chosen by its name in `DecoderConfig.template`, and takes the place of the tokenizer's own.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from bindllm.conversation import INPUT_HEADER
from bindllm.errors import DecoderError

# The texts of Stanford Alpaca (2023). Nothing follows the last colon: the released ImageBind-LLM glues the answer to
# it. A later turn has no preamble; a system text takes the preamble's place.
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


def apply_template(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a tokenizer the template of a name in `TEMPLATES`.

    Raises:
        DecoderError: the tokenizer has no begin or end token.
    """
    tokens = {"begin": tokenizer.bos_token, "end": tokenizer.eos_token}
    # Some copies of LLaMA name them as empty texts.
    missing = [f"{what} token" for what, token in tokens.items() if not token]
    if missing:
        raise DecoderError(
            f"the template {name!r} starts with the begin token and ends answers with the end token, but the tokenizer "
            f"{tokenizer.name_or_path!r} has no {' and no '.join(missing)}"
        )
    lead = _lead(tokenizer)
    text = TEMPLATES[name].replace("LEAD", repr(lead)).replace("INPUT", repr(INPUT_HEADER))
    tokenizer.chat_template = text


def _lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what must stand between the begin token and a text for the text to keep its own tokens.

    SentencePiece puts a space ahead of a text. Some tokenizers do so after a control token as well, others only at
    the very start; there the space has to be written.
    """
    probe = "Below"
    expected = [tokenizer.bos_token_id, *tokenizer(probe, add_special_tokens=False)["input_ids"]]
    for lead in ("", " "):
        if tokenizer(tokenizer.bos_token + lead + probe, add_special_tokens=False)["input_ids"] == expected:
            return lead
    return ""
