"""Bag-of-words pretraining of the bind network, before the decoder runs for the first time.

Zero gates pass no gradient to the bind network, so its first steps in a run are blind, and each step costs a pass
through the decoder. Here the bind tokens of a media group learn to name the words of its answers without the decoder:
each token is compared with the word embeddings of the decoder, which gives a distribution over words, and the mixture
of these distributions has to predict the words. The order of the words is left to the run. The gates stay zero, so the
run still starts from exactly the untouched language model.

Predicting the bag of words of a caption from an image is from Joulin et al. (arXiv 1511.02251).
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from rich.console import Console
from torch import Tensor, nn

from bindllm.data.collate import Lookup, MediaGroup, tokens_of
from bindllm.data.datamodule import BindData
from bindllm.data.rows import IGNORE, Sample
from bindllm.errors import InputError
from bindllm.model.bind_network import BindNetwork
from bindllm.model.bindllm import BindLLM
from bindllm.parallel import RunContext, chunks
from bindllm.training.optim import OptimConfig, build_optimizer, build_schedule

BATCH_SIZE = 64
"""Media groups of a step: these are small, as no text is computed."""


def words_of_groups(samples: Sequence[Sample]) -> dict[MediaGroup, set[int]]:
    """Return the ids of all supervised tokens that listen to each media group."""
    words: dict[MediaGroup, set[int]] = {}
    for sample in samples:
        for number, group in enumerate(sample.media):
            own = sample.labels[(sample.labels != IGNORE) & (sample.media_index == number)]
            words.setdefault(group, set()).update(own.tolist())
    return words


class BagOfWords(nn.Module):
    """A bind network that names words.

    Args:
        network: the bind network; it is trained.
        table: unit word embeddings of the decoder, [V, D].
        weights: how much each word counts, [V].
        lookup: of the embeddings and tokens of media groups.
    """

    def __init__(self, network: BindNetwork, table: Tensor, weights: Tensor, lookup: Lookup) -> None:
        super().__init__()
        self.network, self._lookup = network, lookup
        self.register_buffer("table", table)
        self.register_buffer("weights", weights)

    def forward(self, groups: Sequence[MediaGroup]) -> Tensor:
        """Return the log-probability of each word for each of G media groups, [G, V]."""
        tokens = tokens_of(self._lookup, groups)
        tokens = None if tokens is None else tokens.to(self.table.device)
        bind = self.network(self._lookup(groups).to(self.table.device), tokens)
        # Products with unit rows are at most the norm of a bind token, about the square root of D: sharp enough.
        words = (bind if bind.dim() == 3 else bind.unsqueeze(1)) @ self.table.T  # [G, N, V]
        # The mean of the distributions of the bind tokens: each of them may name another thing.
        return words.log_softmax(-1).logsumexp(1) - math.log(words.shape[1])

    def targets(self, groups: Sequence[MediaGroup], words: Mapping[MediaGroup, Tensor]) -> Tensor:
        """Return the share of each word in the target of each group, [G, V]; zeros for a group without words."""
        targets = torch.zeros(len(groups), len(self.weights))
        for row, group in zip(targets, groups, strict=True):
            row[words[group]] = 1
        targets = targets.to(self.table.device) * self.weights
        return targets / targets.sum(1, keepdim=True).clamp(min=1e-9)


def pretrain_bind(
    model: BindLLM,
    data: BindData,
    epochs: int,
    optim: OptimConfig,
    context: RunContext = RunContext(),  # noqa: B008
) -> None:
    """Train the bind network of a model to name the words of the answers, and print a line per epoch.

    Args:
        model: with untrained gates; only its bind network changes.
        data: the data of the run.
        epochs: passes over the media groups of the training rows.
        optim: optimizer and schedule.
        context: device and processes of the run; all of them do the same work, and then have the same weights.

    Raises:
        InputError: the rows are streamed, have no media, or have answers of the same words.
    """
    words = words_of_groups(data.samples("train"))
    counts = Counter(word for own in words.values() for word in own)
    # A word of every answer says nothing about the media, such as the token that ends an answer.
    weights = {word: math.log(len(words) / count) for word, count in counts.items() if count < len(words)}
    if not weights:
        reason = "streamed rows are not read before training" if data.streamed else "these rows have none"
        raise InputError(
            f"model.bag_of_words is {epochs}: it needs training rows with media and different answers, and {reason}. "
            "Set model.bag_of_words: 0"
        )
    # Unit rows: the embeddings of rare words are shorter or longer than those of frequent ones.
    ids = torch.tensor([*weights], device=model.device)
    table = nn.functional.normalize(model.decoder.get_input_embeddings()(ids).float(), dim=-1)
    # A copy of the network: hooks of a strategy on the model's own parameters must not see these gradients.
    network = copy.deepcopy(model.bind).float()
    task = BagOfWords(network, table, torch.tensor([*weights.values()]), data.lookup).to(context.device)
    index = {word: n for n, word in enumerate(weights)}
    splits = {
        split: {
            group: torch.tensor([index[word] for word in own if word in index], dtype=torch.int64)
            for group, own in words_of_groups(data.samples(split)).items()
        }
        for split in ("train", "validation")
    }
    optimizer = build_optimizer({"bind": [*network.named_parameters()]}, optim, fused=False)
    schedule = build_schedule(optimizer, epochs * math.ceil(len(words) / BATCH_SIZE), optim)
    console = Console(highlight=False, soft_wrap=True, quiet=not context.processes.is_first)
    for epoch in range(1, epochs + 1):
        task.train()
        for groups in chunks(_shuffled(splits["train"]), BATCH_SIZE):
            targets = task.targets(groups, splits["train"])
            loss = -(targets * task(groups)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        found = _found(task.eval(), splits["validation"])
        console.print(f"bag of words  epoch {epoch}/{epochs}  train loss {loss.item():.3f}{found}")
    model.bind.load_state_dict(network.state_dict())
    if context.processes.world_size > 1:
        # Sums on accelerators are not the same in all processes, to the last bit.
        for parameter in model.bind.parameters():
            torch.distributed.broadcast(parameter.detach(), 0)


def _shuffled(groups: Iterable[MediaGroup]) -> list[MediaGroup]:
    groups = list(groups)
    return [groups[n] for n in torch.randperm(len(groups)).tolist()]


@torch.no_grad()
def _found(task: BagOfWords, words: Mapping[MediaGroup, Tensor]) -> str:
    """Return in words how many words of each group are among as many that the network names first."""
    shares = []
    for groups in chunks(words, BATCH_SIZE):
        targets = task.targets(groups, words)
        # Weighted as in training: articles are easy to name.
        for scores, target in zip(task(groups), targets, strict=True):
            named = scores.topk(int((target > 0).sum())).indices
            shares += [target[named].sum().item()] * bool(target.any())
    return (
        f"  names {100 * sum(shares) / len(shares):.0f} % of the words of validation rows" if shares else ""
    )
