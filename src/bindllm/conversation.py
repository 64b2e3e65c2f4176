"""Conversations of text and media, and how they become token ids, a loss mask and a media index.

Every data format and every request becomes a `Conversation`. `render` turns it into tokens through the chat
template of the decoder's tokenizer, in one pass over the whole text, so that no token is cut differently in
training and in generation. The media index is the routing rule of the injection (`docs/architecture.md`).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

from bindllm.errors import DecoderError, InputError, did_you_mean
from bindllm.media import Media

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["system", "user", "assistant"]

WORD_JOINER = "\u2060"
NO_MEDIA = -1
INPUT_HEADER = "\n\n### Input:\n"
"""What stands between instruction and input in one user message, in the public Alpaca texts."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: who speaks.
        content: a text, or a sequence of parts, each a text or a `Media`; kept as a tuple of parts. The texts
            are joined as they are; media add no text.

    Raises:
        InputError: an unknown role, a part of another type, or a text that is not valid Unicode.

    Example:
        >>> Message("user", "What is this?").text
        'What is this?'
    """

    role: Role
    content: str | Media | Sequence[str | Media]

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise InputError(f"unknown role {self.role!r}. {did_you_mean(str(self.role), get_args(Role))}")
        parts = (self.content,) if isinstance(self.content, (str, Media)) else self.content
        if not isinstance(parts, Sequence):
            raise InputError(f"the content of a message is a text or a list of parts, not {parts!r}")
        for part in parts:
            if not isinstance(part, (str, Media)):
                raise InputError(f"a part of a message is a text or a Media, not {part!r}")
            if isinstance(part, str):
                _check_unicode(part)
        object.__setattr__(self, "content", tuple(parts))

    @property
    def text(self) -> str:
        """All text parts, joined."""
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def media(self) -> tuple[Media, ...]:
        """All media parts, in order."""
        return tuple(part for part in self.content if isinstance(part, Media))


@dataclass(frozen=True)
class Conversation:
    """Messages in order, at least one.

    Example:
        >>> Conversation((Message("user", "Hello"),)).media_groups
        ()
    """

    messages: tuple[Message, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        if not self.messages:
            raise InputError("a conversation without messages; give at least one Message")
        for message in self.messages:
            if not isinstance(message, Message):
                raise InputError(
                    f"a conversation holds {message!r}, which is no Message; write Message('user', ...)"
                )

    @cached_property
    def media_groups(self) -> tuple[tuple[Media, ...], ...]:
        """One group per message that holds media; the media of one group are fused into one embedding."""
        return tuple(message.media for message in self.messages if message.media)


@dataclass(frozen=True)
class Rendered:
    """The tokens of a conversation.

    Args:
        input_ids: token ids, [T].
        media_index: the media group that speaks to the token, or -1 everywhere when there is no media, [T].
        answers: first token and token after the last of what the model shall learn to say: the text of each
            assistant message and the token that ends it.
    """

    input_ids: list[int]
    media_index: list[int]
    answers: list[tuple[int, int]]

    @property
    def supervised(self) -> list[bool]:
        """True for the tokens of all answers, [T]."""
        supervised = [False] * len(self.input_ids)
        for start, stop in self.answers:
            supervised[start:stop] = [True] * (stop - start)
        return supervised


def render(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    answer_follows: bool = False,
    control_text: Literal["refuse", "defuse"] = "refuse",
) -> Rendered:
    """Turn a conversation into tokens with the chat template of the tokenizer.

    A token that reaches over a border belongs to the side of its first character.

    Args:
        conversation: what to render; texts are kept as they are.
        tokenizer: a fast tokenizer with a chat template.
        answer_follows: end with the header of an assistant message, ready for generation.
        control_text: what to do where a text spells a control token such as ``<|im_end|>``, which would end
            the message: refuse it, or defuse it by an invisible word joiner after its first character.

    Raises:
        DecoderError: no offsets, no chat template, or a template that cannot be mapped to messages.
        InputError: a text that spells a control token, or a conversation which the template refuses.

    Example:
        >>> render(Conversation((Message("user", "Hi"),)), tokenizer).input_ids  # doctest: +SKIP
        [1, 9690, 198, ...]
    """
    check_tokenizer(tokenizer)
    messages = conversation.messages
    _check_roles(messages, answer_follows=answer_follows)
    control = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    defuse = control_text == "defuse"
    turns = [{"role": m.role, "content": _guard(m.text, control, defuse=defuse)} for m in messages]
    text = _apply_template(tokenizer, turns, header=answer_follows)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, starts = encoded["input_ids"], _token_starts(encoded["offset_mapping"])

    def first_token(place: int | None) -> int | None:
        """First token that starts at a place in the text or after it."""
        return None if place is None else bisect_left(starts, place)

    answer_places = _answer_places(tokenizer, turns, text, control)
    answers = []
    media_index = [0 if conversation.media_groups else NO_MEDIA] * len(ids)
    group, answer_end, control_ids = -1, None, set(control.values())
    for turn, message in enumerate(messages):
        if message.media:
            group += 1
            # Everything ahead of the first group belongs to it already. Some templates (Qwen3) render an answer
            # differently once it is no longer the last one; what follows it starts after its end token.
            if group > 0:
                first = first_token(_place(tokenizer, turns[:turn], text))
                first = _found(answer_end if first is None else first, turn, tokenizer)
                media_index[first:] = [group] * (len(ids) - first)
        answer_end = None
        if message.role == "assistant":
            first = _found(first_token(answer_places[turn]), turn, tokenizer)
            answer_end = _answer_end(ids, first, control_ids)
            answers.append((first, answer_end))
    return Rendered(ids, media_index, answers)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text {text!r} is not valid Unicode (half of a surrogate pair)") from error


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that conversations can be rendered.

    Raises:
        DecoderError: no offsets, or no chat template.
    """
    if not tokenizer.is_fast:
        raise DecoderError(
            f"{type(tokenizer).__name__} gives no character offsets, which the loss mask needs; "
            "use a decoder folder with a tokenizer.json (a fast tokenizer)"
        )
    if not tokenizer.chat_template:
        raise DecoderError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned decoder, put a "
            "chat_template.jinja into its folder, or give a base model the text template of the released "
            "ImageBind-LLM (model.decoder.template: alpaca)"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Make sure that a decoder has an embedding for every token that can occur.

    Some tokenizers list control tokens for which the weights have no row. That does no harm where neither padding nor
    the chat template uses them: texts cannot spell control tokens.

    Args:
        tokenizer: with a chat template.
        num_embeddings: rows of the decoder's token embedding.

    Raises:
        DecoderError: tokens beyond the embedding; they are named.
    """
    words = {token: i for token, i in tokenizer.get_vocab().items() if i >= num_embeddings}
    if not words:
        return
    exchange = Conversation((Message("user", "?"), Message("assistant", "!")))
    used = {tokenizer.pad_token_id, tokenizer.eos_token_id, *render(exchange, tokenizer).input_ids}
    control = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = sorted((i, token) for token, i in words.items() if i in used or i not in control)
    if beyond:
        named = ", ".join(f"{token!r} ({i})" for i, token in beyond[:5])
        raise DecoderError(
            f"the decoder has {num_embeddings:,} token embeddings, and its tokenizer gives {len(beyond):,} tokens an "
            f"id beyond them: {named}{', ...' * (len(beyond) > 5)}. Use the tokenizer that came with these weights; "
            "where only the padding token is named, take pad_token out of tokenizer_config.json"
        )


def _check_roles(messages: Sequence[Message], *, answer_follows: bool) -> None:
    if messages[0].role == "assistant":
        raise InputError("the conversation starts with an answer; put a user message ahead of it")
    if answer_follows and messages[-1].role == "assistant":
        raise InputError("the last message is an answer already; leave it out or set answer_follows=False")


def _guard(text: str, control: dict[str, int], *, defuse: bool) -> str:
    """Keep a text from opening or closing messages by itself."""
    for token in control:
        if token in text:
            if not defuse:
                raise InputError(
                    f"a message spells the control token {token!r} of the decoder; take it out, or render it "
                    "with control_text='defuse'"
                )
            text = text.replace(token, token[0] + WORD_JOINER + token[1:])
    return text


def _apply_template(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, header: bool) -> str:
    # jinja2 comes with every tokenizer that has a template; imported here to keep `import bindllm` instant.
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=header)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise InputError(
            f"the chat template of {tokenizer.name_or_path!r} refuses messages of the roles {roles}: {error}"
        ) from error


def _place(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], text: str, *, header: bool = False
) -> int | None:
    """Where the first messages (and the header of an answer) end in the text; None: it starts otherwise."""
    prefix = _apply_template(tokenizer, turns, header=header)
    return len(prefix) if text.startswith(prefix) else None


def _answer_places(
    tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], text: str, control: Iterable[str]
) -> dict[int, int | None]:
    """Where in the text each answer starts, by its turn; None where what comes before it is rendered differently."""
    answers = [turn for turn, message in enumerate(turns) if message["role"] == "assistant"]
    places = {turn: _place(tokenizer, turns[:turn], text, header=True) for turn in answers[:1]}
    if len(answers) > 2 and (first := places[answers[0]]) is not None:
        # To render what comes before each single answer takes a time that grows with the square of their number. A
        # header with a control token can be looked for instead: no message spells one.
        before = _place(tokenizer, turns[: answers[0]], text)
        header = "" if before is None else text[before:first]
        if any(token in header for token in control):
            ends = [match.end() for match in re.finditer(re.escape(header), text) if match.start() >= first]
            # One at the very end waits for an answer.
            ends = [end for end in ends if end < len(text)]
            if len(ends) == len(answers) - 1:
                return places | dict(zip(answers[1:], ends, strict=True))
    return places | {turn: _place(tokenizer, turns[:turn], text, header=True) for turn in answers[1:]}


def _found(token: int | None, turn: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Pass on the first token of a message, or say why there is none."""
    if token is None:
        raise DecoderError(
            f"the chat template of {tokenizer.name_or_path!r} renders what comes before message {turn + 1} "
            "differently once it follows, so tokens cannot be mapped to messages; give the decoder a template "
            "that does not rewrite earlier messages"
        )
    return token


def _token_starts(offsets: list[tuple[int, int]]) -> list[int]:
    """First character of each token, never decreasing.

    Byte-level tokenizers leave a leading space out of a token's offsets; it is the token's all the same, so a
    token starts no later than the one before ends. The tokens of one multi-byte character share its start.
    """
    starts, end = [], 0
    for start, stop in offsets:
        starts.append(max(min(start, end), starts[-1] if starts else 0))
        end = max(end, stop)
    return starts


def _answer_end(ids: list[int], first: int, control_ids: set[int]) -> int:
    """Token after the control token that ends an answer; texts spell none, so it is the first one."""
    for position in range(first, len(ids)):
        if ids[position] in control_ids:
            return position + 1
    raise DecoderError(
        "the chat template closes an answer with no control token, so the model could not learn to stop; "
        "give the decoder a template that ends each assistant message with its end-of-sequence token"
    )
