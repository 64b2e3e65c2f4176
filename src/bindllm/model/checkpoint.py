"""The checkpoint folder: one directory, safetensors and JSON only, written whole or not at all.

    bindllm.json        format version, every config, decoder and encoders with their fingerprints
    bind.safetensors    bind network, gates and queries; frozen weights are referenced, never copied
    decoder.safetensors, encoders.safetensors   weights of a decoder, or of blocks of encoders, that are trained
    cache/              optional: a visual cache that travels with the checkpoint; stays when it is saved again
    datastore/          if the model reads retrieved records: those that it answers with
    adapter/            if the decoder is tuned: adapter_config.json and adapter_model.safetensors, peft's own files
    README.md           model card
    conversion.tsv      if foreign weights were converted: the outcome for each of their tensors
    recipe.yaml, metrics.json, report.html ...   added by a training run

Loading never unpickles. It builds only encoders under ``bindllm.`` unless the caller allows others by name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bindllm import __version__
from bindllm.atomic import (
    atomic_folder,
    check_replaceable,
    file_sha256,
    read_json,
    read_tensors,
    set_aside_name,
    write_json,
    write_tensors,
)
from bindllm.embeddings.datastore import Datastore
from bindllm.encoders import Encoder, members_of, shape_problems
from bindllm.encoders.trainable import Tuned
from bindllm.errors import CheckpointError, UsageError, did_you_mean, listed
from bindllm.imports import build_named
from bindllm.model.card import write_card
from bindllm.model.decoder import fingerprint_decoder

if TYPE_CHECKING:
    from bindllm.model.bindllm import BindLLM

# Raise the number when older versions of bindllm cannot read a new checkpoint.
FORMAT = 1
MANIFEST = "bindllm.json"
WEIGHTS = "bind.safetensors"
ADAPTER = "adapter"
CACHE = "cache"
DATASTORE = "datastore"
ADAPTER_WEIGHTS = f"{ADAPTER}/adapter_model.safetensors"
_ADAPTER_CONFIG = f"{ADAPTER}/adapter_config.json"
ADAPTER_PREFIX = "adapter."
"""Prefix of an adapter's tensors, before the name that peft gives them."""

# Groups of trained weights of the base, by the prefix of their tensors. Each has a file of its own.
_TUNED = ("decoder", "encoders")

# Endings of files that may hold pickles. A checkpoint never has them, so one means that the folder was tampered with.
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}


def save_model(
    model: BindLLM, folder: str | Path, *, data: list[str] | None, files: Mapping[str, str] | None
) -> None:
    """Write the checkpoint folder of a model; arguments as for `BindLLM.save_pretrained`."""
    manifest = model.describe()
    write_checkpoint(
        folder,
        manifest,
        model.trainable_state(),
        write_card(manifest, data=data),
        adapter_config=None if model.adapter is None else model.adapter.peft_config(),
        files=files,
        datastore=model.datastore,
    )


def push_model(
    model: BindLLM, name: str, *, private: bool = True, message: str = "Upload a bindllm checkpoint"
) -> str:
    """Upload the checkpoint folder of a model to the hub of Hugging Face.

    The frozen decoder and encoders are named in it, not uploaded.

    Args:
        model: the model.
        name: id of the repository, such as ``me/scenes``; made if it does not exist.
        private: whether a new repository is private.
        message: the commit message.

    Returns:
        the commit, to be given as ``revision`` of `BindLLM.from_pretrained`.

    Raises:
        CheckpointError: the upload fails.
    """
    from huggingface_hub import HfApi

    with TemporaryDirectory() as home:
        model.save_pretrained(Path(home, "checkpoint"))
        api = HfApi()
        try:
            api.create_repo(name, private=private, exist_ok=True)
            return api.upload_folder(
                repo_id=name, folder_path=Path(home, "checkpoint"), commit_message=message
            ).oid
        # A server may fail in any way.
        except Exception as error:
            raise CheckpointError(
                f"the upload to {name!r} has failed ({type(error).__name__}: {error}). Log in with `hf auth login`, "
                "and use an id such as me/scenes"
            ) from error


