"""Formats whose rows hold messages: ``messages``, ``llava``, ``sharegpt`` and ``preference``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    turns = as_list(fields.require("messages"), fields.column("messages"))
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
    up to their last message. Their common part follows the prompt, or contains it.

    Raises:
        RowError: two equal answers, or answers to different prompts.
    """
    # TRL's unpaired form: one answer, and whether it is wanted.
    if fields.value("completion") is not None and fields.value("chosen") is None:
        desirable = _TRUTHS.get(str(fields.require("label")).strip().lower())
        if desirable is None:
            raise RowError("the label is neither true nor false")
        answer, before = _answer(fields, "completion")
        return fields.row_of([*_prompt(fields, before), answer], "chat", desirable=desirable)
    (better, before), (worse, other) = _answer(fields, "chosen"), _answer(fields, "rejected")
    if before != other:
        raise RowError("chosen and rejected differ before their last message")
    prompt = _prompt(fields, before)
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


def _prompt(fields: Fields, turns: list) -> list[Message]:
    """Parse the messages before the answer: the column prompt, then those of a whole conversation."""
    column = fields.column("prompt")
    # JSON text in CSV.
    given = json_list(fields.value("prompt") if turns else fields.require("prompt"), (Mapping,))
    if isinstance(given, list):
        # Some data sets repeat the prompt in the conversation.
        turns = turns if turns[: len(given)] == given else [*given, *turns]
    elif isinstance(given, str) and not turns:
        turns = [{"role": "user", "content": given}]
    elif isinstance(given, str) and not any(given.strip() in text for text in _texts(turns)):
        raise RowError(
            f"the text in column {column!r} is not in the conversation; write it into the conversation, or give "
            "columns.prompt a name that no column has"
        )
    elif not isinstance(given, str | None):
        raise RowError("the prompt is neither a text nor a list of messages")
    prompt = parse_messages([*fields.system(), *turns], fields.media())
    # The answer follows separately, so the prompt must end before it.
    if not any(message.role == "user" for message in prompt) or prompt[-1].role == "assistant":
        raise RowError("the prompt does not end with a question")
    return prompt


def _texts(turns: list) -> Iterator[str]:
    """Yield the texts of messages that are not parsed yet."""
    for turn in turns:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                yield text


def _answer(fields: Fields, field: str) -> tuple[Message, list]:
    """Parse an answer, a text or the last of a list of messages; return it and the messages before it."""
    # JSON text in CSV.
    value = json_list(fields.require(field), (Mapping,))
    if isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    if not isinstance(value, list) or not value:
        raise RowError("an answer that is neither a text nor a list of messages")
    # Only the last message is the answer; the earlier ones are the prompt.
    answer = parse_messages(value[-1:], RecordMedia(fields.resolve))
    if not answer or answer[0].role != "assistant":
        raise RowError("an answer whose last message is not the assistant's")
    return answer[0], value[:-1]
