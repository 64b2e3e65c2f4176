"""From a checkpoint folder to the parts of a model: configs, decoder, encoders, and their fingerprint checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bindllm.atomic import not_finite
from bindllm.cache.blend import CacheConfig
from bindllm.cache.visual_cache import choose_cache
from bindllm.embeddings.datastore import READS_NO_RECORDS, open_datastore
from bindllm.encoders import check_members
from bindllm.encoders.fusion import common_size
from bindllm.encoders.trainable import Tuned
from bindllm.errors import CheckpointError, DecoderError, EncoderError, InputError, UsageError
from bindllm.imports import resolve_path
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bind_network import BindConfig
from bindllm.model.checkpoint import (
    CACHE,
    DATASTORE,
    MANIFEST,
    build_object,
    home_of,
    read_manifest,
    read_tuned,
    read_weights,
    resolve_cache,
)
from bindllm.model.context import ContextConfig
from bindllm.model.decoder import DecoderConfig, default_device, fingerprint_decoder
from bindllm.model.groups import ENCODERS
from bindllm.model.injection import InjectConfig

if TYPE_CHECKING:
    from bindllm.encoders import Encoder
    from bindllm.model.bindllm import BindLLM


_FILES = ["*.json", "*.safetensors", "*.md", "*.yaml", "*.tsv", "*.jsonl", "*.faiss", "*.keys"]
"""Files of a checkpoint folder that are downloaded: code and pickles never are."""


def load_model(
    kind: type[BindLLM],
    folder: str | Path,
    parts: dict[str, Any],
    *,
    device: str | None,
    cache: Any,
    tokens: int | None,
    datastore: Any,
    records: int | None,
) -> BindLLM:
    """Return the model of a checkpoint folder; arguments as for `BindLLM.from_pretrained`."""
    # Before minutes of loading.
    device = find_device(device)
    if (revision := parts.pop("revision")) is not None:
        folder = _download(str(folder), revision)
    config, parts, found = read_parts(folder, **parts)
    # Before the decoder, which may take minutes to load, and before memory is taken for sizes of the manifest.
    empty = kind.build_empty(config, **parts)
    empty.check_trainable_state(found, source=str(folder))
    empty.bind.num_tokens = tokens = empty.bind.num_tokens if tokens is None else tokens
    # A cache or a datastore holds embeddings, so it must come from these encoders.
    known = [encoder.fingerprint() for encoder in parts["encoders"]]
    opened = choose_cache(cache, parts["cache_config"], known, checkpoint=folder)
    own = None if parts["context"] is None else Path(folder, DATASTORE)
    store = open_datastore(datastore, parts["encoders"], own=own)
    if records and own is None:
        raise InputError(READS_NO_RECORDS)
    model = kind.build(config, device=device, is_probed=True, **parts)
    # Every tensor must match by name and shape, so that a wrong checkpoint fails here.
    model.load_trainable_state(found, source=str(folder))
    if config.tuned and (wrong := not_finite(dict(model.decoder.named_parameters()))):
        raise CheckpointError(
            f"{folder} has decoder weights that are not finite in {config.dtype}: {wrong}. Give another dtype "
            "(bfloat16 has the range of float32)"
        )
    model.cache, model.bind.num_tokens, model.datastore = opened, tokens, store
    if records is not None and own is not None:
        model.context.num_records = records
    return model.eval()


def find_device(device: str | torch.device | None) -> str:
    """Return the name of a device that torch can compute on: the given one, or `default_device`.

    Raises:
        InputError: torch cannot compute there.
    """
    if device is None:
        return default_device()
    try:
        torch.zeros(1, device=device)
    # A driver, a build of torch or an unknown word: each raises an exception of its own.
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise InputError(
            f"device {device}: torch cannot compute there ({why}); leave it out for {default_device()}"
        ) from error
    return str(device)


def _download(name: str, revision: str) -> Path:
    """Return the local copy of a checkpoint on the hub; of its files, only those that a checkpoint has."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    # Without a network, an account or such a name, each library raises errors of its own.
    except Exception as error:
        raise CheckpointError(
            f"{name!r} at revision {revision!r} could not be downloaded ({type(error).__name__}: {error}). Give the id "
            "of a model on the hub and a commit; for a local folder leave revision out"
        ) from error


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
        decoder: folder of the decoder, if it is not at the path that the checkpoint names.
        allow: encoder classes outside bindllm that may be imported.
        encoders: additional encoders, for modalities that the checkpoint's encoders do not serve.

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
    """Return the configs of a checkpoint: ``bind``, ``inject``, ``adapter``, ``context``, ``cache_config``, ``origin``.

    Raises:
        CheckpointError: the manifest lacks an entry, or a value is out of its range.
    """
    with _entries(folder):
        return {
            "bind": BindConfig(**manifest["bind"]),
            "inject": InjectConfig(**manifest["inject"]),
            # null in the manifest: the decoder is not tuned.
            "adapter": AdapterConfig(**tuned) if (tuned := manifest.get("adapter")) else None,
            "context": ContextConfig(**sizes) if (sizes := manifest.get("context")) else None,
            "cache_config": read_cache_config(folder, manifest),
            "origin": manifest.get("origin", ""),
        }


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
        decoder: folder of the decoder, if it is not at the path that the checkpoint names.
        dtype: another precision than in training.
        quantize: another quantization than in training; None: the same, False: none.

    Raises:
        CheckpointError: the decoder is another one, or the manifest lacks an entry.
        InputError: an unknown dtype or quantization.
    """
    with _entries(folder):
        entry = {**manifest["decoder"]}
        # Checked for a given decoder too: bind vectors mean something to one decoder only.
        fingerprint = entry.pop("fingerprint")
        saved = DecoderConfig(**entry)
        name = decoder or resolve_path(str(saved.name), home_of(folder, manifest))
    # None keeps the setting of the training, False becomes none.
    quantize = saved.quantize if quantize is None else quantize or None
    # Kernels suit the device and the rows of the training: flash_attention_2 cannot run everywhere, and eager takes
    # memory by the square of a prompt.
    kernels = {"attention": None, "compile": False}
    config = replace(saved, name=name, dtype=dtype or saved.dtype, quantize=quantize, **kernels)
    try:
        found = fingerprint_decoder(config.folder())
    except DecoderError as error:
        if decoder is not None:
            raise
        raise DecoderError(
            f"{error} {Path(folder) / MANIFEST} names it; if it is elsewhere, give decoder=FOLDER, or --decoder FOLDER"
        ) from error
    _check_fingerprint("decoder", config.name, found, fingerprint)
    return config


def read_encoders(folder: str | Path, manifest: dict[str, Any], *, allow: Sequence[str]) -> list[Encoder]:
    """Build the encoders that a checkpoint names.

    Raises:
        CheckpointError: one is missing, or is not the one that the checkpoint was trained with.
    """
    # Paths are resolved for all encoders before the first one is built.
    with _entries(folder):
        home = home_of(folder, manifest)
        entries = [
            {**entry, "init_args": _resolved(entry["init_args"], home)} for entry in manifest["encoders"]
        ]
    built = []
    tuned = read_tuned(folder, manifest, ENCODERS)
    for number, (entry, fingerprint) in enumerate(
        zip(entries, encoder_fingerprints(folder, manifest), strict=True)
    ):
        try:
            encoder = build_object(entry, allow=allow)
            if isinstance(encoder, Tuned):
                # Before the fingerprint, which covers them.
                prefix = f"{number}."
                own = {name.removeprefix(prefix): x for name, x in tuned.items() if name.startswith(prefix)}
                encoder.load(own, source=str(folder))
            found = encoder.fingerprint()
        # An error about an encoder should name the file in which it is listed.
        except EncoderError as error:
            raise CheckpointError(
                f"{error}; it is named under encoders in {Path(folder) / MANIFEST}"
            ) from error
        _check_fingerprint("encoder", entry["class_path"], found, fingerprint)
        built.append(encoder)
    return built


def _resolved(arguments: dict[str, Any], home: Path) -> dict[str, Any]:
    """Return the arguments of an encoder, and of one that is within it, with their paths resolved from here."""
    return {
        name: _resolved(x, home) if isinstance(x, dict) else resolve_path(x, home)
        for name, x in arguments.items()
    }


def encoder_fingerprints(folder: str | Path, manifest: dict[str, Any]) -> list[str]:
    """Return the fingerprints of the encoders that a checkpoint was trained with.

    Raises:
        CheckpointError: the manifest lacks an entry.
    """
    with _entries(folder):
        return [entry["fingerprint"] for entry in manifest["encoders"]]


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
        place: folder of the cache, or path of an embedded Milvus.

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
        check_members(encoder)
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


@contextmanager
def _entries(folder: str | Path) -> Iterator[None]:
    """Turn errors about the entries of a manifest, which anybody may have written, into one that names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, InputError) as error:
        raise CheckpointError(
            f"{Path(folder) / MANIFEST}: an entry is missing, misspelled or out of its range ({error}); copy the whole "
            "folder again"
        ) from error


def _check_fingerprint(part: str, name: str, found: str, expected: str) -> None:
    if found != expected:
        advice = "with decoder=FOLDER"
        if part == "encoder":
            # The fingerprint also covers how this version turns files into pixels and samples.
            advice = (
                "at the path that bindllm.json names. If its files are unchanged, this version of bindllm prepares "
                "media differently: train again, or use the version that trained the checkpoint"
            )
        raise CheckpointError(
            f"the {part} {name!r} is not the one that this checkpoint was trained with (fingerprint {found[:12]}, "
            f"expected {expected[:12]}): its answers would mean nothing. Give the original {part} {advice}."
        )
