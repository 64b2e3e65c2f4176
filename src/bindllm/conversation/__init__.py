"""Conversations of text and media, and how they become token ids, a loss mask and a media index.

Every data format and every request becomes a `Conversation`. `render` turns it into tokens with the chat template of
the decoder's tokenizer, in one pass over the whole text, so that training and generation see the same tokens. The
media index routes media groups to tokens in the injection (`docs/architecture.md`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

from bindllm.conversation.guard import check_texts, check_unicode, guard, in_nfc, strings
from bindllm.conversation.template import REASONING, Template, control_tokens, squeeze
from bindllm.conversation.tokens import tokenize
from bindllm.errors import DecoderError, InputError, check_choice, listed
from bindllm.media import Media

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["system", "user", "assistant", "tool"]
Learned = Literal["all", "answer", "none"]
NO_MEDIA = -1
INPUT_HEADER = "\n\n### Input:\n"
"""Separates instruction and input in one user message, in the public Alpaca texts."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: the speaker.
        content: a text, or a sequence of parts, each a text or a `Media`; kept as a tuple of parts. The texts
            are put into Unicode form NFC, so that equal texts have equal tokens, and joined; media add no text.
        fields: further fields for the chat template: ``tool_calls`` and ``reasoning_content`` of an answer, ``name``
            and ``tool_call_id`` of a tool's result.
        learned: the part of an answer that training learns: all of it, all but its reasoning, or none.

    Raises:
        InputError: an unknown role, a part of another type, or a text that is not valid Unicode.

    Examples:
        >>> Message("user", "What is this?").text
        'What is this?'
    """

    role: Role
    content: str | Media | Sequence[str | Media]
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)
    learned: Learned = "all"

    def __post_init__(self) -> None:
        check_choice("role", self.role, get_args(Role))
        parts = (self.content,) if isinstance(self.content, (str, Media)) else self.content
        if not isinstance(parts, Sequence):
            raise InputError(f"the content of a message is a text or a list of parts, not {parts!r}")
        for part in parts:
            if not isinstance(part, (str, Media)):
                raise InputError(f"a part of a message is a text or a Media, not {part!r}")
            if isinstance(part, str):
                check_unicode(part)
        # The way to set a field of a frozen dataclass. Rows, requests and calls in Python all pass here.
        object.__setattr__(self, "content", tuple(in_nfc(part) for part in parts))
        object.__setattr__(self, "fields", in_nfc(self.fields))

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

    Args:
        messages: the turns.
        examples: number of user messages at the start that are worked examples, each with its answer. An example
            without media, or a question without media after them, listens to no media.
        tools: functions that the model may call, as OpenAI's API describes them, for the chat template.

    Raises:
        InputError: not a list of messages, or another number of examples than there can be.
    """

    messages: tuple[Message, ...]
    examples: int = 0
    tools: Sequence[Mapping[str, Any]] = field(default=(), hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.messages, Sequence) or not self.messages:
            raise InputError(f"a conversation is a list of at least one Message, not {self.messages!r}")
        object.__setattr__(self, "messages", tuple(self.messages))
        for message in self.messages:
            if not isinstance(message, Message):
                raise InputError(
                    f"a conversation holds {message!r}, which is not a Message; write Message('user', ...)"
                )
        if self.examples not in range((users := sum(m.role == "user" for m in self.messages)) + 1):
            raise InputError(f"examples is {self.examples}, and there are {users} user messages")

    @cached_property
    def media_groups(self) -> tuple[tuple[Media, ...], ...]:
        """One group per message that holds media; the media of one group are fused into one embedding."""
        return tuple(message.media for message in self.messages if message.media)


@dataclass(frozen=True)
class Rendered:
    """The tokens of a conversation.

    Args:
        media_index: the media group that the token listens to, or -1 everywhere without media, [T].
        answers: first token and token after the last of each answer to learn: the text of an assistant message and
            the token that ends it.
        whole: whether the tokens of each answer hold all its text. A template may put control tokens into an answer,
            or change its text.
        starts: the first character of each token in the rendered text, never decreasing, [T]. The tokens of one
            character share their start.
    """

    input_ids: list[int]
    media_index: list[int]
    answers: list[tuple[int, int]]
    whole: list[bool]
    starts: list[int]

    @property
    def supervised(self) -> list[bool]:
        """Whether each token belongs to an answer, [T]."""
        supervised = [False] * len(self.input_ids)
        for start, stop in self.answers:
            supervised[start:stop] = [True] * (stop - start)
        return supervised


