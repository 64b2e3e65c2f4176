"""The chat template of a tokenizer: the text of some messages, and the positions of the answers in it.

Templates are programs, and each family has its own. Nothing here depends on the family: everything is found by
rendering the messages before an answer, with and without the generation prompt. `tests/model/test_real_templates.py`
checks it on the templates of released models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from bindllm.errors import DecoderError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONING = "reasoning_content"
"""Field of a message with the thoughts before an answer, as chat templates call it."""

# The shortest conversation that shows how a template writes an answer, with texts that no template has of its own.
_EXCHANGE = ({"role": "user", "content": "(?)"}, {"role": "assistant", "content": "(!)"})

# Gives texts to a template that only reads lists of content parts.
_AS_PARTS = (
    "{%- set given = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- set parts = message['content'] -%}"
    "{%- if parts is string -%}{%- set parts = [{'type': 'text', 'text': parts}] -%}{%- endif -%}"
    "{%- set given.messages = given.messages + [dict(message, content=parts)] -%}"
    "{%- endfor -%}{%- set messages = given.messages -%}"
)


class Template:
    """The chat template of a tokenizer, applied to the first of these messages, or to all of them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.tokenizer, self.turns, self.tools = tokenizer, list(turns), list(tools)
        self.has_header = False
        self._texts: dict[tuple[int, bool, bool], str] = {}

    def apply(self, count: int, *, header: bool = False, thinks: bool = False) -> str:
        """Return the text of the first messages, each rendered once.

        Args:
            thinks: let the model think before an answer, if the template leaves the choice.

        Raises:
            InputError: the template refuses these messages.
        """
        # jinja2 comes with every tokenizer that has a template; imported here to keep `import bindllm` instant.
        from jinja2 import TemplateError

        key = count, header, thinks
        if key not in self._texts:
            try:
                # Families that can think aloud (Qwen3) write an empty thought in front of an answer if they must not.
                self._texts[key] = self.tokenizer.apply_chat_template(
                    self.turns[:count],
                    tools=self.tools or None,
                    tokenize=False,
                    add_generation_prompt=header,
                    enable_thinking=thinks,
                )
            # A template may add texts to fields that a message lacks.
            except (TemplateError, TypeError) as error:
                roles = ", ".join(turn["role"] for turn in self.turns[:count])
                raise InputError(f"{self} refuses messages of the roles {roles}: {error}") from error
        return self._texts[key]

    def text(self, *, header: bool) -> str:
        """Return the text of all messages, in which the tokens before the last answer are its generation prompt.

        Raises:
            InputError: the template drops a text, or writes other tokens before the last answer.
        """
        self.has_header = header
        text, last = self.apply(len(self.turns), header=header), len(self.turns) - 1
        self._check_written(text)
        if header or self.turns[last]["role"] != "assistant":
            return text
        prompt = self.apply(last, header=True)
        if not text.startswith(prompt):
            # Gemma 4 and DeepSeek R1 leave the end of the prompt, an empty thought or its start, out of conversations.
            start = None if self.turns[last].get(REASONING) else self.answer_start(last, text)
            if start is None or not prompt.startswith(text[:start]):
                raise self.lost(last)
            text = prompt + text[start:]
        return text

    def prefix_length(
        self, count: int, text: str, *, header: bool = False, thinks: Sequence[bool] = (False,)
    ) -> int | None:
        """Return where the first messages (and the header of an answer) end in the text; None: it starts otherwise."""
        for thinking in thinks:
            prefix = self.apply(count, header=header, thinks=thinking)
            if text.startswith(prefix):
                return len(prefix)
        # Templates that rewrite earlier messages start differently; the position is unknown then.
        return None

    def answer_start(self, turn: int, text: str) -> int | None:
        """Return where an answer starts in the text; None: it was not found."""
        # Only the last answer may have an empty thought in front; earlier headers are those of a thinking model.
        thinks = (False, True) if "enable_thinking" in self.tokenizer.get_chat_template() else (False,)
        start = self.prefix_length(turn, text, header=True, thinks=thinks)
        before = self.prefix_length(turn, text) if start is None else None
        if before is None:
            return start
        if not (content := self.turns[turn]["content"].strip()):
            found = self._around_calls(turn, text)
            return found and found[0]
        # The text lacks the end of the header, an empty thought (Qwen3.5, Gemma 4): the answer starts within.
        prompt = self.apply(turn, header=True)
        positions = (at for at in range(len(prompt), before - 1, -1) if text[before:at] == prompt[before:at])
        return next((at for at in positions if text.startswith(content, at)), None)

    def answer_stop(self, turn: int, text: str) -> int | None:
        """Return where the message of an answer ends in the text; None: it was not found."""
        if turn == len(self.turns) - 1:
            return len(text)
        stop = self.prefix_length(turn + 1, text)
        if stop is None and (found := self._around_calls(turn, text)):
            stop = found[1]
        return stop

    def _around_calls(self, turn: int, text: str) -> tuple[int, int] | None:
        """Return where tool calls start and end, found by an answer of text in their place."""
        plain = {"role": "assistant", "content": "!"}
        other = Template(self.tokenizer, [*self.turns[:turn], plain, *self.turns[turn + 1 :]], self.tools)
        with suppress(InputError):
            instead = other.apply(len(self.turns), header=self.has_header)
            # A template may drop the results of calls that were not made.
            other._check_written(instead)
            start = other.answer_start(turn, instead)
            if start is not None and text[:start] == instead[:start]:
                rest = instead[start:].removeprefix("!")
                return (start, len(text) - len(rest)) if text.endswith(rest) else None
        return None

    def answer_starts(self, text: str, control: Iterable[str]) -> dict[int, int]:
        """Return the start of each answer in the text, by its message.

        Raises:
            InputError, DecoderError: an answer was not found.
        """
        answers = [turn for turn, message in enumerate(self.turns) if message["role"] == "assistant"]
        starts: dict[int, int | None] = {}
        if answers and answers[-1] == len(self.turns) - 1:
            # See `text`.
            turn = answers.pop()
            starts[turn] = len(self.apply(turn, header=True))
        if answers:
            # The first answer is located by rendering, which also shows the header of the others.
            starts[answers[0]] = first = self.answer_start(answers[0], text)
            end = starts.get(len(self.turns) - 1, len(text) if self.has_header else None)
            found = [] if first is None else self._after_headers(answers[0], first, text, end, control)
            # A template may write the header of some answers differently, or of other messages alike.
            if len(found) == len(answers) - 1:
                starts |= zip(answers[1:], found, strict=True)
            else:
                starts |= {turn: self.answer_start(turn, text) for turn in answers[1:]}
        for turn, start in starts.items():
            if start is None:
                raise self.lost(turn)
        return {turn: starts[turn] for turn in sorted(starts)}

    def _after_headers(
        self, turn: int, first: int, text: str, end: int | None, control: Iterable[str]
    ) -> list[int]:
        """Return the ends of further headers that are like that of the first answer, before the last header.

        Rendering the messages before every single answer takes quadratic time. A header with a control token can be
        searched for instead: no message spells one.
        """
        before = self.prefix_length(turn, text)
        header = "" if before is None else text[before:first]
        if not any(token in header for token in control):
            return []
        # The last answer, or the generation prompt, has a header of its own.
        stop = len(text) if end is None else text.rfind(header, 0, end)
        return [
            match.end() for match in re.finditer(re.escape(header), text[:stop]) if match.start() >= first
        ]

    def _check_written(self, text: str) -> None:
        """Refuse a template that drops a question, a system text, a tool or a tool call; answers are compared later."""
        written, missing = squeeze(text), ""
        for turn in self.turns:
            # Templates may change white space, take the thoughts out of earlier answers, and write a result as JSON.
            forms = turn["content"], json.dumps(turn["content"], ensure_ascii=False)[1:-1]
            if turn["role"] != "assistant" and not any(squeeze(form) in written for form in forms):
                missing = f"the text of a {turn['role']} message"
        # Templates drop the thoughts of earlier answers, as in generation.
        if squeeze(self.turns[-1].get(REASONING, "")) not in written:
            missing = "the reasoning of an answer"
        for tool in self.tools:
            if (name := tool.get("function", tool)["name"]) not in text:
                missing = f"the tool {name!r}"
        if any("tool_calls" in turn for turn in self.turns):
            # Each template writes calls in a form of its own, so only their absence shows.
            bare = [{"role": turn["role"], "content": turn["content"]} for turn in self.turns]
            with suppress(InputError):
                if (
                    Template(self.tokenizer, bare, self.tools).apply(len(bare), header=self.has_header)
                    == text
                ):
                    missing = "the tool calls of an answer"
        if missing:
            raise InputError(f"{self} does not write {missing}; use another template, or remove it")

    def lost(self, turn: int) -> InputError | DecoderError:
        """Return the error about an answer whose tokens cannot be told from those of other messages."""
        drop = "drop them (reasoning: drop)"
        if "enable_thinking" in self.tokenizer.get_chat_template():
            drop += ", or set decoder.template_options: {enable_thinking: true}"
        for field, part, way in (
            (REASONING, "thoughts", drop),
            ("tool_calls", "tool calls", "remove them, or use another template"),
        ):
            if self.turns[turn].get(field):
                return InputError(
                    f"{self} does not write the {part} of message {turn + 1} after its generation prompt, so the model "
                    f"could not learn to write them; {way}"
                )
        return DecoderError(
            f"{self} renders the messages before message {turn + 1} differently once it follows, so tokens cannot be "
            "mapped to messages; use a template that does not rewrite earlier messages"
        )

    def __str__(self) -> str:
        return f"the chat template of {self.tokenizer.name_or_path!r}"


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the control tokens of a tokenizer, such as ``<|im_end|>``, with their ids."""
    return {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def adapt_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Change the chat template of a tokenizer where it does not serve conversations of text.

    - A template that only reads lists of content parts (SmolVLM, LLaVA) gets texts as such lists.
    - Control tokens between the header of each answer and its text become a part of the generation prompt. Harmony
      (gpt-oss) opens the final channel there.
    - If an answer ends with the first token of the next message (GLM-4), the last answer gets that token too.
    """
    plain, control = tokenizer.chat_template, control_tokens(tokenizer)
    if _written(tokenizer, 1) is None:
        tokenizer.chat_template = _AS_PARTS + plain
        if _written(tokenizer, 1) is None:
            # It is refused later, with the reason.
            tokenizer.chat_template = plain
            return
    (lead, _, end), two = _written(tokenizer, 1), _written(tokenizer, 2)
    if any(token in lead for token in control):
        tokenizer.chat_template += _at_the_end("add_generation_prompt", lead)
    if two is not None and not any(token in end for token in control):
        following = two[2].lstrip()
        if first := max((token for token in control if following.startswith(token)), key=len, default=""):
            asked = "not (add_generation_prompt or messages[-1]['role'] != 'assistant' or messages[-1]['tool_calls'])"
            tokenizer.chat_template += _at_the_end(asked, two[2][: len(two[2]) - len(following)] + first)


def _written(tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[str, str, str] | None:
    """Return the text of some exchanges after the first header: before the first answer, the answer, and the rest.

    Returns:
        None if the template refuses them, does not write a text, or writes the header in another way.
    """
    template = Template(tokenizer, _EXCHANGE * count)
    with suppress(InputError):
        text = template.apply(2 * count)
        start = template.prefix_length(1, text, header=True)
        question, answer = (turn["content"] for turn in _EXCHANGE)
        if question in text and answer in text:
            return (
                ("", answer, text.partition(answer)[2]) if start is None else text[start:].partition(answer)
            )
    return None


def _at_the_end(condition: str, text: str) -> str:
    # Jinja reads an escape of JSON for half of an emoji as a character of its own.
    return f"{{%- if {condition} -%}}{{{{- {json.dumps(text, ensure_ascii=False)} -}}}}{{%- endif -%}}"


def squeeze(text: str) -> str:
    """Return a text without white space, which templates may change."""
    return "".join(text.split())
