"""Formats whose rows hold messages: ``messages``, ``llava``, ``sharegpt`` and ``preference``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bindllm.conversation import Conversation, Message, Role
from bindllm.data.formats.columns import Fields, as_list, json_list
from bindllm.data.messages import RecordMedia, RowError, parse_messages, role_of
from bindllm.data.rows import Row

SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
}
# CSV writes truth values as words or digits.
_TRUTHS: Mapping[str, bool] = {"true": True, "false": False, "1": True, "0": False}


def messages(fields: Fields) -> Row:
    """Read ``{"messages": [{"role": ..., "content": text or parts}, ...]}``.

    The columns ``image`` or ``images`` hold the media of placeholders and of parts such as ``{"type": "image"}``.
    """
    # The column system comes first: a system message inside the turns is joined with it.
    turns = as_list(fields.require("messages"), "messages")
    return fields.row([*fields.system(), *turns], fields.media(), "chat")


def llava(fields: Fields) -> Row:
    """Read LLaVA: ``{"image": path or list, "conversations": [{"from": "human", "value": "<image> ..."}, ...]}``.

    Other media are in columns called like their modality and have placeholders such as ``<video>``.

    Raises:
        RowError: media without a placeholder.
    """
    return fields.row(_sharegpt_turns(fields), fields.media(needs_placeholders=True), "chat")


def sharegpt(fields: Fields) -> Row:
    """Read ShareGPT: ``{"conversations": [{"from": "human", "value": ...}, ...]}``, without media.

    Raises:
        RowError: the record has media.
    """
    turns = _sharegpt_turns(fields)
    if fields.media_columns() or fields.unnamed():
        raise RowError(f"sharegpt has no media.{fields.hint()}")
    return fields.row(turns, RecordMedia(fields.resolve), "chat")


def preference(fields: Fields) -> Row:
    """Read a pair, ``{"prompt": ..., "chosen": ..., "rejected": ...}``, or ``{"prompt", "completion", "label"}``.

    Each is a text or a list of messages, as in TRL. If chosen and rejected are whole conversations, they must be equal
    up to their last message, and the prompt is their common part.

    Raises:
        RowError: two equal answers, or answers to different prompts.
    """
    # TRL's unpaired form: one answer, and whether it is wanted.
    if fields.value("completion") is not None and fields.value("chosen") is None:
        desirable = _TRUTHS.get(str(fields.require("label")).strip().lower())
        if desirable is None:
            raise RowError("the label is neither true nor false")
        answer = _answer(_messages_of(fields, "completion"), fields)
        return fields.row_of([*_prompt(fields), answer], "chat", desirable=desirable)
    chosen, rejected = _messages_of(fields, "chosen"), _messages_of(fields, "rejected")
    better, worse = _answer(chosen, fields), _answer(rejected, fields)
    # Whole conversations contain the prompt, which must be the same on both sides.
    if any(isinstance(side, list) and len(side) > 1 for side in (chosen, rejected)):
        if not isinstance(chosen, list) or not isinstance(rejected, list) or chosen[:-1] != rejected[:-1]:
            raise RowError("chosen and rejected differ before their last message")
        prompt = _parse_prompt(fields, chosen[:-1])
    else:
        prompt = _prompt(fields)
    # After parsing, so that white space does not make two answers different.
    if better == worse:
        raise RowError("chosen and rejected are the same")
    row = fields.row_of([*prompt, better], "chat")
    return replace(row, rejected=Conversation((*prompt, worse)))


def _sharegpt_turns(fields: Fields) -> list[object]:
    """Write the turns of a record as OpenAI messages."""
    turns: list[object] = [*fields.system()]
    for turn in as_list(fields.require("conversations"), fields.column("conversations")):
        if not isinstance(turn, Mapping):
            raise RowError("a turn that is not an object with 'from' and 'value'")
        # Some data sets use OpenAI's keys in a list of ShareGPT.
        text = turn.get("value", turn.get("content"))
        if not isinstance(text, str):
            raise RowError("a turn whose value is not a text")
        # With the other keys, such as a weight, which the parser checks.
        role = role_of(turn.get("from", turn.get("role")), SHAREGPT_ROLES)
        turns.append({**turn, "role": role, "content": text})
    return turns


def _messages_of(fields: Fields, field: str) -> object:
    """Return a text or a list of messages, which is JSON text in CSV."""
    return json_list(fields.require(field), (Mapping,))


def _prompt(fields: Fields) -> list[Message]:
    """Parse the messages before the answer."""
    prompt = _messages_of(fields, "prompt")
    if not isinstance(prompt, str | list):
        raise RowError("the prompt is neither a text nor a list of messages")
    return _parse_prompt(fields, [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)


def _parse_prompt(fields: Fields, turns: list) -> list[Message]:
    prompt = parse_messages([*fields.system(), *turns], fields.media())
    # The answer follows separately, so the prompt must end before it.
    if not any(message.role == "user" for message in prompt) or prompt[-1].role == "assistant":
        raise RowError("the prompt does not end with a question")
    return prompt


def _answer(value: object, fields: Fields) -> Message:
    """Parse an answer: a text, or the last of a list of messages."""
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        raise RowError("an answer that is neither a text nor a list of messages")
    # Only the last message is the answer; the earlier ones are the prompt.
    answer = parse_messages(value[-1:], RecordMedia(fields.resolve))
    if not answer or answer[0].role != "assistant":
        raise RowError("an answer whose last message is not the assistant's")
    return answer[0]
