"""Renaming the tensors of foreign checkpoints by a table, with every one of them accounted for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bindllm.errors import CheckpointError

REPORT = "conversion.tsv"
"""File of a converted folder that lists every tensor of the published file and its outcome."""

_SHOWN = 20
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Rule:
    r"""What becomes of the tensors whose whole name matches a pattern; the first rule that matches decides.

    Args:
        pattern: regular expression for the foreign name.
        to: our name, with ``\1`` for the pattern's groups; None drops the tensor.
        why: why it is dropped, for the report.
        change: what turns the foreign tensor into ours; None leaves it.
    """

    pattern: str
    to: str | None
    why: str = ""
    change: Callable[[Tensor], Tensor] | None = None


@dataclass
class ConversionReport:
    """What became of every tensor of a foreign checkpoint.

    Attributes:
        mapped: (foreign name, our name, shape).
        dropped: (foreign name, why).
        unknown: foreign names that no rule speaks of.
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
        """Refuse a checkpoint with tensors that no rule speaks of.

        Raises:
            CheckpointError: names them.
        """
        if self.unknown:
            shown = ", ".join(self.unknown[:_SHOWN])
            more = f" and {len(self.unknown) - _SHOWN} more" if len(self.unknown) > _SHOWN else ""
            raise CheckpointError(
                f"{source} holds {len(self.unknown)} unknown tensors: {shown}{more}. It is another kind of checkpoint, "
                "or another version of this one; nothing was converted"
            )


def rename(
    tensors: Mapping[str, Tensor], rules: Sequence[Rule]
) -> tuple[dict[str, Tensor], ConversionReport]:
    r"""Rename the tensors of a foreign checkpoint.

    Args:
        tensors: by foreign name.
        rules: tried in their order.

    Returns:
        the tensors by our names, and what became of each; unknown ones are only counted, see
        `ConversionReport.require_complete`.

    Raises:
        CheckpointError: two tensors get the same name, or one has a shape that its rule cannot change.

    Example:
        >>> import torch
        >>> rules = [Rule(r"w1[.](.*)", r"gate.\g<1>"), Rule("rope[.].*", None, "computed from the config")]
        >>> ours, report = rename({"w1.weight": torch.ones(2), "rope.freqs": torch.ones(3)}, rules)
        >>> list(ours), report.dropped, report.unknown
        (['gate.weight'], [('rope.freqs', 'computed from the config')], [])
    """
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    renamed: dict[str, Tensor] = {}
    report = ConversionReport()
    for name, tensor in tensors.items():
        match, rule = next(
            ((found, rule) for pattern, rule in compiled if (found := pattern.fullmatch(name))), (None, None)
        )
        if match is None or rule is None:
            report.unknown.append(name)
        elif rule.to is None:
            report.dropped.append((name, rule.why))
        else:
            new = match.expand(rule.to)
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
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)}, which no tensor of this name has: this is another kind of "
            "checkpoint, or a damaged one"
        ) from error


def require_weights(tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse what cannot be weights: whole numbers, quantised or sparse tensors, NaN and infinity.

    Args:
        tensors: by name; of those without values ("meta") only the types are looked at.
        source: what the checkpoint is called in messages.

    Raises:
        CheckpointError: names some of them.
    """
    kinds = [
        f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
        for name, tensor in tensors.items()
        if tensor.dtype not in _DTYPES or tensor.layout != torch.strided
    ]
    if kinds:
        raise CheckpointError(
            f"{source} holds tensors that are no plain floating-point numbers: {', '.join(kinds[:_SHOWN])}. It is "
            "quantised or damaged; give the file as published"
        )
    broken = [name for name, tensor in tensors.items() if not (tensor.is_meta or tensor.isfinite().all())]
    if broken:
        raise CheckpointError(
            f"{source} holds numbers that are not finite in {', '.join(broken[:_SHOWN])}: it is damaged"
        )
