"""The license of weights that derive from several parts: SPDX expressions joined, and the conditions that follow.

This reads license names, not license texts, and is not legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from bindllm.errors import UsageError
from bindllm.model.card import Part, licenses_in

UNKNOWN = "LicenseRef-unknown"
"""Stands for a part whose license no file names."""

CODE = ("code", "bindllm", "Apache-2.0")
"""The row of the code that loads the weights."""

# Creative Commons licenses in a sentence, such as "CC BY-SA 4.0" and "CC-BY-NC 4.0 (no commercial use)".
_CREATIVE_COMMONS = re.compile(r"\bCC[- ](BY(?:[- ](?:NC|SA|ND))*)[- ](\d\.\d)\b", re.IGNORECASE)
# The name of a license that is not in the SPDX list, such as llama3.
_NAME = re.compile(r"[A-Za-z0-9.-]+")
_PERMISSIVE = re.compile(r"Apache|MIT|BSD|0BSD|ISC|Zlib|Unlicense|CC0|CC-BY-\d|PSF|Python")
_COPYLEFT = re.compile(r"(?:A|L)?GPL-|MPL-|EUPL-|OSL-|ODbL-|CDDL-|EPL-|CC-BY(?:-NC)?-SA-")
# Names that the Hub lists under `license`, in lower case (https://huggingface.co/docs/hub/repositories-licenses).
_ON_THE_HUB = re.compile(
    r"apache-2\.0|mit|bsd-[23]-clause|isc|zlib|unlicense|cc0-1\.0|cc-by-[234]\.[05]|cc-by-sa-[34]\.0|cc-by-nc-[234]\.0|"
    r"cc-by-nd-4\.0|cc-by-nc-nd-[34]\.0|cc-by-nc-sa-[234]\.0|a?gpl-3\.0|gpl-2\.0|lgpl-(?:2\.1|3\.0)|mpl-2\.0"
)


@dataclass(frozen=True)
class Licensed:
    """A part of a model with its license.

    Args:
        part: decoder, encoder, training data, trained weights or code.
        license: the words of its file; empty if no file names a license.
    """

    part: str
    name: str
    license: str
    expression: str


@dataclass(frozen=True)
class Combined:
    """The license of the whole.

    Args:
        expression: SPDX expression: the terms of all parts hold together.
        warnings: sentences about licenses that are unknown, or that may exclude each other.
        hub: ``license`` and, for ``other``, ``license_name`` and ``license_link`` in the metadata of the Hub.
    """

    expression: str
    conditions: list[str]
    warnings: list[str]
    hub: dict[str, str]


def license_parts(
    parts: Iterable[Part], folders: Mapping[str, Path], *, origin: str, given: Mapping[str, str]
) -> list[Licensed]:
    """Return the license of each part: the given one, else the one that its folder names.

    Args:
        folders: where the folder of each part is now, by its folder in the checkpoint.
        origin: words about the source of converted weights; empty if there are none.

    Raises:
        UsageError: a given license that is not an SPDX expression, or of an unknown part.
    """
    parts, rows = list(parts), []
    known = {name for part in parts for name in (part.part, part.name, part.folder)}
    for name, expression in given.items():
        if name not in known:
            raise UsageError(
                f"--license {name}={expression}: no such part; the parts are {', '.join(sorted(known - {''}))}"
            )
    for part in parts:
        found = next((given[name] for name in (part.name, part.folder, part.part) if name in given), None)
        words = licenses_in(str(folders[part.folder])) if found is None and part.folder else [found or ""]
        expression = _join(_given(found) if found else spdx(text) for text in words or [""])
        rows.append(Licensed(part.part, part.name, ", ".join(filter(None, words)), expression))
    if origin:
        rows.append(Licensed("trained weights", "converted", origin, spdx(origin)))
    return [*rows, Licensed(*CODE, CODE[-1])]


def _given(expression: str) -> str:
    try:
        return canonicalize_license_expression(expression)
    except InvalidLicenseExpression as error:
        raise UsageError(
            f"--license {expression}: not an SPDX expression ({error}); write Apache-2.0 or LicenseRef-NAME"
        ) from error


def spdx(text: str) -> str:
    """Return the SPDX expression of a license in words.

    Examples:
        >>> spdx("apache-2.0"), spdx("CC BY-SA 4.0"), spdx("llama3"), spdx("ask us")
        ('Apache-2.0', 'CC-BY-SA-4.0', 'LicenseRef-llama3', 'LicenseRef-unknown')
        >>> spdx("made from weights under CC-BY-NC 4.0")
        'LicenseRef-unknown AND CC-BY-NC-4.0'
    """
    # "CC-BY-NC 4.0 (no commercial use)", "Apache 2.0 License".
    words = re.sub(r"(?i)\s+(?:software )?license$", "", re.sub(r"\(.*\)$", "", text).strip())
    for candidate in (text, words, words.replace(" ", "-")):
        try:
            return canonicalize_license_expression(candidate)
        except InvalidLicenseExpression:
            continue
    if _NAME.fullmatch(words):
        return f"LicenseRef-{words}"
    # A sentence: its conditions must not be lost, and the rest is unknown.
    named = [
        f"CC-{kind}-{version}".upper().replace(" ", "-") for kind, version in _CREATIVE_COMMONS.findall(text)
    ]
    return _join([UNKNOWN, *named])


def combine(rows: Iterable[Licensed]) -> Combined:
    """Combine the licenses of all parts: every term holds, so the strictest one decides.

    Examples:
        >>> rows = [Licensed("decoder", "a", "", "Apache-2.0"), Licensed("training data", "b", "", "CC-BY-SA-4.0")]
        >>> combine(rows).expression, combine(rows).hub
        ('Apache-2.0 AND CC-BY-SA-4.0', {'license': 'cc-by-sa-4.0'})
    """
    rows = list(rows)
    # The part that each license comes from, for the sentences below.
    source = {name: row for row in reversed(rows) for name in _names(row.expression)}
    strict = sorted(name for name in source if not _PERMISSIVE.match(name))
    conditions, warnings = [], []
    for words, found in (
        ("Non-commercial use only", [n for n in strict if "-NC" in n or "Noncommercial" in n]),
        ("No derivatives may be shared", [n for n in strict if "-ND" in n]),
        ("Share under the same license", copyleft := [n for n in strict if _COPYLEFT.match(n)]),
    ):
        conditions += [f"{words}: {name} of {_of(source[name])}." for name in found]
    if len(copyleft) > 1:
        warnings.append(
            f"{' and '.join(copyleft)} each ask for the same license: whether both can be kept is a legal question."
        )
    for row in rows:
        names = _names(row.expression)
        if UNKNOWN in names:
            told = f'its files say "{row.license}"' if row.license else "no file names it"
            warnings.append(f"The license of {_of(row)} is unknown: {told}.")
        elif other := [n for n in names if not (_PERMISSIVE.match(n) or _COPYLEFT.match(n) or "-N" in n)]:
            warnings.append(f"{', '.join(other)} of {_of(row)} has terms that are not known here: read them.")
        if " OR " in row.expression:
            warnings.append(f"{row.expression} of {_of(row)} leaves a choice, which is not made here.")
    expression = _join(row.expression for row in rows)
    return Combined(expression, conditions, warnings, _on_the_hub(expression, strict))


def _on_the_hub(expression: str, strict: list[str]) -> dict[str, str]:
    """Return the metadata of the Hub: a single strict license covers the permissive ones next to it."""
    names = strict or _names(expression)
    name = names[0].removesuffix("-only").removesuffix("-or-later").lower()
    if len(names) == 1 and _ON_THE_HUB.fullmatch(name):
        return {"license": name}
    slug = re.sub(r"[^a-z0-9.-]+", "-", expression.lower()).strip("-")
    return {"license": "other", "license_name": slug, "license_link": "LICENSE.md"}


def _of(row: Licensed) -> str:
    return f"the {row.part} (`{row.name}`)"


def _names(expression: str) -> list[str]:
    """Return the licenses in an expression."""
    words = re.sub(r"\bWITH \S+", "", expression).replace("(", " ").replace(")", " ").split()
    return [word for word in words if word not in ("AND", "OR")]


def _join(expressions: Iterable[str]) -> str:
    """Join expressions with AND, each once."""
    terms = dict.fromkeys(
        f"({term})" if " OR " in term and not term.startswith("(") else term
        for expression in expressions
        for term in ([expression] if " OR " in expression else expression.split(" AND "))
    )
    return " AND ".join(terms)
