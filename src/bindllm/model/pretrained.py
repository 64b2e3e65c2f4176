"""What a checkpoint folder says of a model, and the way back from a folder to the parts of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bindllm import __version__
from bindllm.checkpoint.folder import MANIFEST, build_object, read_manifest, read_weights, resolve_path
from bindllm.errors import CheckpointError, EncoderError
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.decoder import DecoderConfig, find_folder, fingerprint_decoder
from bindllm.model.injection import InjectConfig

if TYPE_CHECKING:
    from bindllm.model.bindllm import BindLLM


def describe(model: BindLLM) -> dict[str, Any]:
    """Return what identifies a model: its configs, its decoder and encoders with their fingerprints."""
    return {
        "bindllm": __version__,
        "decoder": {**asdict(model.config), "fingerprint": fingerprint_decoder(find_folder(model.config))},
        "encoders": [
            {
                "class_path": f"{type(encoder).__module__}.{type(encoder).__qualname__}",
                "init_args": encoder.config,
                "fingerprint": encoder.fingerprint(),
            }
            for encoder in model.encoders
        ],
        "bind": asdict(model.bind_config),
        "inject": asdict(model.inject_config),
        "adapter": None if model.adapter is None else asdict(model.adapter.config),
        "origin": model.origin,
    }


def read_parts(
    folder: str | Path, *, decoder: str | None, dtype: str | None, allow: Sequence[str]
) -> tuple[DecoderConfig, dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint folder and check that decoder and encoders are those it was trained with.

    Args:
        folder: the checkpoint.
        decoder: where the decoder is, if not at the place that the checkpoint names.
        dtype: another precision of the decoder.
        allow: encoder classes outside bindllm that may be imported.

    Returns:
        the decoder's config; the other arguments of `BindLLM.build`; the trained tensors.
    """
    manifest = read_manifest(folder)
    try:
        saved, entries = manifest["decoder"], manifest["encoders"]
        config = DecoderConfig(
            name=decoder or resolve_path(saved["name"], folder, manifest),
            dtype=dtype or saved["dtype"],
            revision=saved["revision"],
            system=saved["system"],
            template=saved.get("template"),
        )
        parts = {
            "bind": BindConfig(**manifest["bind"]),
            "inject": InjectConfig(**manifest["inject"]),
            "adapter": AdapterConfig(**tuned) if (tuned := manifest.get("adapter")) else None,
            "origin": manifest.get("origin", ""),
        }
        expected = [saved["fingerprint"], *(entry["fingerprint"] for entry in entries)]
        arguments = [
            {name: resolve_path(value, folder, manifest) for name, value in entry["init_args"].items()}
            for entry in entries
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: the manifest lacks or misspells {error}; copy the whole folder again"
        ) from error
    _check_fingerprint("decoder", config.name, fingerprint_decoder(find_folder(config)), expected[0])
    parts["encoders"] = []
    for entry, values, fingerprint in zip(entries, arguments, expected[1:], strict=True):
        try:
            encoder = build_object({**entry, "init_args": values}, allow=allow)
            found = encoder.fingerprint()
        except EncoderError as error:
            raise CheckpointError(
                f"{error}; it is named under encoders in {Path(folder) / MANIFEST}"
            ) from error
        _check_fingerprint("encoder", entry["class_path"], found, fingerprint)
        parts["encoders"].append(encoder)
    return config, parts, read_weights(folder, manifest)


def _check_fingerprint(what: str, name: str, found: str, expected: str) -> None:
    if found != expected:
        advice = "with decoder=FOLDER" if what == "decoder" else "at the place that bindllm.json names"
        raise CheckpointError(
            f"the {what} {name!r} is not the one that this checkpoint was trained with (fingerprint {found[:12]}, "
            f"expected {expected[:12]}): its answers would mean nothing. Give the original {what} {advice}."
        )
