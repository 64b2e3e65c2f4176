"""Conversations of text and media, and how they become token ids, a loss mask and a media index.

Every data format and every request becomes a `Conversation`. `render` turns it into tokens with the chat template of
the decoder's tokenizer, in one pass over the whole text, so that training and generation see the same tokens. The
media index routes media groups to tokens in the injection (`docs/architecture.md`).
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

from bindllm.conversation.guard import check_texts, check_unicode, guard, strings
from bindllm.conversation.tokens import tokenize
from bindllm.errors import DecoderError, InputError, check_choice, listed
from bindllm.media import Media

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Role = Literal["system", "user", "assistant", "tool"]
Learned = Literal["all", "answer", "none"]
REASONING = "reasoning_content"
"""Field of a message with the thoughts before an answer, as chat templates call it."""

NO_MEDIA = -1
INPUT_HEADER = "\n\n### Input:\n"
"""Separates instruction and input in one user message, in the public Alpaca texts."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: the speaker.
        content: a text, or a sequence of parts, each a text or a `Media`; kept as a tuple of parts. The texts
            are joined unchanged; media add no text.
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
        # The way to set a field of a frozen dataclass.
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
        input_ids: token ids, [T].
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
        tokenizer: a fast tokenizer with a chat template.
        add_generation_prompt: end with the header of an assistant message, ready for generation.
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
    template = _Template(tokenizer, tools)
    text = template.complete_header(turns, template.apply(turns, header=add_generation_prompt))
    template.check_written(turns, text, header=add_generation_prompt)
    answer_starts = _answer_starts(template, turns, text, control)
    ids, starts = tokenize(tokenizer, text, answer_starts.values())
    answers, spans, whole, control_ids = {}, [], [], set(control.values())
    for turn, start in answer_starts.items():
        first = bisect_left(starts, _found(start, turn, tokenizer))
        answers[turn] = first, stop = first, _answer_end(ids, first, control_ids)
        # An answer that is not learned is a part of the prompt.
        if messages[turn].learned != "none":
            written = text[start : starts[stop - 1]]
            learned = bisect_left(starts, start + _num_masked(written, turns[turn], messages[turn].learned))
            spans.append((max(first, learned), stop))
            whole.append(_is_whole(written, turns[turn]))
    (_, first_group), *changes = _group_changes(conversation)
    media_index = [first_group] * len(ids)
    for turn, group in changes:
        start = template.prefix_length(turns[:turn], text)
        # Some templates (Qwen3) render an answer differently once it is no longer the last one; then the next message
        # starts after its end token.
        after = answers.get(turn - 1, (0, None))[1]
        first = _found(after, turn, tokenizer) if start is None else bisect_left(starts, start)
        media_index[first:] = [group] * (len(ids) - first)
    return Rendered(ids, media_index, spans, whole, starts)


def _is_whole(written: str, turn: Mapping[str, Any]) -> bool:
    """Return whether the learned text of an answer holds all its text; a template writes calls after it."""
    content, rest = _squeeze(turn["content"]), _squeeze(written)
    return content in rest if "tool_calls" in turn else rest.endswith(content)


def _num_masked(written: str, turn: Mapping[str, Any], learned: Learned) -> int:
    """Return the number of characters of an answer up to the end of its reasoning, if that is not learned."""
    reasoning = turn.get(REASONING, "").strip() if learned == "answer" else ""
    if not reasoning:
        return 0
    # Before the text of the answer, which may repeat its thoughts. The template may drop those of earlier answers.
    before = written[: max(0, written.rfind(turn["content"].strip()))]
    found = before.rfind(reasoning)
    if found < 0 and _squeeze(reasoning) in _squeeze(before):
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


def _squeeze(text: str) -> str:
    return "".join(text.split())


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the control tokens of a tokenizer, such as ``<|im_end|>``, with their ids."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def end_tokens(tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> list[int]:
    """Return the control tokens with which the chat template ends an answer; several if the last answer differs.

    Args:
        tokenizer: with a chat template.
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


def answer_lead(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the control tokens that a template writes between the header of each answer and its text; often none.

    Harmony (gpt-oss) opens the final channel there. As a part of the generation prompt, it leaves the text to learn.
    """
    template, turns = (
        _Template(tokenizer, []),
        [{"role": m.role, "content": m.text} for m in _EXCHANGE.messages],
    )
    text, start = template.apply(turns, header=False), None
    with suppress(InputError):
        start = template.prefix_length(turns[:1], text, header=True)
    lead = "" if start is None else text[start : text.rfind(turns[1]["content"])]
    return lead if any(token in lead for token in control_tokens(tokenizer)) else ""


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Make sure that a decoder has an embedding for every token that can occur.

    Some tokenizers list control tokens for which the weights have no row. That is harmless if neither padding nor the
    chat template uses them: texts cannot spell control tokens.

    Args:
        tokenizer: with a chat template.
        num_embeddings: rows of the decoder's token embedding.

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


