"""From a checkpoint folder to the parts of a model: configs, decoder, encoders, and their fingerprint checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bindllm.cache.blend import CacheConfig
from bindllm.encoders.fusion import common_size
from bindllm.errors import CheckpointError, EncoderError, InputError, UsageError
from bindllm.imports import resolve_path
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.checkpoint import (
    CACHE,
    MANIFEST,
    build_object,
    home_of,
    read_manifest,
    read_weights,
    resolve_cache,
)
from bindllm.model.decoder import DecoderConfig, fingerprint_decoder
from bindllm.model.injection import InjectConfig

if TYPE_CHECKING:
    from bindllm.encoders import Encoder


def read_parts(
    folder: str | Path,
    *,
    decoder: str | None,
    dtype: str | None,
    allow: Sequence[str],
    encoders: Sequence[Encoder] = (),
    quantize: str | bool | None = None,
) -> tuple[DecoderConfig, dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint folder and check that decoder and encoders are those it was trained with.

    Args:
        folder: the checkpoint.
        decoder: folder of the decoder, if it is not at the path that the checkpoint names.
        dtype: another precision of the decoder.
        allow: encoder classes outside bindllm that may be imported.
        encoders: additional encoders, for modalities that the checkpoint's encoders do not serve.
        quantize: as for `read_decoder`.

    Returns:
        the decoder's config; the other arguments of `BindLLM.build`; the trained tensors.
    """
    # Cheap checks first: configs, decoder fingerprint, encoders, and the weights last.
    manifest = read_manifest(folder)
    parts = read_configs(folder, manifest)
    config = read_decoder(folder, manifest, decoder=decoder, dtype=dtype, quantize=quantize)
    parts["encoders"] = read_encoders(folder, manifest, allow=allow)
    _add_encoders(parts["encoders"], encoders)
    return config, parts, read_weights(folder, manifest)