def render(
    conversation: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = False,
    control_text: Literal["refuse", "escape"] = "refuse",
) -> Rendered:
    """Turn a conversation into tokens with the chat template of the tokenizer.

    The tokens before an answer are exactly those of its generation prompt, so that training and generation agree. If
    the tokenizer would join the end of the header with the first characters of the answer, the text is split there. Any
    other token that crosses a boundary between messages belongs to the side of its first character.

    Args:
        conversation: its texts are kept unchanged.
        control_text: how to handle a text that spells a control token such as ``<|im_end|>``, which would end the
            message: refuse it, or escape it with an invisible word joiner after its first character.

    Raises:
        DecoderError: no offsets, no chat template, or a template whose text cannot be mapped to messages.
        InputError: a control token in a text, a text that the template drops, or an answer joined with its header.

    Examples:
        >>> render(Conversation((Message("user", "Hi"),)), tokenizer).input_ids  # doctest: +SKIP
        [1, 9690, 198, ...]
    """
    check_tokenizer(tokenizer)
    _check_roles(messages := conversation.messages, add_generation_prompt=add_generation_prompt)
    # How to read this: messages -> text -> starts of answers in it -> tokens -> media index and answers as tokens.
    control, escape = control_tokens(tokenizer), control_text == "escape"
    given = [{**m.fields, "role": m.role, "content": m.text} for m in messages]
    turns, tools = (guard(value, control, escape=escape) for value in (given, list(conversation.tools)))
    check_texts(strings([turns, tools]), tokenizer)
    template = Template(tokenizer, turns, tools)
    text = template.text(header=add_generation_prompt)
    answer_starts = template.answer_starts(text, control)
    ids, starts = tokenize(tokenizer, text, answer_starts.values())
    control_ids = set(control.values())
    ends = [n for n, token in enumerate(ids) if token in control_ids]
    answers = {
        turn: _answer_span(template, turn, start, text, starts, ends) for turn, start in answer_starts.items()
    }
    spans, whole = [], []
    for turn, (first, stop) in answers.items():
        # An answer that is not learned is a part of the prompt.
        if messages[turn].learned != "none":
            start = answer_starts[turn]
            written = text[start : starts[stop - 1]]
            learned = bisect_left(starts, start + _num_masked(written, turns[turn], messages[turn].learned))
            spans.append((max(first, learned), stop))
            whole.append(_is_whole(written, turns[turn]))
    media_index = _media_index(conversation, template, text, starts, answers)
    return Rendered(ids, media_index, spans, whole, starts)


def _answer_span(
    template: Template, turn: int, start: int, text: str, starts: Sequence[int], ends: Sequence[int]
) -> tuple[int, int]:
    """Return the first token of an answer, and the token after the one that ends it."""
    first, message = bisect_left(starts, start), template.turns[turn]
    stop = _answer_end(ends, first)
    if "tool_calls" in message or not _is_whole(text[start : starts[stop - 1]], message):
        # The template may write control tokens into this answer; then it ends with the last one of the message.
        after = template.answer_stop(turn, text)
        if after is not None:
            return first, _answer_end(ends, first, bisect_left(starts, after))
        # In a prompt no answer is learned.
        if not template.has_header:
            raise template.lost(turn)
    return first, stop


def _media_index(
    conversation: Conversation,
    template: Template,
    text: str,
    starts: Sequence[int],
    answers: Mapping[int, tuple[int, int]],
) -> list[int]:
    """Return the media group that each token listens to, [T]."""
    (_, first_group), *changes = _group_changes(conversation)
    media_index = [first_group] * len(starts)
    for turn, group in changes:
        start = template.prefix_length(turn, text)
        if start is None and turn - 1 not in answers:
            raise template.lost(turn)
        # Some templates (Qwen3) render an answer differently once it is no longer the last one; then the next message
        # starts after its end token.
        first = answers[turn - 1][1] if start is None else bisect_left(starts, start)
        media_index[first:] = [group] * (len(starts) - first)
    return media_index


def _is_whole(written: str, turn: Mapping[str, Any]) -> bool:
    """Return whether the learned text of an answer holds all its text; a template writes calls after it."""
    content, rest = squeeze(turn["content"]), squeeze(written)
    return content in rest if "tool_calls" in turn else rest.endswith(content)


def _num_masked(written: str, turn: Mapping[str, Any], learned: Learned) -> int:
    """Return the number of characters of an answer up to the end of its reasoning, if that is not learned."""
    reasoning = turn.get(REASONING, "").strip() if learned == "answer" else ""
    if not reasoning:
        return 0
    # Before the text of the answer, which may repeat its thoughts. The template may drop those of earlier answers.
    before = written[: max(0, written.rfind(turn["content"].strip()))]
    found = before.rfind(reasoning)
    if found < 0 and squeeze(reasoning) in squeeze(before):
        raise InputError(
            "the chat template changes the reasoning of an answer, so it cannot be masked; learn or drop it"
        )
    return 0 if found < 0 else found + len(reasoning)


