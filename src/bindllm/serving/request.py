"""A request: its settings, the tensors of its prompt, its state in the engine, and the pieces of its answer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from bindllm.cache.visual_cache import CacheChoice
from bindllm.conversation import Conversation
from bindllm.embeddings.embedder import RecentEmbeddings
from bindllm.errors import InputError
from bindllm.model.bindllm import BindLLM
from bindllm.model.context.records import find_records, read_records
from bindllm.model.decoder import num_positions
from bindllm.model.generation import MAX_NEW_TOKENS, AnswerText, generate_options
from bindllm.model.generation.constraint import Constraint
from bindllm.serving.sampling import Sampling, check_sampling
from bindllm.shots import Shot

if TYPE_CHECKING:
    from bindllm.serving.batch import ReadPrompts


class SettingError(InputError):
    """A setting of a request that cannot be used.

    Args:
        field: of `Request`, or ``prompt`` if the conversation with its shots is too long.
        message: names the value, the expected values, and the next step.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Request:
    """A conversation to answer.

    Args:
        conversation: ends with the question; control tokens in its texts are escaped.
        max_tokens: longest answer; None: as for `BindLLM.generate`.
        temperature: 0 is greedy.
        top_p: the smallest set of tokens with this much probability is drawn from.
        seed: the same request with the same seed has the same answer; None: answers differ.
        stop: strings that end the answer, and are not part of it.
        logprobs: number of most likely tokens that are reported for each token; None: no log-probabilities.
        presence_penalty: subtracted from the logits of tokens that the answer has already.
        frequency_penalty: the same, times the number of times that the answer has the token.
        logit_bias: added to the logits of tokens, by their ids.
        grammar: that the answer follows, such as a `json_grammar`. A cut answer is the beginning of one that does.
        cache: the visual cache, as for `BindLLM.generate`.
        shots: worked examples before the question.
        timeout: seconds from submission after which the answer ends; None: no limit.

    Raises:
        InputError: a number is out of its range, or a stop string is empty.
    """

    conversation: Conversation
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: str | None = None
    cache: CacheChoice = None
    shots: tuple[Shot, ...] = ()
    timeout: float | None = None

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.seed)
        for name, value, least in (("max_tokens", self.max_tokens, 1), ("logprobs", self.logprobs, 0)):
            if value is not None and value < least:
                raise InputError(f"{name} is {value}, expected at least {least}")
        for value in (self.presence_penalty, self.frequency_penalty, *self.logit_bias.values()):
            if not math.isfinite(value):
                raise InputError(f"a penalty or bias is {value}, expected a finite number")
        if self.timeout is not None and not self.timeout > 0:
            raise InputError(f"timeout is {self.timeout}, expected seconds above 0")
        if "" in self.stop:
            raise InputError("a stop string is empty; every answer would end before it begins")

    def choice(self, number: int) -> Request:
        """Return the request of one of several choices: the same with a seed of its own, ``seed + number``."""
        # Without a seed, each choice draws one by itself.
        return self if self.seed is None else replace(self, seed=self.seed + number)

    def sampling(self, constraint: Constraint | None) -> Sampling:
        """Return how the tokens of one answer are chosen."""
        own = {name: getattr(self, name) for name in ("presence_penalty", "frequency_penalty", "logit_bias")}
        return Sampling.of(self.temperature, self.top_p, self.seed, constraint=constraint, **own)


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, before temperature and ``top_p``.

    Attributes:
        logprob: natural logarithm.
        top: the most likely tokens in its place, the first one first.
    """

    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of an answer. All texts together are the answer of `BindLLM.generate`.

    Attributes:
        text: new text; the last piece may have none.
        tokens: tokens since the piece before; control tokens that end the answer count.
        logprobs: of these tokens, without those that end the answer; empty if they were not asked for.
        finish: ``stop`` (the model or a stop string ended the answer), ``length`` or ``timeout``; None: more follows.
        error: why there is no (further) answer; then this is the last piece.
    """

    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        """Whether no piece follows."""
        return self.finish is not None or self.error is not None


@dataclass(frozen=True)
class RowInput:
    """A rendered prompt with its media.

    Attributes:
        ids: tokens up to the header of the answer, [T].
        media_index: the media group that each token listens to, or -1, [T].
        bind: bind vectors of its groups, [M, D], or bind tokens, [M, N, D].
        context: context tokens of its groups, [M, C, D]; None: the model reads no records.
        most: tokens of the prompt and the longest answer.
    """

    ids: Tensor
    media_index: Tensor
    bind: Tensor
    context: Tensor | None
    most: int


