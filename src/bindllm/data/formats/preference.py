"""A better and a worse answer, or one answer with a label: the format ``preference``, in the forms of TRL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bindllm.conversation import Conversation
from bindllm.data.formats.columns import finish, require, system_turn, value_of, written_list
from bindllm.data.formats.enclosed import Enclosed, with_media
from bindllm.data.formats.messages import read_turns, with_enclosed
from bindllm.data.formats.parsed import Parsed
from bindllm.data.formats.place import Place, RowError
from bindllm.data.formats.turns import Turn, converse
from bindllm.data.tables import Record

_TRUTHS: Mapping[str, bool] = {"true": True, "false": False, "1": True, "0": False}


def preference(record: Record, place: Place) -> Parsed:
    """Read a pair, ``{"prompt": ..., "chosen": ..., "rejected": ...}``, or ``{"prompt", "completion", "label"}``.

    Each is a text or a list of messages. Where chosen and rejected are whole conversations, they must be the same up
    to their last message, and the prompt is what they share.

    Raises:
        RowError: two equal answers, or two that do not answer the same.
    """
    if value_of(record, place, "completion") is not None and value_of(record, place, "chosen") is None:
        return _labelled(record, place)
    chosen, rejected = _said(record, place, "chosen"), _said(record, place, "rejected")
    enclosed = Enclosed(record, place)
    better, worse = _answer(chosen, place), _answer(rejected, place)
    if isinstance(chosen, list) and len(chosen) > 1:
        if not isinstance(rejected, list) or chosen[:-1] != rejected[:-1]:
            raise RowError("chosen and rejected differ before their last message")
        turns = read_turns(chosen[:-1], place, enclosed)
        prompt = [system_turn(record, place), *with_enclosed(turns, enclosed)]
    elif isinstance(rejected, list) and len(rejected) > 1:
        raise RowError("chosen and rejected differ before their last message")
    else:
        prompt = _prompt(record, place, enclosed)
    conversation = _conversation(prompt, better)
    rejected_one = Conversation((*conversation.messages[:-1], _conversation(prompt, worse).messages[-1]))
    if rejected_one == conversation:
        raise RowError("chosen and rejected are the same")
    return replace(finish(record, place, conversation, "chat"), rejected=rejected_one)


def _labelled(record: Record, place: Place) -> Parsed:
    """Read one answer and whether it is a wanted one."""
    label = require(record, place, "label")
    desirable = _TRUTHS.get(str(label).strip().lower())
    if desirable is None:
        raise RowError("the label is neither true nor false")
    prompt = _prompt(record, place, Enclosed(record, place))
    conversation = _conversation(prompt, _answer(_said(record, place, "completion"), place))
    return replace(finish(record, place, conversation, "chat"), desirable=desirable)


def _prompt(record: Record, place: Place, enclosed: Enclosed) -> list[Turn]:
    """The turns ahead of the answer."""
    prompt, system = _said(record, place, "prompt"), system_turn(record, place)
    if isinstance(prompt, list):
        return [system, *with_enclosed(read_turns(prompt, place, enclosed), enclosed)]
    if not isinstance(prompt, str):
        raise RowError("the prompt is neither a text nor a list of messages")
    return [system, Turn("user", with_media(prompt, enclosed))]


def _said(record: Record, place: Place, field: str) -> object:
    """A text, or a list of messages, which CSV has as JSON text."""
    return written_list(require(record, place, field), (Mapping,))


def _answer(value: object, place: Place) -> Turn:
    """The last message of an answer, or its text."""
    if isinstance(value, str):
        return Turn("assistant", [value])
    if not isinstance(value, list) or not value:
        raise RowError("an answer that is neither a text nor a list of messages")
    (turn,) = read_turns(value[-1:], place, Enclosed({}, place))
    if turn.role != "assistant":
        raise RowError("an answer whose last message is not the assistant's")
    return turn


def _conversation(prompt: list[Turn], answer: Turn) -> Conversation:
    if prompt[-1].role == "assistant" or all(turn.role == "system" for turn in prompt):
        raise RowError("the prompt does not end with a question")
    return converse([*prompt, answer])
