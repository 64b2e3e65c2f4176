"""Log-probabilities of all answers under the initial model: computed once, and kept in a file of the run.

    runs/<name>/reference.safetensors    a tensor [rows, columns] per split; its metadata hold a fingerprint

The fingerprint covers the initial weights and the tokens and embeddings of all rows, so a resumed run finds its own
values and any other run does not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bindllm.atomic import atomic_file, open_tensors
from bindllm.data.batches import share, sorted_batches
from bindllm.data.collate import Batch, answer_batch
from bindllm.data.datamodule import BindData
from bindllm.data.rows import Sample
from bindllm.errors import TrainingError
from bindllm.model.bindllm import BindLLM
from bindllm.objectives.base import answer_log_probs
from bindllm.parallel import RunContext

REFERENCE = "reference.safetensors"

Columns = Sequence[Sequence[Sample | None]]
"""Answers by column: the answer of each row, and others (or None) that belong to the same row."""


class References:
    """Log-probabilities of answers under the initial model of a run."""

    def __init__(self) -> None:
        self._start = ""
        self._values: dict[str, Tensor] = {}

    def on_start(self, model: BindLLM) -> None:
        """Take the fingerprint of the initial weights; a resumed run restores its own later."""
        # Encoders are not part of it: their embeddings are in the batches, which the fingerprint covers.
        parts = model.describe()
        own = {name: parts[name] for name in ("decoder", "bind", "inject", "adapter")}
        digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode())
        for name, value in sorted(model.trainable_state().items()):
            _add(digest, name, value)
        self._start = digest.hexdigest()

    def prepare(
        self, model: BindLLM, data: BindData, context: RunContext, columns: Mapping[str, Columns]
    ) -> None:
        """Read the values from the run's folder, or compute and write them; every process then has all of them.

        Raises:
            TrainingError: the values of a resumed run are missing (its weights are no longer the initial ones), a
                value is not finite, or the file cannot be written or read.
        """
        for members in columns.values():
            assert all(sample.number == n for n, sample in enumerate(members[0])), "samples are not numbered"
        # How to read this: one list of all answers, batches of similar length, their fingerprint, then file or model.
        rows = [sample for split in columns.values() for column in split for sample in column if sample]
        plan = sorted_batches([len(sample.input_ids) for sample in rows], batch_size=2 * data.batch_size)
        make = partial(answer_batch, lookup=data.lookup, pad_id=model.tokenizer.pad_token_id)
        batches = [partial(make, [rows[n] for n in numbers]) for numbers in plan]
        processes, file = context.processes, context.folder / REFERENCE
        # Once, since it reads every embedding; the others get it from the first process.
        own = _fingerprint(self._start, columns, batches) if processes.is_first else ""
        fingerprint = processes.gather(own)[0]
        kept = _read(file, fingerprint)
        # All processes must take the same branch: it ends in collective operations.
        if processes.gather(kept is not None)[0]:
            if kept is None:
                raise TrainingError(
                    f"{file} can be read by the first process, but not by process {processes.rank + 1} of "
                    f"{processes.world_size}: put the folder runs on a file system that all machines share"
                )
        # Computed now, the values would be those of half-trained weights.
        elif context.resumed:
            raise TrainingError(
                f"{file} is missing, or was made from other rows or weights, and this run no longer has its initial "
                "weights: restore that file, or start again with --resume false"
            )
        else:
            kept = _arranged(_compute(model, plan, batches, len(rows), context), columns)
            if processes.is_first:
                _write(file, kept, fingerprint)
        self._values = {split: values.to(context.device) for split, values in kept.items()}

    def of(self, split: str, numbers: Tensor) -> Tensor:
        """Return the values of rows of a split, [B, columns]; NaN if a row has no such answer."""
        return self._values[split][numbers]


def _add(digest: hashlib._Hash, name: str, value: Tensor) -> None:
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
    # As bytes: bfloat16 has no counterpart in numpy.
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _fingerprint(start: str, columns: Mapping[str, Columns], batches: Sequence[Callable[[], Batch]]) -> str:
    """Return hex digits that change with the weights, and with tokens, media or order of the rows."""
    digest = hashlib.sha256(start.encode())
    for split, members in columns.items():
        # Which answers exist decides which value belongs to which row.
        shape = [[sample is not None for sample in column] for column in members]
        digest.update(f"{split} {shape}\n".encode())
    for batch in batches:
        for name, value in sorted(batch().items()):
            _add(digest, name, value)
    return digest.hexdigest()


@torch.no_grad()
def _compute(
    model: BindLLM,
    plan: list[list[int]],
    batches: Sequence[Callable[[], Batch]],
    count: int,
    context: RunContext,
) -> Tensor:
    """Return the log-probability of each row, [count]; every process computes a share and gets all."""
    rank, world_size = context.processes.rank, context.processes.world_size
    # The same number for each process: all of them gather the layers of a sharded decoder together.
    mine = share(list(range(len(plan))), world_size=world_size, rank=rank)
    shown = track(
        enumerate(mine),
        "reference log-probabilities",
        total=len(mine),
        console=Console(stderr=True),
        transient=True,
        disable=not context.progress,
    )
    found: list[tuple[list[int], list[float]]] = []
    for turn, position in shown:
        batch = {name: value.to(context.device) for name, value in batches[position]().items()}
        log_probs, _ = answer_log_probs(model, batch)
        # The last batches of a share may repeat the first ones of another share.
        if rank + turn * world_size < len(plan):
            found.append((plan[position], log_probs.float().tolist()))
    values = torch.zeros(count)
    for rows, numbers in (pair for pairs in context.processes.gather(found) for pair in pairs):
        values[rows] = torch.tensor(numbers)
    # Before the first step, because a NaN here would reach every weight.
    if not bool(values.isfinite().all()):
        raise TrainingError(
            "a reference log-probability is not finite: the initial model returns NaN or infinity. Check "
            "model.init_from, or use another decoder.dtype"
        )
    return values


def _arranged(values: Tensor, columns: Mapping[str, Columns]) -> dict[str, Tensor]:
    """Arrange values in one table per split, [rows, columns]; NaN for a missing answer."""
    # The values come column by column, in the order in which `prepare` listed the answers.
    tables, numbers = {}, iter(values.tolist())
    for split, members in columns.items():
        table = [[next(numbers) if sample else float("nan") for sample in column] for column in members]
        tables[split] = torch.tensor(table).T.contiguous()
    return tables


def _read(file: Path, fingerprint: str) -> dict[str, Tensor] | None:
    """Return the values that are stored under a fingerprint, or None."""
    # A damaged file is as good as none: its values can be computed again.
    with suppress(TrainingError), open_tensors(file, TrainingError) as stream:
        if (stream.metadata() or {}).get("fingerprint") == fingerprint:
            return {split: stream.get_tensor(split) for split in stream.keys()}  # noqa: SIM118 (not a dict)
    return None


def _write(file: Path, values: dict[str, Tensor], fingerprint: str) -> None:
    try:
        with atomic_file(file) as part:
            save_file(values, part, metadata={"fingerprint": fingerprint})
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{file} cannot be written ({error}): free some disk space, and run the command again"
        ) from error
