"""The bill of materials of a checkpoint: one CycloneDX 1.6 file with its models, data and software.

https://cyclonedx.org/docs/1.6/json/
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

from packaging.requirements import Requirement

from bindllm import __version__
from bindllm.card.licenses import UNKNOWN, Combined, Licensed, spdx

BILL_FILE = "bom.cdx.json"

_KINDS = {"decoder": "machine-learning-model", "encoder": "machine-learning-model", "training data": "data"}
_CLASSIFIER = "License :: OSI Approved :: "


def bill_of_materials(
    name: str, manifest: Mapping[str, Any], rows: Sequence[Licensed], combined: Combined
) -> dict[str, Any]:
    """Return the content of the file.

    The same checkpoint in the same environment gives the same file: it has no time of writing.
    """
    # An adapter and tuned parts have files of their own, so checkpoints of one bind network differ in these.
    hashes = [str(value) for name, value in sorted(manifest.items()) if name.endswith("_sha256")]
    weights = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    prints = {"decoder": [manifest["decoder"]["fingerprint"]]}
    prints["encoder"] = [entry["fingerprint"] for entry in manifest["encoders"]]
    parts = [_part(n, row, prints) for n, row in enumerate(rows) if row.part in _KINDS]
    packages = [_package(found) for found in installed_packages()]
    root = {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": weights}],
        "licenses": [{"expression": combined.expression}],
    }
    tool = {"type": "application", "name": "bindllm", "version": __version__}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        # Of the weights, so that equal checkpoints have equal files.
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'sha256:{weights}')}",
        "version": 1,
        "metadata": {"component": root, "tools": {"components": [tool]}},
        "components": [*parts, *packages],
        "dependencies": [{"ref": "model", "dependsOn": [part["bom-ref"] for part in (*parts, *packages)]}],
    }


def _part(number: int, row: Licensed, prints: Mapping[str, list[str]]) -> dict[str, Any]:
    properties = [{"name": "bindllm:part", "value": row.part}]
    if own := prints.get(row.part):
        # In the order of the manifest, as the rows are.
        properties.append({"name": "bindllm:fingerprint", "value": own.pop(0)})
    return {
        "type": _KINDS[row.part],
        "bom-ref": f"part-{number}",
        "name": row.name,
        "licenses": [{"expression": row.expression}],
        "properties": properties,
    }


def _package(found: Distribution) -> dict[str, Any]:
    name, version = re.sub(r"[-_.]+", "-", found.name).lower(), found.version
    purl = f"pkg:pypi/{name}@{version}"
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "purl": purl,
        "licenses": [{"expression": license_of_package(found)}],
    }


def license_of_package(found: Distribution) -> str:
    """Return the SPDX expression of an installed package, from its metadata."""
    if expression := found.metadata.get("License-Expression"):
        return spdx(expression)
    # A long text is the license itself, not its name; then its classifier has the name.
    words = found.metadata.get("License") or ""
    classes = [
        line.rpartition(" :: ")[2] for line in found.metadata.get_all("Classifier", []) if _CLASSIFIER in line
    ]
    return next(
        (known for text in (words, *classes) if len(text) < 80 and (known := spdx(text)) != UNKNOWN), UNKNOWN
    )


def installed_packages(name: str = "bindllm") -> Iterable[Distribution]:
    """Return a package and those that it requires, directly or not, as they are installed, sorted by name."""
    found: dict[str, Distribution] = {}
    waiting = [name]
    while waiting:
        name = waiting.pop()
        try:
            package = distribution(name)
        except PackageNotFoundError:
            # Of an optional platform, or a source tree that was never installed.
            continue
        if package.name.lower() in found:
            continue
        found[package.name.lower()] = package
        requirements = [Requirement(line) for line in package.requires or ()]
        waiting += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [found[key] for key in sorted(found)]
