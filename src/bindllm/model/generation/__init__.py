"""Generation: prompts and media in, text out, for one prompt, a padded batch, or as a stream.

`answer_settings` and `generate_options` are the only source of generation settings. Requests, evaluation, rollouts and
exported folders all use them: the settings that a decoder's folder recommends belong to the plain decoder.
"""

from __future__ import annotations

import math
import reprlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from bindllm.conversation import NO_MEDIA, Conversation, Message, control_tokens, end_tokens, render
from bindllm.conversation.messages import FILE_MODALITIES
from bindllm.conversation.references import read_conversation
from bindllm.embeddings.embedder import GroupEmbeddings
from bindllm.encoders import Encoder
from bindllm.errors import InputError, did_you_mean
from bindllm.media import Media, check_media
from bindllm.shots import few_shot_prompts, pair_shots

Prompt = str | Conversation | Sequence[Mapping[str, Any]]
"""A question, a conversation, or OpenAI-style messages."""
MAX_NEW_TOKENS = 128
# Decoders of text write it for bytes that are not a whole character.
_INCOMPLETE = "\ufffd"
# Tokens that are decoded together while an answer arrives.
_SHORTEST_WINDOW, _LONGEST_WINDOW = 4, 12

# Options that only sampling uses: giving one of them switches sampling on.
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p")
_RANGES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "temperature": (Real, lambda x: 0 < x < math.inf, "a number above 0; leave it out to be greedy"),
    # transformers takes any other number for no limit.
    "top_p": (Real, lambda x: 0 < x <= 1, "more than 0 and at most 1"),
    "min_probability": (Real, lambda x: 0 <= x <= 1, "0 to 1"),
    "seed": (Integral, lambda x: -(2**63) <= x < 2**64, "a whole number of at most 64 bits"),
}
# Options that are not fields of a GenerationConfig: those of Hugging Face `generate`, and ours.
_MORE_OPTIONS = (
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "seed",
    "min_probability",
)
# Fields of a GenerationConfig without effect here: transformers moved these searches into code on the hub, which is
# never run, or they change the prompt, or they ask for tensors while `generate` returns text.
_WITHOUT_EFFECT = (
    *("penalty_alpha", "num_beam_groups", "diversity_penalty", "dola_layers", "constraints"),
    *("force_words_ids", "token_healing", "return_dict_in_generate", "output_scores", "output_logits"),
    *("output_attentions", "output_hidden_states"),
)


