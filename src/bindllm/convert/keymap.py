"""Rename the tensors of foreign checkpoints by a table, report the outcome for each, and write converted folders."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bindllm.atomic import atomic_folder, check_replaceable, write_json, write_tensors
from bindllm.errors import CheckpointError, listed

REPORT = "conversion.tsv"
"""File of a converted folder that lists every tensor of the published file and its outcome."""

# Types that published weights may have; integers and float8 mean a quantized copy.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Rule:
    r"""One row of a table: renames or drops the tensors whose whole name matches a pattern.

    Args:
        pattern: regular expression for the foreign name.
        to: our name, with ``\1`` for the pattern's groups; None drops the tensor.
        why: why it is dropped, for the report.
        change: turns the foreign tensor into ours; None: unchanged.
    """

    pattern: str
    to: str | None
    why: str = ""
    change: Callable[[Tensor], Tensor] | None = None


@dataclass
class ConversionReport:
    """Outcome of a conversion for every tensor of the foreign checkpoint.

    Attributes:
        mapped: (foreign name, our name, shape).
        dropped: (foreign name, why).
        unknown: foreign names that no rule matches.
    """

    mapped: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the content of ``conversion.tsv``: one line per tensor, tab-separated."""
        lines = ["key\toutcome\tname or reason\tshape"]
        lines += [
            f"{old}\tmapped\t{new}\t{'x'.join(map(str, shape)) or 'scalar'}"
            for old, new, shape in self.mapped
        ]
        lines += [f"{old}\tdropped\t{why}\t" for old, why in self.dropped]
        lines += [f"{old}\tunknown\t\t" for old in self.unknown]
        return "\n".join(lines) + "\n"

    def require_complete(self, source: str) -> None:
        """Raise if a tensor matched no rule.

        Raises:
            CheckpointError: names the unknown tensors.
        """
        if self.unknown:
            raise CheckpointError(
                f"{source} holds {len(self.unknown)} unknown tensors: {listed(self.unknown, 20)}. It is another kind "
                "of checkpoint, or another version of this one; nothing was converted"
            )


def rename(
    tensors: Mapping[str, Tensor], rules: Sequence[Rule]
) -> tuple[dict[str, Tensor], ConversionReport]:
    r"""Rename the tensors of a foreign checkpoint.

    Args:
        rules: the table; the first rule that matches a name applies.

    Returns:
        the tensors by our names, and the outcome for each. Unknown tensors are only listed there; see
        `ConversionReport.require_complete`.

    Raises:
        CheckpointError: two tensors get the same name, or one has a shape that its rule cannot change.

    Examples:
        >>> import torch
        >>> rules = [Rule(r"w1[.](.*)", r"gate.\g<1>"), Rule("rope[.].*", None, "computed from the config")]
        >>> ours, report = rename({"w1.weight": torch.ones(2), "rope.freqs": torch.ones(3)}, rules)
        >>> list(ours), report.dropped, report.unknown
        (['gate.weight'], [('rope.freqs', 'computed from the config')], [])
    """
    # The first rule that matches the whole name decides, so special cases come first in a table.
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    renamed: dict[str, Tensor] = {}
    report = ConversionReport()
    for name, tensor in tensors.items():
        # The whole name must match, not a part of a longer one.
        match, rule = next(
            ((found, rule) for pattern, rule in compiled if (found := pattern.fullmatch(name))), (None, None)
        )
        if match is None or rule is None:
            report.unknown.append(name)
        elif rule.to is None:
            report.dropped.append((name, rule.why))
        else:
            new = match.expand(rule.to)
            # Silently keeping the later one would convert half of two models.
            if new in renamed:
                raise CheckpointError(
                    f"{name} and another both become {new}: this is another kind of checkpoint"
                )
            renamed[new] = _change(name, tensor, rule)
            report.mapped.append((name, new, tuple(tensor.shape)))
    return renamed, report


def _change(name: str, tensor: Tensor, rule: Rule) -> Tensor:
    try:
        return tensor if rule.change is None else rule.change(tensor)
    except (RuntimeError, IndexError) as error:
        # A change such as `unflatten` fails only on shapes that this name never has.
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)}, impossible for this name: it is another kind of checkpoint, or a "
            "damaged one"
        ) from error


def require_weights(tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Raise if tensors cannot be weights: integers, quantized or sparse tensors, NaN and infinity.

    Args:
        tensors: the tensors by name; on the meta device only their types are checked.

    Raises:
        CheckpointError: names the first of them.
    """
    kinds = [
        f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
        for name, tensor in tensors.items()
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided
    ]
    if kinds:
        raise CheckpointError(
            f"{source} holds tensors that are not plain floating-point numbers: {listed(kinds)}. It is "
            "quantized or damaged; give the file as published"
        )
    # One NaN in a frozen weight would make every answer of the model NaN, without an error.
    broken = [name for name, tensor in tensors.items() if not (tensor.is_meta or tensor.isfinite().all())]
    if broken:
        raise CheckpointError(f"{source} holds values that are not finite in {listed(broken)}: it is damaged")


def write_encoder(
    folder: str | Path,
    weights: Mapping[str, Mapping[str, Tensor]],
    *,
    config: Mapping[str, Any],
    package: Mapping[str, str],
    card: str,
    report: ConversionReport,
    files: Mapping[str, Path] | None = None,
) -> None:
    """Write the folder of a converted encoder in one step; an earlier conversion there is replaced.

    Args:
        weights: the tensors of each safetensors file, by the file's name.
        config: content of ``config.json``; its ``model`` names the encoder.
        package: ``name`` and ``license`` of the published weights, for ``SOURCE.json``.

    Raises:
        CheckpointError: the folder holds something else; nothing was written.
    """
    folder = Path(folder)
    check_replaceable(folder, REPORT, CheckpointError, kind="a converted folder")
    with atomic_folder(folder) as part:
        for name, tensors in weights.items():
            write_tensors(part / name, tensors)
        for name, file in (files or {}).items():
            shutil.copyfile(file, part / name)
        (part / REPORT).write_text(report.text(), encoding="utf-8")
        (part / "README.md").write_text(card, encoding="utf-8")
        # SOURCE.json is read by the model card, which repeats the license in every checkpoint.
        write_json(part / "SOURCE.json", {"model": config["model"], "packages": [dict(package)]})
        write_json(part / "config.json", dict(config))
