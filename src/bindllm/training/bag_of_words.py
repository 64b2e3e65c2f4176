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


def words_of_groups(samples: Sequence[Sample], *, captions_only: bool) -> dict[MediaGroup, set[int]]:
    """Return the ids of all supervised tokens that listen to each media group; groups without any are skipped.

    Answers that their rows call unwanted are skipped, and with ``captions_only`` the answers to questions.
    """
    words: dict[MediaGroup, set[int]] = {}
    for sample in samples:
        if sample.desirable is False or (captions_only and sample.task != "caption"):
            continue
        for number, group in enumerate(sample.media):
            own = sample.labels[(sample.labels != IGNORE) & (sample.media_index == number)].tolist()
            # A group without words, such as that of a shot, would make words of all others look rare.
            if own:
                words.setdefault(group, set()).update(own)
    return words


class BagOfWords(nn.Module):
    """A copy of a bind network that learns to name words.

    Args:
        bind: the bind network. A copy is trained, so that hooks of a strategy on its parameters see no gradient.
        embeddings: the word embeddings of the decoder, at its input or at its output, [all words, D].
        lookup: returns the embeddings and tokens of media groups.

    Attributes:
        network: the copy, in float32.
        weights: how much each of the V words counts, by id; a word of all groups says nothing, and is not one of them.
        table: unit word embeddings, [V, D].
    """

    def __init__(
        self, bind: BindNetwork, embeddings: Tensor, words: Mapping[MediaGroup, set[int]], lookup: Lookup
    ) -> None:
        super().__init__()
        counts = Counter(word for own in words.values() for word in own)
        self.weights = {
            word: math.log(len(words) / count) for word, count in counts.items() if count < len(words)
        }
        self._columns = {word: column for column, word in enumerate(self.weights)}
        self._lookup = lookup
        self.network = copy.deepcopy(bind).float()
        ids = torch.tensor([*self.weights], dtype=torch.int64, device=embeddings.device)
        # Unit rows: the embeddings of rare words are shorter or longer than those of frequent ones.
        self.register_buffer("table", nn.functional.normalize(embeddings[ids].detach().float(), dim=-1))

    def forward(self, groups: Sequence[MediaGroup]) -> Tensor:
        """Return the log-probability of each word for each of G media groups, [G, V]."""
        # An encoder that is trained later gets no gradient here.
        with torch.no_grad():
            embeddings, tokens = self._lookup(groups), tokens_of(self._lookup, groups)
        tokens = None if tokens is None else tokens.to(self.table.device)
        bind = self.network(embeddings.to(self.table.device), tokens)
        # Normalized, so that only directions name words: the scale of a bind token has another meaning in the decoder.
        bind = bind if bind.dim() == 3 else bind.unsqueeze(1)
        absent = ~bind.any(-1, keepdim=True)  # [G, N, 1]
        absent[:, 0] = False
        # [G, N, V], at most the square root of D
        scores = nn.functional.rms_norm(bind, bind.shape[-1:], eps=1e-6) @ self.table.T
        # The mean of the distributions of the bind tokens: each of them may name another thing.
        shares = scores.log_softmax(-1).masked_fill(absent, -torch.inf)
        return shares.logsumexp(1) - (~absent).sum(1).log()

    def targets(self, words: Iterable[set[int]]) -> Tensor:
        """Return the share of each word in the target of each group, [G, V]; zeros for a group without words."""
        rows = []
        for own in words:
            row = torch.zeros(len(self.weights))
            for word in own & self.weights.keys():
                row[self._columns[word]] = self.weights[word]
            rows.append(row / row.sum().clamp(min=1e-9))
        return torch.stack(rows).to(self.table.device)

    @torch.no_grad()
    def found(self, words: Mapping[MediaGroup, set[int]]) -> float:
        """Return the share, 0 to 1, of the words of each group that are among as many that it names first."""
        shares = []
        for groups in chunks(words, BATCH_SIZE):
            targets = self.targets(words[group] for group in groups)
            # Weighted as in training: articles are easy to name.
            for scores, target in zip(self(groups), targets, strict=True):
                if count := int((target > 0).sum()):
                    shares.append(target[scores.topk(count).indices].sum().item())
        return sum(shares) / max(1, len(shares))


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
        epochs: passes over the media groups of the training rows.
        context: device and processes of the run; all of them do the same work, and then have the same weights.

    Raises:
        InputError: the rows are streamed, have no media, or have answers of the same words.
    """
    rows, held_out = data.samples("train"), data.samples("validation")
    # Captions name the things of an image. No part of an image looks like "yes" or "two", the answers to questions.
    captions_only = any(row.task == "caption" for row in rows)
    words, held_out = (words_of_groups(part, captions_only=captions_only) for part in (rows, held_out))
    task = BagOfWords(model.bind, model.injection.words(model.decoder), words, data.lookup)
    if not task.weights:
        reason = "streamed rows are not read before training" if data.streamed else "these rows have none"
        raise InputError(
            f"model.bag_of_words is {epochs}: it needs training rows with media and different answers, and {reason}. "
            "Set model.bag_of_words: 0"
        )
    task.to(context.device)
    optimizer = build_optimizer({"bind": [*task.network.named_parameters()]}, optim, fused=False)
    schedule = build_schedule(optimizer, epochs * math.ceil(len(words) / BATCH_SIZE), optim)
    console, all_groups = Console(soft_wrap=True, quiet=not context.processes.is_first), [*words]
    for epoch in range(1, epochs + 1):
        task.train()
        for numbers in torch.randperm(len(all_groups)).split(BATCH_SIZE):
            groups = [all_groups[n] for n in numbers]
            loss = -(task.targets(words[group] for group in groups) * task(groups)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(task.network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        share = (
            f"  names {task.eval().found(held_out):.0%} of the words of validation rows" if held_out else ""
        )
        console.print(f"bag of words  epoch {epoch}/{epochs}  train loss {loss.item():.3f}{share}")
    model.bind.load_state_dict(task.network.state_dict())
    if context.processes.world_size > 1:
        # Sums on accelerators are not the same in all processes, to the last bit.
        for parameter in model.bind.parameters():
            torch.distributed.broadcast(parameter.detach(), 0)