def answer_settings(decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return the generation config of a decoder that answers conversations.

    An answer ends with the token that the chat template teaches. Other end tokens of the decoder's folder hold too if
    they are control tokens, such as those of a tool call. All else that the folder recommends (penalties, beams,
    sampling, suppressed tokens) is dropped, so without options an answer is greedy.

    Raises:
        DecoderError: the chat template does not end an answer with a control token.
    """
    own, control = decoder.generation_config.eos_token_id, control_tokens(tokenizer).values()
    # A default of the config class may be an ordinary word of this vocabulary.
    further = [token for token in (own if isinstance(own, list) else [own]) if token in control]
    return GenerationConfig(
        bos_token_id=decoder.generation_config.bos_token_id,
        eos_token_id=list(dict.fromkeys([*end_tokens(tokenizer), *further])),
        pad_token_id=tokenizer.pad_token_id,
    )


def generate_options(options: dict[str, Any], *, width: int, positions: int | None) -> dict[str, Any]:
    """Return the options of one call of Hugging Face ``generate``.

    Args:
        positions: tokens that the decoder can read, or None if it has no limit. An answer ends there at the latest.

    Raises:
        InputError: the prompt leaves no position for an answer.
    """
    # The library's default would sample from 50 tokens only.
    options = {"top_k": 0, **options} if options.get("do_sample") else dict(options)
    if positions is None:
        return options
    if width >= positions:
        raise InputError(
            f"the prompt has {width:,} tokens, and the decoder has {positions:,} positions for prompt and answer: "
            "shorten the prompt"
        )
    if options.get("max_length") is not None:
        return {**options, "max_length": min(options["max_length"], positions)}
    longest = options.get("max_new_tokens") or MAX_NEW_TOKENS
    return {**options, "max_new_tokens": min(longest, positions - width)}


def shots_limit(options: dict[str, Any], positions: int | None) -> int | None:
    """Return how many tokens a prompt with shots may have: the decoder's positions less the longest answer.

    Args:
        options: the caller's options, as `check_options` returns them. With ``max_length``, the prompt ends before it.
        positions: tokens that the decoder can read; None: it has no limit.
    """
    if (length := options.get("max_length")) is not None:
        return length - 1 if positions is None else min(length, positions) - 1
    # Of a shorter answer, the length would depend on the number of shots.
    return (
        None if positions is None else max(0, positions - (options.get("max_new_tokens") or MAX_NEW_TOKENS))
    )


def is_one(prompt: Any) -> bool:
    """Return whether this is a single prompt; a list of messages is one."""
    if isinstance(prompt, list | tuple) and prompt:
        return all(isinstance(message, Mapping) for message in prompt)
    return isinstance(prompt, str | Conversation)


def part_modalities(encoders: Sequence[Encoder]) -> tuple[str, ...]:
    """Return the modalities that parts of messages may name; a text part is words of the prompt."""
    served = {name for encoder in encoders for name in encoder.modalities} - {"text"}
    return tuple(dict.fromkeys((*FILE_MODALITIES, *sorted(served))))


def as_conversations(
    prompt: Prompt | Sequence[Prompt],
    media: Sequence[Any] | None,
    *,
    modalities: Collection[str] = FILE_MODALITIES,
) -> list[Conversation]:
    """Pair a prompt with its media, or each of several prompts with its own.

    Raises:
        InputError: no prompt, one of another type, another number of media rows than prompts, media that are no
            `Media`, messages that cannot be used, or media for a `Conversation`, which holds its own.
    """
    # How to read this: one prompt becomes a batch of one, then every prompt gets its row of media.
    if is_one(prompt):
        prompt, media = [prompt], [() if media is None else media]
    if not isinstance(prompt, list | tuple) or not all(map(is_one, prompt)):
        raise InputError(
            f"a prompt is a text, a Conversation, messages (dicts with role and content), or a list of them, not "
            f"{reprlib.repr(prompt)}"
        )
    if not prompt:
        raise InputError("no prompt was given")
    rows = [()] * len(prompt) if media is None else [check_media(row) for row in media]
    if len(rows) != len(prompt):
        raise InputError(
            f"{len(prompt)} prompts but {len(rows)} rows of media: give one list of media per prompt"
        )
    conversations = []
    for item, row in zip(prompt, rows, strict=True):
        if isinstance(item, Conversation):
            if row:
                raise InputError(
                    "a Conversation holds its own media: put them into its messages, not into media="
                )
            conversations.append(item)
        elif isinstance(item, str):
            # The order of media and text does not matter: the injection listens by message, not by position.
            conversations.append(Conversation((Message("user", [*row, item]),)))
        else:
            conversations.append(read_conversation(item, row, modalities=modalities))
    return conversations


def check_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a generation with the defaults filled in: greedy, unless one asks for sampling.

    Raises:
        InputError: a name is unknown to Hugging Face or has no effect here, or a number is out of its range.
    """
    # A whole config is the same as its fields; further options win over it.
    config = options.get("generation_config") or GenerationConfig()
    fields = {name: value for name, value in vars(config).items() if value is not None and name[0] != "_"}
    options = {**fields, **{name: value for name, value in options.items() if name != "generation_config"}}
    options.pop("transformers_version", None)
    # Private names and the version describe a stored config.
    named = (name for name in GenerationConfig().to_dict() if not name.startswith("_"))
    known = {*named, *_MORE_OPTIONS} - {*_WITHOUT_EFFECT, "transformers_version"}
    for name, value in options.items():
        if name in _WITHOUT_EFFECT:
            raise InputError(f"the option {name} has no effect on the text of an answer here: remove it")
        if name not in known:
            raise InputError(f"unknown option {name!r} of generate. {did_you_mean(name, known)}")
        is_count = name in ("max_new_tokens", "num_beams", "num_return_sequences") and value is not None
        if is_count and not (isinstance(value, int) and value >= 1):
            raise InputError(f"{name} is {value!r}, expected a whole number of at least 1")
    for name, (kind, fits, expected) in _RANGES.items():
        # A truth value is a number too, and a range excludes NaN.
        if (value := options.get(name)) is not None and not (
            isinstance(value, kind) and not isinstance(value, bool) and fits(value)
        ):
            raise InputError(f"{name} is {value!r}, expected {expected}")
    if (stops := options.pop("stop_strings", None)) is not None:
        stops = [stops] if isinstance(stops, str) else list(stops)
        # An empty text is found at once, and would make every answer empty.
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise InputError(f"stop_strings is {stops}, expected texts of at least one character")
        options |= {"stop_strings": stops} if stops else {}
    defaults: dict[str, Any] = {"do_sample": any(options.get(name) is not None for name in _SAMPLING)}
    if options.get("max_length") is None:
        defaults["max_new_tokens"] = MAX_NEW_TOKENS
    return {**defaults, **options}


def check_stream(prompt: Any, options: Mapping[str, Any]) -> None:
    """Refuse a stream of anything but one answer whose pieces are final.

    Raises:
        InputError: several prompts or answers, beams, which may replace printed tokens, or ``min_probability``.
    """
    several = any((options.get(name) or 1) > 1 for name in ("num_beams", "num_return_sequences"))
    if not is_one(prompt) or several or options.get("min_probability"):
        raise InputError(
            "a stream is one answer to one prompt, without num_beams, num_return_sequences and min_probability. Use "
            "generate"
        )


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Give the random numbers of a seed to the block, and leave the global state as it was; None: change nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def render_prompts(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor, Tensor]:
    """Render conversations up to the header of the answer: input ids, attention mask and media index, each [B, T]."""
    # Control tokens in a prompt are escaped: text from outside must not end its turn.
    rendered = [
        render(c, tokenizer, add_generation_prompt=True, control_text="escape") for c in conversations
    ]
    width = max(len(row.input_ids) for row in rendered)

    def pad(rows: list[list[int]], filler: int) -> Tensor:
        # Padding on the left: the next token follows the last column of every row.
        return torch.tensor([[filler] * (width - len(row)) + row for row in rows])

    ids = [row.input_ids for row in rendered]
    return (
        pad(ids, tokenizer.pad_token_id),
        pad([[1] * len(row) for row in ids], 0),
        # Padding listens to no media.
        pad([row.media_index for row in rendered], NO_MEDIA),
    )


def prepare_batch(
    prompt: Prompt | Sequence[Prompt],
    media: Sequence[Any] | None,
    shots: Sequence[Any] | None,
    *,
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase,
    encode: Callable[[Sequence[Sequence[Media]]], GroupEmbeddings],
    modalities: Collection[str] = FILE_MODALITIES,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Render prompts and embed their media.

    Args:
        limit: maximum number of tokens of a prompt with its shots, see `few_shot_prompts`.
        encode: returns an embedding for each media group, [N, E], and perhaps tokens, [N, n, C].

    Returns:
        ids, mask and media index, each [B, T]; embeddings [B, M, E], or None without media; tokens [B, M, n, C], or
        None.
    """
    conversations = as_conversations(prompt, media, modalities=modalities)
    rows = pair_shots(shots, len(conversations))
    conversations = few_shot_prompts(conversations, rows, tokenizer, limit)
    groups = [conversation.media_groups for conversation in conversations]
    batch = render_prompts(conversations, tokenizer)
    if not any(groups):
        return *batch, None, None
    # All groups of the batch in one call, each once, as prompts may share their shots; then split by row again. By
    # identity, since media may hold arrays, which have no hash.
    names = [tuple(map(id, group)) for row in groups for group in row]
    distinct = dict(zip(names, (group for row in groups for group in row), strict=True))
    found, places = encode([*distinct.values()]), {name: n for n, name in enumerate(distinct)}
    order, counts = [places[name] for name in names], [len(row) for row in groups]
    tokens = None if found.tokens is None else by_row(found.tokens[order], counts)
    return *batch, by_row(found.embeddings[order], counts), tokens


def by_row(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Arrange values of media groups, such as embeddings [N, E], by the rows of a batch, [B, M, E].

    Args:
        values: the values of all groups, row after row, [N, ...].
        counts: number of groups of each row; M is the largest of them, at least 1.
    """
    # Rows with fewer groups keep zeros, which no token refers to.
    arranged = values.new_zeros(len(counts), max(1, *counts), *values.shape[1:])
    for row, part in enumerate(values.split(list(counts))):
        arranged[row, : len(part)] = part
    return arranged


class _Cancelled(StoppingCriteria):
    """Ends a generation when its reader has stopped."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def decode_answers(ids: Tensor, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> list[str]:
    """Return the texts of answers, without control tokens and surrounding white space.

    Args:
        ids: the generated tokens, [N, A].
        ends: ids that end an answer. Without one, the answer was cut, maybe inside a character of several tokens; the
            incomplete character is dropped.
    """
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    whole = torch.isin(ids, torch.tensor(ends, device=ids.device)).any(1).tolist()
    return [
        (text if ended else text.rstrip(_INCOMPLETE)).strip()
        for text, ended in zip(texts, whole, strict=True)
    ]


class AnswerText:
    """The text of an answer while its tokens arrive; all pieces together are the text that `decode_answers` returns.

    A piece never ends inside a character of several tokens. White space at the end is held back until a word follows,
    and so is the beginning of a stop string until it is complete or another text.

    Args:
        stop: strings that end the answer; the first of them in the text is cut off.

    Attributes:
        stopped: whether a stop string was found. The answer is complete, and further tokens are not read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._held, self._has_begun = "", False
        # How to read this: the tokens of a window are decoded together, and the beginning of their text is known.
        # Decoding from the answer's beginning would cost more with each token, and from the last token it would differ:
        # some tokenizers write a token without its space if no other stands before it.
        self._window: list[int] = []
        self._known = ""

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that is certain after these tokens, maybe empty."""
        if self.stopped:
            return ""
        self._window += ids
        text = self._decode()
        # The bytes of an incomplete character are decoded again with the tokens that complete it.
        if text.endswith(_INCOMPLETE):
            return ""
        self._held += text[len(self._known) :]
        self._known = text
        if len(self._window) > _LONGEST_WINDOW:
            self._window = self._window[-_SHORTEST_WINDOW:]
            self._known = self._decode()
        if found := [at for stop in self._stop if (at := self._held.find(stop)) >= 0]:
            self.stopped = True
            return self._give(min(found)).rstrip()
        return self._give(len(self._held) - self._undecided())

    def end(self, *, whole: bool) -> str:
        """Return the rest of the text.

        Args:
            whole: whether the model ended the answer itself. If not, it was cut, maybe inside a character: the
                incomplete character is dropped.
        """
        if self.stopped:
            return ""
        self._held += self._decode()[len(self._known) :]
        if not whole:
            self._held = self._held.rstrip(_INCOMPLETE)
        return self._give(len(self._held))

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True)

    def _undecided(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        lengths = (
            length
            for stop in self._stop
            for length in range(1, min(len(stop), len(self._held) + 1))
            if self._held.endswith(stop[:length])
        )
        return max(lengths, default=0)

    def _give(self, length: int) -> str:
        """Take the first characters out of the held text, without white space at either end of the answer."""
        length = len(self._held[:length].rstrip())
        text, self._held = self._held[:length], self._held[length:]
        if not self._has_begun:
            text = text.lstrip()
        self._has_begun = self._has_begun or bool(text)
        return text


class _TokenQueue(BaseStreamer):
    """Passes the tokens of a running generation to another thread; None is the end."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[list[int] | None] = SimpleQueue()
        self._is_prompt = True

    def put(self, value: Tensor) -> None:
        # The first call brings the prompt.
        if not self._is_prompt:
            self.queue.put(value.flatten().tolist())
        self._is_prompt = False

    def end(self) -> None:
        self.queue.put(None)


def stream_text(
    generate: Callable[..., Tensor], tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]
) -> Iterator[str]:
    """Yield the text of a generation piece by piece; an incomplete last character is dropped.

    Args:
        generate: called in another thread with ``streamer=`` and ``stopping_criteria=``; returns the ids.

    Raises:
        any exception of ``generate``, in the reader's thread.
    """
    streamer, cancelled, failures, ids = _TokenQueue(), _Cancelled(), [], set()

    def work() -> None:
        try:
            criteria = StoppingCriteriaList([cancelled])
            ids.update(generate(streamer=streamer, stopping_criteria=criteria).flatten().tolist())
        # Raised again in the reader's thread; the end marker wakes the reader up.
        except Exception as error:
            failures.append(error)
            streamer.end()

    thread = threading.Thread(target=work, name="bindllm-stream", daemon=True)
    thread.start()
    text = AnswerText(tokenizer)
    try:
        for tokens in iter(streamer.queue.get, None):
            if piece := text.add(tokens):
                yield piece
        thread.join()
        if not failures and (piece := text.end(whole=not ids.isdisjoint(ends))):
            yield piece
    finally:
        # Also after a `break` of the reader: the next token then stops the thread.
        cancelled.event.set()
        thread.join()
    if failures:
        raise failures[0]