def _group_changes(conversation: Conversation) -> list[tuple[int, int]]:
    """Return the turns at which the media index changes, each with its group; the first is turn 0."""
    turns = [turn for turn, message in enumerate(conversation.messages) if message.media]
    groups = {turn: group for group, turn in enumerate(turns)}
    # Each worked example is a section, and so is the rest; without examples, all messages are one.
    users = [turn for turn, message in enumerate(conversation.messages) if message.role == "user"]
    sections = [0, *users[1 : conversation.examples + 1], len(conversation.messages)]
    changes = []
    for start, stop in pairwise(sections):
        own = [(turn, groups[turn]) for turn in range(start, stop) if turn in groups]
        # Everything in a section before its first group belongs to that group.
        changes += [(start, own[0][1] if own else NO_MEDIA), *own[1:]]
    return changes


def end_tokens(tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> list[int]:
    """Return the control tokens with which the chat template ends an answer; several if the last answer differs.

    Args:
        system: a system text that the template has to write, if any.

    Raises:
        DecoderError: the template cannot be used: an answer has no end, or its tokens are not its whole text.
    """
    ends, first = [], (Message("system", system),) if system else ()
    for conversation in (Conversation(first + _EXCHANGE.messages * count) for count in (1, 2)):
        try:
            rendered = render(conversation, tokenizer)
        except (InputError, DecoderError) as error:
            # Some templates allow a single exchange only.
            if ends:
                break
            raise DecoderError(str(error)) from error
        if not all(rendered.whole):
            raise DecoderError(
                f"the chat template of {tokenizer.name_or_path!r} puts control tokens into an answer or changes its "
                "text, so the model would learn only a part of it; use a template that writes an answer as it is, "
                "followed by its end token"
            )
        ends += [rendered.input_ids[stop - 1] for _, stop in rendered.answers]
    return list(dict.fromkeys(ends))


# The shortest conversation that shows how a template writes an answer.
_EXCHANGE = Conversation((Message("user", "?"), Message("assistant", "!")))


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that conversations can be rendered.

    Raises:
        DecoderError: no offsets, or no chat template.
    """
    if not tokenizer.is_fast:
        raise DecoderError(
            f"{type(tokenizer).__name__} has no character offsets, which the loss mask needs; "
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

    Some tokenizers list control tokens for which the weights have no row. That is harmless if neither padding nor the
    chat template uses them: texts cannot spell control tokens.

    Raises:
        DecoderError: tokens beyond the embedding; the message names them.
    """
    words = {token: i for token, i in tokenizer.get_vocab().items() if i >= num_embeddings}
    if not words:
        return
    # A short conversation shows which control tokens the template uses.
    used = {tokenizer.pad_token_id, tokenizer.eos_token_id, *render(_EXCHANGE, tokenizer).input_ids}
    control = set(control_tokens(tokenizer).values())
    # Texts may use every ordinary token, but no control token.
    beyond = sorted((i, token) for token, i in words.items() if i in used or i not in control)
    if beyond:
        named = listed([f"{token!r} ({i})" for i, token in beyond])
        raise DecoderError(
            f"the decoder has {num_embeddings:,} token embeddings, and its tokenizer has {len(beyond):,} tokens with "
            f"an id beyond them: {named}. Use the tokenizer that came with these weights; "
            "if only the padding token is named, remove pad_token from tokenizer_config.json"
        )


def _check_roles(messages: Sequence[Message], *, add_generation_prompt: bool) -> None:
    if messages[0].role == "assistant":
        raise InputError("the conversation starts with an answer; put a user message before it")
    if add_generation_prompt and messages[-1].role == "assistant":
        raise InputError(
            "the last message is already an answer; remove it or set add_generation_prompt=False"
        )


def _answer_end(ends: Sequence[int], first: int, after: int = 0) -> int:
    """Return the index after the control token that ends an answer.

    Args:
        after: the token after the message, if it may hold several control tokens. Else its first one is meant, since
            texts spell none.
    """
    found = bisect_left(ends, first)
    if found == len(ends):
        raise DecoderError(
            "the chat template ends an answer without a control token, so the model could not learn to stop; "
            "use a template that ends each assistant message with its end-of-sequence token"
        )
    return ends[max(found, bisect_left(ends, after) - 1)] + 1
