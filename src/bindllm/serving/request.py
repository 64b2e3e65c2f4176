"""A request: its settings, the tensors of its prompt, and the pieces of its answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
from bindllm.model.generation import MAX_NEW_TOKENS, generate_options
from bindllm.serving.sampling import check_sampling
from bindllm.shots import Shot


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
    cache: CacheChoice = None
    shots: tuple[Shot, ...] = ()
    timeout: float | None = None

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, self.seed)
        for name, value, least in (("max_tokens", self.max_tokens, 1), ("logprobs", self.logprobs, 0)):
            if value is not None and value < least:
                raise InputError(f"{name} is {value}, expected at least {least}")
        if self.timeout is not None and not self.timeout > 0:
            raise InputError(f"timeout is {self.timeout}, expected seconds above 0")
        if "" in self.stop:
            raise InputError("a stop string is empty; every answer would end before it begins")

    def choice(self, number: int) -> Request:
        """Return the request of one of several choices: the same with a seed of its own, ``seed + number``."""
        return self if self.seed is None else replace(self, seed=self.seed + number)


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, before temperature and ``top_p``.

    Attributes:
        token: its text.
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
        model: the model that answers.
        request: the request.
        recent: embeddings of earlier requests, read and added to.
        tokens: most tokens that a prompt and its answer may have together.

    Raises:
        InputError: the prompt is too long, or the conversation cannot be rendered.
        MediaError: a media cannot be read.
    """
    options = {"max_new_tokens": request.max_tokens or MAX_NEW_TOKENS}
    given = (request.conversation, None, request.cache, request.shots or None)
    ids, _, media_index, embeddings, encoder_tokens = model.prepare(*given, recent=recent, **options)
    width, device = ids.shape[1], model.device
    if width >= tokens:
        raise InputError(
            f"the prompt has {width:,} tokens, and the engine holds {tokens:,} of all prompts and answers: shorten the "
            "prompt"
        )
    options = generate_options(options, width=width, positions=num_positions(model.decoder.config))
    records = find_records(model, embeddings, None)
    if embeddings is None:
        # No token refers to it, but all rows of a batch need the same tensors.
        embeddings = torch.zeros(1, 1, model.bind.projection.in_features)
    embeddings = embeddings.to(device)
    bind = model.bind(embeddings, None if encoder_tokens is None else encoder_tokens.to(device))[0]
    if bind.dim() == 3 and not model.bind.takes_all:
        # A group without tokens of its encoder has one bind token; rows of zeros are no tokens.
        bind = pad(bind, (0, 0, 0, model.bind.num_tokens - bind.shape[1]))
    context = read_records(model, embeddings, **records)
    if context is None and model.context is not None:
        context = bind.new_zeros(1, len(bind), 2 * model.context.config.latents, bind.shape[-1])
    most = min(tokens, width + options["max_new_tokens"])
    return RowInput(ids[0], media_index[0], bind, None if context is None else context[0], most)