def write_checkpoint(
    folder: str | Path,
    manifest: dict[str, Any],
    tensors: Mapping[str, Tensor],
    card: str,
    *,
    adapter_config: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
    datastore: Datastore | None = None,
) -> None:
    """Write a checkpoint folder in one step; an existing checkpoint there is replaced, anything else refused.

    Args:
        manifest: JSON-able content of ``bindllm.json``; format, hashes of the weights and root are added.
        tensors: trainable tensors by name; those of the adapter have the prefix ``adapter.`` before peft's name.
        adapter_config: content of peft's ``adapter_config.json``, if the model has an adapter.
        files: text of further files by name, such as ``conversion.tsv`` of a conversion.
        datastore: the records that the model answers with, if it reads any. None: an earlier datastore there stays.

    Raises:
        CheckpointError: the folder exists and is not a checkpoint of ours.
    """
    folder = Path(folder)
    check_replaceable(folder, MANIFEST, CheckpointError, kind="a bindllm checkpoint")
    # The adapter goes into a folder of its own, which plain peft can load.
    rest = dict(tensors)
    tuned, *others = (_take(rest, group) for group in (ADAPTER, *_TUNED))
    assert bool(tuned) == (adapter_config is not None), "an adapter's tensors and its config go together"
    cache = {"cache": _keep_path(entry, folder)} if (entry := manifest.get("cache")) else {}
    with atomic_folder(folder) as part:
        if (folder / CACHE).is_dir():
            # Files of an index are replaced and never written again, so both folders may share them for a while.
            shutil.copytree(folder / CACHE, part / CACHE, copy_function=_link)
        write_tensors(part / WEIGHTS, rest)
        if datastore is not None:
            datastore.save(part / DATASTORE)
        elif manifest.get("context") and (folder / DATASTORE).is_dir():
            # The model was loaded without its records.
            shutil.copytree(folder / DATASTORE, part / DATASTORE, copy_function=_link)
        hashes = {"weights_sha256": file_sha256(part / WEIGHTS)}
        if adapter_config is not None:
            (part / ADAPTER).mkdir()
            write_tensors(part / ADAPTER_WEIGHTS, tuned)
            write_json(part / _ADAPTER_CONFIG, adapter_config)
            hashes["adapter_sha256"] = file_sha256(part / ADAPTER_WEIGHTS)
        for group, named in zip(_TUNED, others, strict=True):
            if named:
                write_tensors(part / f"{group}.safetensors", named)
                hashes[f"{group}_sha256"] = file_sha256(part / f"{group}.safetensors")
        # Relative paths in the manifest start at this directory, so a project may be moved as a whole.
        root = os.path.relpath(Path.cwd(), folder.resolve())
        write_json(part / MANIFEST, {"format": FORMAT, **manifest, **cache, **hashes, "root": root})
        (part / "README.md").write_text(card, encoding="utf-8")
        for name, text in (files or {}).items():
            (part / name).write_text(text, encoding="utf-8")