@torch.no_grad()
def make_input(model: BindLLM, request: Request, recent: RecentEmbeddings, tokens: int) -> RowInput:
    """Render the prompt of a request and encode its media, as `BindLLM.generate` does.

    Args:
        tokens: most tokens that a prompt and its answer may have together.

    Raises:
        InputError: the prompt is too long, or the conversation cannot be rendered.
        MediaError: a media cannot be read.
    """
    # Here and not with the other settings: only the decoder knows its tokens.
    num_tokens = model.decoder.get_input_embeddings().num_embeddings
    if beyond := [token for token in request.logit_bias if not 0 <= token < num_tokens]:
        raise SettingError(
            "logit_bias",
            f"logit_bias names token {beyond[0]}; the decoder has the tokens 0 to {num_tokens - 1:,}",
        )
    options = {"max_new_tokens": request.max_tokens or MAX_NEW_TOKENS}
    given = (request.conversation, None, request.cache, request.shots or None)
    ids, _, media_index, embeddings, encoder_tokens = model.prepare(*given, recent=recent, **options)
    width, device = ids.shape[1], model.device
    # Such a request would wait forever for room in the key/value cache.
    if width >= tokens:
        raise SettingError(
            "prompt",
            f"the prompt has {width:,} tokens, and the engine holds {tokens:,} of all prompts and answers: shorten the "
            "prompt",
        )
    try:
        options = generate_options(options, width=width, positions=num_positions(model.decoder.config))
    except InputError as error:
        raise SettingError("prompt", str(error)) from error
    records = find_records(model, embeddings, None)
    if embeddings is None:
        # No token refers to it, but all rows of a batch need the same tensors.
        embeddings = torch.zeros(1, 1, model.bind.projection.in_features)
    embeddings = embeddings.to(device)
    # Once for the whole answer: the steps need the bind vectors, and no longer the embeddings.
    bind = model.bind(embeddings, None if encoder_tokens is None else encoder_tokens.to(device))[0]
    if bind.dim() == 3 and not model.bind.takes_all:
        # A group without tokens of its encoder has one bind token; rows of zeros are no tokens.
        bind = pad(bind, (0, 0, 0, model.bind.num_tokens - bind.shape[1]))
    context = read_records(model, embeddings, **records)
    # As above: rows with records may join the batch later.
    if context is None and model.context is not None:
        context = bind.new_zeros(1, len(bind), 1, model.context.output_size)
    # An answer that asks for more than fits ends at the limit, with the reason `length`.
    most = min(tokens, width + options["max_new_tokens"])
    return RowInput(ids[0], media_index[0], bind, None if context is None else context[0], most)


class Prompt:
    """The prompt of a request in the engine; its choices share it, so it is prepared once and read once.

    Attributes:
        is_taken: whether a thread prepares it, or has.
        input: its tensors, once it is prepared.
        constraint: on the answer, at its beginning; None: any text.
        error: why it cannot be answered.
        read: after it was read, while choices wait for a slot: the prompts that were read together, and its index.
        is_alone: whether it must not be read together with others.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.is_taken = self.is_alone = False
        self.input: RowInput | None = None
        self.constraint: Constraint | None = None
        self.error: Exception | None = None
        self.warnings: tuple[str, ...] = ()
        self.read: tuple[ReadPrompts, int] | None = None


class Ticket:
    """A submitted request, or one choice of it.

    Attributes:
        request: the request, with the seed of the choice.
        prompt: shared with the other choices.
        listener: called with each piece.
        deadline: when it ends, in seconds of the monotonic clock; None: never.
        is_cancelled: whether it ends without a further piece.
        is_over: whether its last piece was sent.
    """

    def __init__(self, request: Request, prompt: Prompt, listener: Callable[[Piece], None]) -> None:
        self.request, self.prompt, self.listener = request, prompt, listener
        self.is_cancelled = self.is_over = False
        # From here on, since waiting for a slot counts too. The monotonic clock cannot be set back.
        self.deadline = None if request.timeout is None else time.monotonic() + request.timeout

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of the prompt; None until it is rendered, which is before the first piece with text."""
        return None if self.prompt.input is None else len(self.prompt.input.ids)

    @property
    def has_ended(self) -> bool:
        """Whether it was cancelled or is late."""
        return self.is_cancelled or (self.deadline is not None and time.monotonic() >= self.deadline)

    def cancel(self) -> None:
        """End the request without a further piece; its slot is free before the next step."""
        # Only a mark: rows belong to the engine's thread, which sees it before the next step.
        self.is_cancelled = True


class Row:
    """A running request.

    Attributes:
        num_left: tokens that may follow.
        num_tokens: tokens since the last piece.
        logprobs: of these tokens.
    """

    def __init__(self, ticket: Ticket, model: BindLLM) -> None:
        self.ticket, self.last_token = ticket, 0
        self.text = AnswerText(model.tokenizer, ticket.request.stop)
        # Compiled once for all choices, each of which follows its own copy.
        constraint = ticket.prompt.constraint
        self.sampling = ticket.request.sampling(None if constraint is None else constraint.copy())
        self.num_left = ticket.prompt.input.most - ticket.prompt_tokens
        self.num_tokens, self.logprobs = 0, []

    def take(self, text: str, **last: object) -> Piece:
        """Return the piece of a text, with all tokens since the piece before."""
        # Tokens whose text is not certain yet wait here, so no token is counted twice or lost.
        piece = Piece(text, self.num_tokens, tuple(self.logprobs), **last)
        self.num_tokens, self.logprobs = 0, []
        return piece
