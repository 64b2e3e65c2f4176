"""Conversations of text and media, and how they become token ids, a loss mask and a media index.

Every data format and every request becomes a `Conversation`. `render` turns it into tokens through the chat
template of the decoder's tokenizer, in one pass over the whole text, so that no token is cut differently in
training and in generation. The media index is the routing rule of the injection (`docs/architecture.md`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, get_args

from bindllm.errors import DecoderError, InputError, known_names
from bindllm.media import Media

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["system", "user", "assistant"]

WORD_JOINER = "\u2060"
NO_MEDIA = -1


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
            raise InputError(f"unknown role {self.role!r}. {known_names(str(self.role), get_args(Role))}")
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
    """The tokens of a conversation; the three lists have one entry per token.

    Args:
        input_ids: token ids.
        supervised: true for what the model shall learn to say: the text of each assistant message and the
            token that ends it.
        media_index: the media group that speaks to the token, or -1 everywhere when there is no media.
    """

    input_ids: list[int]
    supervised: list[bool]
    media_index: list[int]


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
    _check_tokenizer(tokenizer)
    messages = conversation.messages
    _check_roles(messages, answer_follows=answer_follows)
    control = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    defuse = control_text == "defuse"
    turns = [{"role": m.role, "content": _guard(m.text, control, defuse=defuse)} for m in messages]
    text = _apply_template(tokenizer, turns, header=answer_follows)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, starts = encoded["input_ids"], _token_starts(encoded["offset_mapping"])

    def first_token(turn: int, *, header: bool = False) -> int | None:
        """First token after the first ``turn`` messages (and the header of an answer)."""
        prefix = _apply_template(tokenizer, turns[:turn], header=header)
        return bisect_left(starts, len(prefix)) if text.startswith(prefix) else None

    supervised = [False] * len(ids)
    media_index = [0 if conversation.media_groups else NO_MEDIA] * len(ids)
    group, answer_end, control_ids = -1, None, set(control.values())
    for turn, message in enumerate(messages):
        if message.media:
            group += 1
            # Everything ahead of the first group belongs to it already. Some templates (Qwen3) render an answer
            # differently once it is no longer the last one; what follows it starts after its end token.
            if group > 0:
                first = first_token(turn)
                first = _found(answer_end if first is None else first, turn, tokenizer)
                media_index[first:] = [group] * (len(ids) - first)
        answer_end = None
        if message.role == "assistant":
            first = _found(first_token(turn, header=True), turn, tokenizer)
            answer_end = _answer_end(ids, first, control_ids)
            supervised[first:answer_end] = [True] * (answer_end - first)
    return Rendered(ids, supervised, media_index)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text {text!r} is not valid Unicode (half of a surrogate pair)") from error


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.is_fast:
        raise DecoderError(
            f"{type(tokenizer).__name__} gives no character offsets, which the loss mask needs; "
            "use a decoder folder with a tokenizer.json (a fast tokenizer)"
        )
    if not tokenizer.chat_template:
        raise DecoderError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruction-tuned "
            "decoder, or put a chat_template.jinja into its folder"
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