def _take(tensors: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    """Remove the tensors of a group, and return them without its prefix."""
    names = [name for name in tensors if name.startswith(f"{group}.")]
    return {name.removeprefix(f"{group}."): tensors.pop(name) for name in names}


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read and check ``bindllm.json``.

    Raises:
        CheckpointError: the folder or its manifest is missing, the format is newer, or the folder holds a pickle.
    """
    folder = Path(folder)
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give its folder, {str(folder.parent)!r}")
    if not folder.is_dir():
        if (aside := set_aside_name(folder)).is_dir():
            raise CheckpointError(
                f"a save into {folder} was killed just as it took the place of the earlier checkpoint, which is whole "
                f"in {aside}: rename it to {folder.name}, or save again"
            )
        hint = " For a model on the hub, give its revision too." if len(folder.parts) == 2 else ""
        raise CheckpointError(f"checkpoint folder {str(folder)!r} does not exist. {_siblings(folder)}{hint}")
    # Before the search below: another folder may be large, and hold pickles rightly.
    manifest = read_json(
        folder / MANIFEST, CheckpointError, "without it a folder is not a bindllm checkpoint"
    )
    # Refused even though nothing here would open them: another tool might.
    pickles = sorted(file.name for file in folder.rglob("*") if file.suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder} holds {listed(pickles)}: such files can run code when opened, and no bindllm checkpoint "
            "has them. Remove them, or load a folder from a source you trust."
        )
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format", 0), int):
        raise CheckpointError(
            f"{folder / MANIFEST} is not the description of a checkpoint: expected an object whose format is a "
            f"number, not {json.dumps(manifest)[:80]}"
        )
    # Newer formats are refused, older ones are read.
    if manifest.get("format", 0) > FORMAT:
        raise CheckpointError(
            f"{folder} has format {manifest['format']}, this bindllm reads up to {FORMAT}: upgrade bindllm"
        )
    return manifest


def name_cache(folder: str | Path, entry: Mapping[str, Any] | None) -> None:
    """Write into an existing checkpoint which visual cache it answers with, in one step.

    Args:
        entry: ``folder`` of the cache, relative to the current directory, and settings; None: no cache.

    Raises:
        CheckpointError: the checkpoint does not exist.
    """
    manifest = read_manifest(folder)
    if entry is not None:
        entry = _keep_path(entry, folder, root=home_of(folder, manifest))
    write_json(Path(folder) / MANIFEST, {**manifest, "cache": entry})


def read_weights(folder: str | Path, manifest: dict[str, Any]) -> dict[str, Tensor]:
    """Read the trained tensors, and check their files against the hashes in the manifest."""
    tensors = read_tensors(Path(folder) / WEIGHTS, manifest.get("weights_sha256"), CheckpointError)
    if "adapter_sha256" in manifest:
        tuned = read_tensors(Path(folder) / ADAPTER_WEIGHTS, manifest["adapter_sha256"], CheckpointError)
        tensors |= {ADAPTER_PREFIX + name: tensor for name, tensor in tuned.items()}
    for group in _TUNED:
        tensors |= {f"{group}.{name}": tensor for name, tensor in read_tuned(folder, manifest, group).items()}
    return tensors


def read_tuned(folder: str | Path, manifest: dict[str, Any], group: str) -> dict[str, Tensor]:
    """Read the trained weights of the decoder or the encoders, as `read_weights`, without prefix; {} if frozen."""
    sha256 = manifest.get(f"{group}_sha256")
    return (
        {} if sha256 is None else read_tensors(Path(folder) / f"{group}.safetensors", sha256, CheckpointError)
    )


def check_keys(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], *, source: str) -> None:
    """Refuse tensors that do not match name by name and shape by shape.

    Raises:
        CheckpointError: names the missing, unexpected and misshapen tensors, and those of integers.
    """
    shapes = ({name: tensors[name].shape for name in sorted(tensors)} for tensors in (expected, found))
    problems = shape_problems(*shapes)
    problems += [f"{name} holds {x.dtype}" for name, x in found.items() if not x.is_floating_point()]
    if problems:
        raise CheckpointError(f"{source} does not fit this model: {listed(problems, 20, separator='; ')}")


def home_of(folder: str | Path, manifest: dict[str, Any]) -> Path:
    """Return the directory in which a checkpoint was made: relative paths of its manifest start there."""
    return Path(folder) / manifest.get("root", ".")


def resolve_cache(value: str, folder: str | Path, manifest: dict[str, Any]) -> str:
    """Return the path of a checkpoint's visual cache relative to the current directory.

    A relative one is looked up in the checkpoint's own folder first, so that a checkpoint can travel with its cache,
    then like all paths (see `bindllm.imports.resolve_path`).
    """
    if "://" in value:
        return value
    # The checkpoint's own folder first: a cache that was copied with it must win over one of the same name here.
    candidates = [Path(folder) / value, Path(value), home_of(folder, manifest) / value]
    return os.path.relpath(found) if (found := next((p for p in candidates if p.exists()), None)) else value


def build_object(entry: dict[str, Any], *, allow: Sequence[str] = ()) -> Any:
    """Build the encoder that a manifest names by ``class_path`` and ``init_args``.

    Args:
        allow: import paths that the caller trusts, such as ``"my_lab.RadarEncoder"``; others must be classes of
            encoders below ``bindllm.``. It replaces any ``allow`` in ``init_args``.

    Raises:
        CheckpointError: the class is not allowed, does not exist, is not an encoder, or cannot be imported or built.
    """
    # As in `build_named`.
    allow = (allow,) if isinstance(allow, str) else allow
    return build_named(
        path := entry.get("class_path"),
        entry.get("init_args", {}),
        allow=allow,
        # The caller knows what an allowed path leads to; bindllm itself holds more than encoders.
        problem=lambda kind: "" if path in allow else _not_an_encoder(kind),
        failure=CheckpointError,
    )


def build_own(entry: Mapping[str, Any], *, allow: Sequence[str] = ()) -> Any:
    """Build an encoder that the user names, on the command line or in a recipe; its own ``allow`` counts.

    Args:
        entry: ``{"class_path": ..., "init_args": {...}}``.
        allow: further classes outside bindllm that may be imported.

    Raises:
        CheckpointError: the class does not exist or cannot be built.
        UsageError: ``allow`` is not a list of import paths.
    """
    own = entry.get("init_args", {}).get("allow") or []
    if not isinstance(own, list) or not all(isinstance(path, str) for path in own):
        raise UsageError(f"allow must be a list of import paths, such as [my_lab.RadarTower], not {own!r}")
    # The user typed this class path, so it is trusted; a path from a file is not.
    return build_object(dict(entry), allow=[entry["class_path"], *allow, *own])


def describe_model(model: BindLLM) -> dict[str, Any]:
    """Return the manifest of a model: its configs, its decoder and encoders with their fingerprints."""
    configs = {
        "bind": model.bind_config,
        "inject": model.inject_config,
        "adapter": None if model.adapter is None else model.adapter.config,
        "context": None if model.context is None else model.context.config,
        "cache": model.cache_config,
    }
    return {
        "bindllm": __version__,
        "decoder": {**asdict(model.config), "fingerprint": fingerprint_decoder(model.config.folder())},
        "encoders": describe_encoders(model.encoders),
        **{name: None if config is None else asdict(config) for name, config in configs.items()},
        "origin": model.origin,
    }


def fingerprint_checkpoint(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the hash of everything that decides an answer, the same for a folder and for the model loaded from it.

    Paths and versions do not count: a moved project keeps its fingerprint.

    Args:
        manifest: content of ``bindllm.json``, or the description of a model.
    """
    decoder = {
        key: manifest["decoder"].get(key)
        for key in ("fingerprint", "dtype", "system", "template", "quantize")
    }
    # A later setting counts only where it is set, so that earlier folders keep their fingerprints.
    if options := manifest["decoder"].get("template_options"):
        decoder["template_options"] = options
    encoders = [(entry["class_path"], entry["fingerprint"]) for entry in manifest["encoders"]]
    configs = [manifest.get(key) for key in ("bind", "inject", "adapter", "context")]
    digest = hashlib.sha256(json.dumps([decoder, encoders, configs], sort_keys=True, default=str).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def describe_encoders(encoders: Sequence[Encoder]) -> list[dict[str, Any]]:
    """Return the entries of encoders in a manifest, for `build_object`, with their fingerprints.

    An encoder that is trained with the model has the fingerprint of its frozen encoder too, as ``base``.
    """
    return [
        {
            "class_path": f"{type(encoder).__module__}.{type(encoder).__qualname__}",
            "init_args": encoder.config,
            "fingerprint": encoder.fingerprint(),
            **({"base": encoder.base.fingerprint()} if isinstance(encoder, Tuned) else {}),
        }
        for encoder in encoders
    ]


def _not_an_encoder(kind: Any) -> str:
    """Return why something is not the class of an encoder. An untrusted folder may name any function."""
    if not isinstance(kind, type):
        return "not a class"
    methods = members_of(Encoder, methods=True)
    lacking = [name for name in methods if not callable(getattr(kind, name, None))]
    return f"a class without {', '.join(lacking)}" if lacking else ""


def _keep_path(entry: Mapping[str, Any], folder: str | Path, *, root: Path | None = None) -> dict[str, Any]:
    """Return the entry of a cache with its path in the form of a manifest.

    Inside the checkpoint it is relative to that, an absolute one stays so, and others are relative to the directory in
    which the checkpoint was made.
    """
    path, home = Path(entry["folder"]), Path(folder).resolve()
    if path.resolve().is_relative_to(home):
        return {**entry, "folder": path.resolve().relative_to(home).as_posix()}
    if root is None or path.is_absolute():
        return dict(entry)
    # Resolved, so that the relative path does not depend on a link that leads to the checkpoint.
    return {**entry, "folder": os.path.relpath(path, root.resolve())}


def _link(source: str, target: str) -> None:
    """Hard-link a file; copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _siblings(folder: Path) -> str:
    """List the checkpoints next to a folder that does not exist."""
    parent = folder.parent
    # A missing folder is often a misspelled one.
    names: Iterable[str] = (f.parent.name for f in parent.glob(f"*/{MANIFEST}")) if parent.is_dir() else ()
    return did_you_mean(folder.name, names)