def read_configs(folder: str | Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the configs of a checkpoint: ``bind``, ``inject``, ``adapter``, ``cache_config`` and ``origin``.

    Raises:
        CheckpointError: the manifest lacks an entry.
    """
    try:
        return {
            "bind": BindConfig(**manifest["bind"]),
            "inject": InjectConfig(**manifest["inject"]),
            # null in the manifest: the decoder is not tuned.
            "adapter": AdapterConfig(**tuned) if (tuned := manifest.get("adapter")) else None,
            "cache_config": read_cache_config(folder, manifest),
            "origin": manifest.get("origin", ""),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from error


def read_decoder(
    folder: str | Path,
    manifest: dict[str, Any],
    *,
    decoder: str | None = None,
    dtype: str | None = None,
    quantize: str | bool | None = None,
) -> DecoderConfig:
    """Return the config of a checkpoint's decoder, its path resolved from here, and check its fingerprint.

    Args:
        folder: the checkpoint.
        manifest: its content.
        decoder: folder of the decoder, if it is not at the path that the checkpoint names.
        dtype: another precision than in training.
        quantize: another quantization than in training; None: the same, False: none.

    Raises:
        CheckpointError: the decoder is another one, or the manifest lacks an entry.
    """
    try:
        saved = manifest["decoder"]
        config = DecoderConfig(
            name=decoder or resolve_path(saved["name"], home_of(folder, manifest)),
            dtype=dtype or saved["dtype"],
            revision=saved["revision"],
            system=saved["system"],
            template=saved.get("template"),
            # None keeps the setting of the training, False becomes none.
            quantize=saved.get("quantize") if quantize is None else quantize or None,
        )
        # Checked for a given decoder too: bind vectors mean something to one decoder only.
        fingerprint = saved["fingerprint"]
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from error
    _check_fingerprint("decoder", config.name, fingerprint_decoder(config.folder()), fingerprint)
    return config


def read_encoders(folder: str | Path, manifest: dict[str, Any], *, allow: Sequence[str]) -> list[Encoder]:
    """Build the encoders that a checkpoint names.

    Raises:
        CheckpointError: one is missing, or is not the one that the checkpoint was trained with.
    """
    # Paths are resolved for all encoders before the first one is built.
    built, expected = [], encoder_fingerprints(folder, manifest)
    try:
        home = home_of(folder, manifest)
        entries = [
            (
                entry["class_path"],
                {name: resolve_path(value, home) for name, value in entry["init_args"].items()},
            )
            for entry in manifest["encoders"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from error
    for (class_path, arguments), fingerprint in zip(entries, expected, strict=True):
        try:
            encoder = build_object({"class_path": class_path, "init_args": arguments}, allow=allow)
            found = encoder.fingerprint()
        # An error about an encoder should name the file in which it is listed.
        except EncoderError as error:
            raise CheckpointError(
                f"{error}; it is named under encoders in {Path(folder) / MANIFEST}"
            ) from error
        _check_fingerprint("encoder", class_path, found, fingerprint)
        built.append(encoder)
    return built


def encoder_fingerprints(folder: str | Path, manifest: dict[str, Any]) -> list[str]:
    """Return the fingerprints of the encoders that a checkpoint was trained with.

    Raises:
        CheckpointError: the manifest lacks an entry.
    """
    try:
        return [entry["fingerprint"] for entry in manifest["encoders"]]
    except (KeyError, TypeError) as error:
        raise _damaged(folder, error) from error


def read_cache_config(folder: str | Path, manifest: dict[str, Any]) -> CacheConfig | None:
    """Return the visual cache that a checkpoint names, its folder resolved from here, or None.

    Raises:
        CheckpointError: the entry cannot be read.
    """
    entry = manifest.get("cache")
    if entry is None:
        return None
    try:
        return CacheConfig(**{**entry, "folder": resolve_cache(entry["folder"], folder, manifest)})
    except (KeyError, TypeError, InputError) as error:
        raise CheckpointError(
            f"{Path(folder) / MANIFEST}: the entry cache is damaged ({error}); build and name it again with "
            f"`bindllm index FOLDER --name_in {folder}`"
        ) from error


def new_cache_config(checkpoint: str | Path, place: str, encoder: Encoder) -> CacheConfig:
    """Return the entry of a checkpoint for a visual cache of this encoder; its settings stay as they are there.

    Args:
        checkpoint: the checkpoint folder.
        place: folder of the cache, or path of an embedded Milvus.
        encoder: embeds the images of the cache.

    Raises:
        CheckpointError: the checkpoint has another encoder.
        UsageError: the cache would be lost when the checkpoint is saved again.
        InputError: the place is the address of a server, which no checkpoint may name.
    """
    manifest = read_manifest(checkpoint)
    known = encoder_fingerprints(checkpoint, manifest)
    if encoder.fingerprint() not in known:
        raise CheckpointError(
            f"{checkpoint} was trained with the encoder {', '.join(name[:16] for name in known)}, and this is "
            f"{encoder.fingerprint()[:16]}: it cannot use a cache of another encoder. Leave out --name_in, or give "
            f"--checkpoint {checkpoint}"
        )
    inside, home = Path(checkpoint, CACHE).resolve(), Path(checkpoint).resolve()
    if Path(place).resolve().is_relative_to(home) and not Path(place).resolve().is_relative_to(inside):
        raise UsageError(
            f"{place} would be lost when {checkpoint} is saved again; inside a checkpoint the cache is called "
            f"{Path(checkpoint, CACHE)}"
        )
    try:
        before = read_cache_config(checkpoint, manifest)
    except CheckpointError:
        # A new entry replaces the damaged one.
        before = None
    return CacheConfig(place) if before is None else replace(before, folder=place)


def _add_encoders(own: list[Encoder], further: Sequence[Encoder]) -> None:
    """Append additional encoders to those of a checkpoint.

    Raises:
        InputError: an encoder has another embedding size, or would never be asked.
    """
    for encoder in further:
        # The first encoder that serves a modality is the one that is asked.
        served = {modality for one in own for modality in one.modalities}
        if not set(encoder.modalities) - served:
            raise InputError(
                f"{type(encoder).__name__} would never be asked: {', '.join(encoder.modalities)} is served already by "
                "the encoders before it, and a model asks the first that serves a modality"
            )
        own.append(encoder)
    # One bind network serves all encoders, so they must share E.
    common_size(own)


def _damaged(folder: str | Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder}: the manifest lacks or misspells {error}; copy the whole folder again")


def _check_fingerprint(part: str, name: str, found: str, expected: str) -> None:
    if found != expected:
        advice = "with decoder=FOLDER" if part == "decoder" else "at the path that bindllm.json names"
        raise CheckpointError(
            f"the {part} {name!r} is not the one that this checkpoint was trained with (fingerprint {found[:12]}, "
            f"expected {expected[:12]}): its answers would mean nothing. Give the original {part} {advice}."
        )
