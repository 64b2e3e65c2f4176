"""Asking the model: prompts and media in, text out, one at a time, in a padded batch, or piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from bindllm.conversation import Conversation, Message, Rendered, render
from bindllm.errors import InputError
from bindllm.media import Media

Prompt = str | Conversation
MAX_NEW_TOKENS = 128


def as_conversations(
    prompts: Sequence[Prompt], media: Sequence[Sequence[Media]] | None
) -> list[Conversation]:
    """Pair each prompt with its media.

    Raises:
        InputError: another number of media rows than prompts, or media for a `Conversation`, which holds its own.
    """
    rows = [()] * len(prompts) if media is None else list(media)
    if len(rows) != len(prompts):
        raise InputError(
            f"{len(prompts)} prompts but {len(rows)} rows of media: give one list of media per prompt"
        )
    conversations = []
    for prompt, row in zip(prompts, rows, strict=True):
        if isinstance(prompt, Conversation):
            if row:
                raise InputError(
                    "a Conversation holds its own media: put them into its messages, not into media="
                )
            conversations.append(prompt)
        else:
            conversations.append(Conversation((Message("user", [*row, prompt]),)))
    return conversations


def pad_left(rendered: Sequence[Rendered], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return input ids, attention mask and media index of a left-padded batch, each [B, T]."""
    width = max(len(row.input_ids) for row in rendered)

    def pad(rows: list[list[int]], filler: int) -> Tensor:
        return torch.tensor([[filler] * (width - len(row)) + list(row) for row in rows])

    ids = [row.input_ids for row in rendered]
    return (
        pad(ids, pad_id),
        pad([[1] * len(row) for row in ids], 0),
        pad([row.media_index for row in rendered], -1),
    )


def render_prompts(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor, Tensor]:
    """Render conversations up to the header of the answer, as a left-padded batch."""
    rendered = [render(c, tokenizer, answer_follows=True, control_text="defuse") for c in conversations]
    return pad_left(rendered, tokenizer.pad_token_id)


class _Cancelled(StoppingCriteria):
    """Ends a generation whose reader has gone away."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def stream_text(generate: Any, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the text of a generation piece by piece.

    Args:
        generate: called in another thread with ``streamer=`` and ``stopping_criteria=``.
        tokenizer: turns ids into text.

    Raises:
        whatever ``generate`` raises, in the reader's thread.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    cancelled, failures = _Cancelled(), []

    def work() -> None:
        try:
            generate(streamer=streamer, stopping_criteria=StoppingCriteriaList([cancelled]))
        except Exception as error:
            failures.append(error)
            streamer.end()

    thread = threading.Thread(target=work, name="bindllm-stream", daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        cancelled.event.set()
        thread.join()
    if failures:
        raise failures[0]