class _Template:
    """The chat template of a tokenizer, for conversations with these tools."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]]) -> None:
        self.tokenizer, self._tools = tokenizer, tools

    def apply(self, turns: list[dict[str, Any]], *, header: bool, thinks: bool = False) -> str:
        """Return the text of messages."""
        # jinja2 comes with every tokenizer that has a template; imported here to keep `import bindllm` instant.
        from jinja2 import TemplateError

        try:
            # Families that can think aloud (Qwen3) write an empty thought in front of an answer if they must not.
            return self.tokenizer.apply_chat_template(
                turns,
                tools=self._tools or None,
                tokenize=False,
                add_generation_prompt=header,
                enable_thinking=thinks,
            )
        # A template may add texts to fields that a message lacks.
        except (TemplateError, TypeError) as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise InputError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses messages of the roles {roles}: {error}"
            ) from error

    def prefix_length(self, turns: list[dict[str, Any]], text: str, *, header: bool = False) -> int | None:
        """Return where the first messages (and the header of an answer) end in the text; None: it starts otherwise."""
        # Only the last answer may have an empty thought in front; earlier headers are those of a thinking model.
        for thinks in (False, True) if header and _can_think(self.tokenizer) else (False,):
            prefix = self.apply(turns, header=header, thinks=thinks)
            if text.startswith(prefix):
                return len(prefix)
        # Templates that rewrite earlier messages start differently; the position is unknown then.
        return None

    def answer_start(self, turns: list[dict[str, Any]], turn: int, text: str) -> int | None:
        """Return where an answer starts in the text; None: it was not found."""
        start, before = self.prefix_length(turns[:turn], text, header=True), None
        content = turns[turn]["content"].strip()
        if start is None and content:
            before = self.prefix_length(turns[:turn], text)
        if before is None:
            return start
        # The text lacks the end of the header, an empty thought (Qwen3.5, Gemma 4): the answer starts within.
        prompt = self.apply(turns[:turn], header=True)
        places = (at for at in range(len(prompt), before - 1, -1) if text[before:at] == prompt[before:at])
        return next((at for at in places if text.startswith(content, at)), None)

    def complete_header(self, turns: list[dict[str, Any]], text: str) -> str:
        """Give the last answer the whole header of its generation prompt: Gemma 4 leaves out the end of it."""
        if turns[-1]["role"] != "assistant" or not _can_think(self.tokenizer):
            return text
        start, prompt = self.answer_start(turns, len(turns) - 1, text), self.apply(turns[:-1], header=True)
        return text if start is None or not prompt.startswith(text[:start]) else prompt + text[start:]

    def check_written(self, turns: list[dict[str, Any]], text: str, *, header: bool) -> None:
        """Refuse a template that drops a question, a system text, a tool or a tool call; answers are compared later."""
        written, missing = _squeeze(text), ""
        for turn in turns:
            # Templates may change white space, take the thoughts out of earlier answers, and write a result as JSON.
            forms = turn["content"], json.dumps(turn["content"], ensure_ascii=False)[1:-1]
            if turn["role"] != "assistant" and not any(_squeeze(form) in written for form in forms):
                missing = f"the text of a {turn['role']} message"
        # Templates drop the thoughts of earlier answers, as in generation.
        if _squeeze(turns[-1].get(REASONING, "")) not in written:
            missing = "the reasoning of an answer"
        for tool in self._tools:
            if (name := tool.get("function", tool)["name"]) not in text:
                missing = f"the tool {name!r}"
        if any("tool_calls" in turn for turn in turns):
            # Each template writes calls in a form of its own, so only their absence shows.
            bare = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
            with suppress(InputError):
                missing = (
                    "the tool calls of an answer" if self.apply(bare, header=header) == text else missing
                )
        if missing:
            raise InputError(
                f"the chat template of {self.tokenizer.name_or_path!r} does not write {missing}; use another template, "
                "or remove it"
            )


def _can_think(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "enable_thinking" in tokenizer.get_chat_template()


def _answer_starts(
    template: _Template, turns: list[dict[str, Any]], text: str, control: Iterable[str]
) -> dict[int, int | None]:
    """Return the start of each answer in the text, by its turn; None if it was not found."""
    answers = [turn for turn, message in enumerate(turns) if message["role"] == "assistant"]
    # The first answer is located by rendering, which also shows the header of all others.
    starts = {turn: template.answer_start(turns, turn, text) for turn in answers[:1]}
    others = answers[1:]
    if len(answers) > 2 and (first := starts[answers[0]]) is not None:
        # Rendering the messages before every single answer takes quadratic time. A header with a control token can be
        # searched for instead: no message spells one.
        before = template.prefix_length(turns[: answers[0]], text)
        header = "" if before is None else text[before:first]
        if any(token in header for token in control):
            ends = [match.end() for match in re.finditer(re.escape(header), text) if match.start() >= first]
            # A header at the very end is the generation prompt.
            ends = [end for end in ends if end < len(text)]
            if len(ends) == len(answers) - 1:
                starts |= dict(zip(answers[1:], ends, strict=True))
                # The header of the last answer may differ, see `_Template.prefix_length`.
                others = answers[-1:] if _can_think(template.tokenizer) else []
    return starts | {turn: template.answer_start(turns, turn, text) for turn in others}


def _found(position: int | None, turn: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the start of a message, or raise if it was not found."""
    if position is None:
        raise DecoderError(
            f"the chat template of {tokenizer.name_or_path!r} renders the messages before message {turn + 1} "
            "differently once it follows, so tokens cannot be mapped to messages; use a template that does not "
            "rewrite earlier messages"
        )
    return position


def _answer_end(ids: list[int], first: int, control_ids: set[int]) -> int:
    """Return the token after the control token that ends an answer: the first one, since texts spell none."""
    for position in range(first, len(ids)):
        if ids[position] in control_ids:
            return position + 1
    raise DecoderError(
        "the chat template ends an answer without a control token, so the model could not learn to stop; "
        "use a template that ends each assistant message with its end-of-sequence token"
    )
