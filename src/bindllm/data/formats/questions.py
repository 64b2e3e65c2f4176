"""The question of a record, whatever its format: rows to be answered need no answer, and none of theirs is read."""

from __future__ import annotations

from collections.abc import Mapping

from bindllm.conversation import INPUT_HEADER, Conversation
from bindllm.conversation.messages import BETWEEN, RowError, Verbatim, parse_messages
from bindllm.data.formats import has_options, listing, options_of, sharegpt_turns
from bindllm.data.formats.columns import Fields, as_list, json_list
from bindllm.data.source_config import QUESTION


def read_question(fields: Fields) -> tuple[Conversation, tuple[str, ...]]:
    """Return the question of a record, and remarks on it.

    Messages (``messages``, ``conversations``, or a ``prompt`` that is a list of them) are used up to their last
    question. Else the text in ``prompt``, ``question`` or ``instruction`` is the question, with its ``choices`` and its
    ``input``. A record with media and without a text gets the prompt of the source.

    Raises:
        InputError: the question is missing, or cannot be used.
    """
    messages = parse_messages(_turns(fields), fields.media(), allow_empty_answers=True)
    remarks = fields.remarks(messages)
    while messages and messages[-1].role == "assistant":
        messages.pop()
    if not any(message.role == "user" for message in messages):
        raise RowError("no question: no message of the user")
    return Conversation(tuple(messages), tools=fields.tools()), remarks


def _turns(fields: Fields) -> list[object]:
    if fields.value("messages") is not None:
        return [*fields.system(), *as_list(fields.value("messages"), fields.column("messages"))]
    if fields.value("conversations") is not None:
        return sharegpt_turns(fields)
    # JSON text in CSV.
    given = json_list(fields.value("prompt"), (Mapping,))
    if isinstance(given, list):
        return [*fields.system(), *given]
    return [*fields.system(), {"role": "user", "content": _content(fields)}]


def _content(fields: Fields) -> list[str]:
    """Return the text of a question, as content parts."""
    frame, text = fields.prompt(), fields.text("prompt")
    if not text:
        if not fields.media_columns():
            names = ", ".join(map(repr, fields.record)) or "none"
            raise RowError(
                "no question (prompt, question, instruction, messages) and no media", f"columns: {names}"
            )
        if QUESTION in frame:
            raise RowError(f"no question for the {QUESTION} of the prompt")
        return [frame]
    if has_options(fields):
        return [f"Question: {text}", Verbatim(listing(options_of(fields)[0], fields.text("hint")))]
    if given := fields.text("input"):
        # As in the public texts of Alpaca, whose column is called so.
        text += (INPUT_HEADER if fields.column("input") in fields.record else BETWEEN) + given
    return [frame.replace(QUESTION, text) if QUESTION in frame else text]
