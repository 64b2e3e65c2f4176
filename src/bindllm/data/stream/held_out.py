"""Rows of a stream that are measured and not trained on: its first ones, kept in memory."""

from __future__ import annotations

from bindllm.data.formats import leave_out
from bindllm.data.report import SourceReport
from bindllm.data.rows import Row
from bindllm.data.source_config import SPLITS, SourceConfig
from bindllm.data.stream.chunks import BAD_SHARD
from bindllm.data.stream.samples import read_row
from bindllm.data.stream.shards import ShardError, expand_shards, read_shard
from bindllm.errors import InputError


def read_stream(
    config: SourceConfig, number: int = 0, *, limit: int | None = None
) -> tuple[dict[str, list[Row]], SourceReport]:
    """Read the first rows of a stream, shard after shard.

    Args:
        config: what the recipe says about it.
        number: its place among the sources of the recipe, from 0.
        limit: rows that are read; None: as many as ``config.limit`` says.

    Returns:
        The rows, all in the split of the source (without one, train), and a report of what was left out.

    Raises:
        InputError: no sample can be used.
    """
    limit = limit or config.limit or 1
    report = SourceReport(config.path, modality=config.modality, format=config.format)
    rows: list[Row] = []
    for shard in expand_shards(config.path):
        try:
            for sample in read_shard(shard):
                try:
                    row, _ = read_row(sample, config, number)
                except InputError as error:
                    leave_out(error, sample.name, report.skipped)
                    continue
                rows.append(row)
                if len(rows) == limit:
                    break
        except ShardError as error:
            report.skipped.add(BAD_SHARD, str(error))
        if len(rows) == limit:
            break
    if not rows:
        raise InputError(
            f"data source {config.path} has no sample that can be used: {'; '.join(report.skipped.lines())}"
        )
    report.count(rows)
    return {split: rows if split == (config.split or "train") else [] for split in SPLITS}, report
