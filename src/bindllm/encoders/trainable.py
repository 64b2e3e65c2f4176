"""Trained parts of encoders: the towers of aligned encoders, and encoders whose blocks are tuned with a model.

The base of an aligned encoder is a frozen encoder, or a network that was trained for it: a `torch.nn.Module` with the
members of `TrainableTower`, by its import path. A tuned encoder is any encoder with `HasBlocks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from bindllm.encoders import Encoder, HasBlocks, HasTokens, fingerprint, members_of, once, shape_problems
from bindllm.errors import EncoderError, InputError, listed, needs_extra
from bindllm.imports import build_named
from bindllm.media import Media


class TrainableTower(Protocol):
    """A network from prepared media of one modality to vectors; also a `torch.nn.Module`.

    In evaluation mode it is deterministic, and a row depends only on its own input. The constructor is cheap
    and draws the initial weights; trained ones come from the aligned encoder's folder.
    """

    modality: str
    """Its input: a name from `bindllm.media.MODALITIES`, or any other lower-case word."""

    embedding_size: int
    """W, the width of its vectors."""

    revision: str
    """A word such as "my-tower 1": raise the number when `prepare` or `forward` give other numbers."""

    config: Mapping[str, Any]
    """Keywords of the constructor, plain JSON."""

    def prepare(self, media: Any) -> Tensor:
        """Return one media as a CPU tensor; `MediaError` when it cannot be read."""
        ...

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return a changed copy of a prepared media, for one training step; all chance comes from ``generator``."""
        ...

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return [B, W] for B prepared (or augmented) media, which may differ in shape."""
        ...


# By role, for a message that lists the missing members. A tower with the members of an encoder is one.
_KINDS = {"a frozen encoder": Encoder, "a trainable tower": TrainableTower}


@runtime_checkable
class CanMix(Protocol):
    """A tower that can mix two media, such as two recordings that belong to one image."""

    def mix(self, first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
        """Return a prepared media that contains both."""
        ...


def is_trainable(tower: Any) -> bool:
    """Return whether a tower is trainable; a frozen encoder is not.

    Raises:
        EncoderError: the tower is neither; lists the missing members.

    Examples:
        >>> is_trainable("a tower")
        Traceback (most recent call last):
        ...
        bindllm.errors.EncoderError: str is not a tower. As a frozen encoder it lacks modalities, embedding_size, ...
    """
    kind = type(tower)
    lacks = {
        role: [name for name in members_of(protocol) if name not in dir(tower)]
        for role, protocol in _KINDS.items()
    }
    # An encoder first: it may be a torch.nn.Module too, and must still stay frozen.
    if not lacks["a frozen encoder"]:
        return False
    if not lacks["a trainable tower"] and isinstance(tower, torch.nn.Module):
        return True
    if not lacks["a trainable tower"]:
        raise EncoderError(f"{kind.__name__} is not a tower: a trainable one is a torch.nn.Module too")
    reasons = "; ".join(f"as {role} it lacks {', '.join(names)}" for role, names in lacks.items())
    raise EncoderError(f"{kind.__name__} is not a tower. {reasons[0].upper()}{reasons[1:]}")


def build_tower(class_path: str, init_args: Mapping[str, Any], *, allow: Sequence[str]) -> Encoder | Any:
    """Build the tower that an aligned encoder's folder names.

    Args:
        allow: import paths outside ``bindllm.`` that may be imported. It replaces any ``allow`` in ``init_args``.

    Raises:
        EncoderError: the class is not allowed, does not exist, is not a tower, or cannot be built.
    """
    return build_named(class_path, init_args, allow=allow, problem=_not_a_tower, failure=EncoderError)


def _not_a_tower(kind: Any) -> str:
    """Return why something is not the class of a tower: an untrusted folder may name any class and any arguments."""
    # Only methods are on the class: attributes may be set in the constructor.
    methods = [set(members_of(protocol, methods=True)) for protocol in _KINDS.values()]
    fits = isinstance(kind, type) and any(names <= set(dir(kind)) for names in methods)
    return "" if fits else "not the class of a tower, which is an encoder or a trainable tower"


class Tuned:
    """An encoder whose last blocks are trained together with a model, by `model.trainable: [encoders]`.

    The trained tensors are part of the checkpoint, and of the fingerprint: stores and caches of the untrained encoder
    are refused. Norms, stems and heads outside of the blocks stay frozen.

    Args:
        encoder: ``class_path`` and ``init_args`` of the encoder; it has `HasBlocks`.
        blocks: number of trained blocks, counted from the last; None: all.
        rank: rank of LoRA matrices (arXiv 2106.09685) next to each linear projection of these blocks; None: the blocks
            themselves are trained.
        modality: the modality whose blocks are trained, if the encoder serves several.
        allow: import paths of classes outside bindllm that ``encoder`` may name. Loading ignores the value in a file.

    Attributes:
        settings: ``blocks``, ``rank`` and ``modality``.

    Raises:
        InputError: no ``class_path``, or a number below 1.

    Example:
        Tuned({"class_path": "bindllm.encoders.EfficientNetLite"}, blocks=4).parameters()["0.project.convolution.bias"]
    """

    def __init__(
        self,
        encoder: dict[str, Any],
        *,
        blocks: int | None = None,
        rank: int | None = None,
        modality: str | None = None,
        allow: list[str] | None = None,
    ) -> None:
        if not isinstance(encoder, Mapping) or not isinstance(encoder.get("class_path"), str):
            given = repr(encoder) if isinstance(encoder, Mapping | str) else f"a {type(encoder).__name__}"
            raise InputError(
                "Tuned takes an encoder as {class_path: bindllm.encoders.EfficientNetLite, init_args: {...}}, not "
                f"{given}"
            )
        for name, value in (("blocks", blocks), ("rank", rank)):
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(
                    f"Tuned has {name} {value!r}, expected a whole number of at least 1, or null"
                )
        self._entry, self._allow = dict(encoder), tuple(allow or ())
        self.settings = {"blocks": blocks, "rank": rank, "modality": modality}
        self.config: dict[str, Any] = {"encoder": self._entry, **self.settings}
        self.config |= {"allow": list(allow)} if allow else {}

    @once
    def base(self) -> Encoder:
        """The encoder whose blocks are trained.

        Raises:
            InputError: it has no blocks, or serves several modalities or another one than the setting names.
        """
        made = build_tower(self._entry["class_path"], self._entry.get("init_args") or {}, allow=self._allow)
        if isinstance(made, Tuned):
            raise InputError("Tuned is around another Tuned: name the encoder itself in it")
        name, served, chosen = type(made).__name__, made.modalities, self.settings["modality"]
        if not isinstance(made, HasBlocks):
            raise InputError(
                f"{name} has no blocks that can be trained (a method `blocks`, see bindllm.encoders.HasBlocks), as "
                "EfficientNetLite, HuggingFace, ImageBind, PointBind and SentenceTransformers do; use it without Tuned"
            )
        if chosen not in served and not (chosen is None and len(served) == 1):
            raise InputError(
                f"Tuned trains the blocks of one modality, and {name} serves {', '.join(served)}: set its modality to "
                f"one of them, not {chosen!r}"
            )
        return made

    @property
    def modality(self) -> str:
        """The modality whose blocks are trained."""
        served = self.base.modalities
        return self.settings["modality"] or served[0]

    @property
    def modalities(self) -> Sequence[str]:
        """Those of the encoder."""
        return self.base.modalities

    @property
    def embedding_size(self) -> int:
        """That of the encoder."""
        return self.base.embedding_size

    @property
    def token_sizes(self) -> Mapping[str, int]:
        """Those of the encoder."""
        return self.base.token_sizes if isinstance(self.base, HasTokens) else {}

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name, such as ``0.attention.weight`` in the first trained block."""
        return dict(self._parameters)

    def load(self, tensors: Mapping[str, Tensor], *, source: str) -> None:
        """Copy trained tensors into the blocks.

        Raises:
            EncoderError: names or shapes do not match.
        """
        shapes = ({name: x.shape for name, x in part.items()} for part in (self._parameters, tensors))
        if problems := shape_problems(*shapes):
            raise EncoderError(f"{source} does not fit {self._entry['class_path']}: {listed(problems)}")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[name])

    def fingerprint(self) -> str:
        """Return the sha256 of the encoder's fingerprint, the settings and the trained tensors, as they are now."""
        named = [(name, x.detach().cpu().contiguous()) for name, x in self._parameters.items()]
        content = [
            part for name, x in named for part in (name, x.flatten().view(torch.uint8).numpy().tobytes())
        ]
        return fingerprint(self.settings, "tuned 1", self.base.fingerprint(), *content)

    def to(self, device: torch.device | str) -> Self:
        """Move the encoder to a device."""
        self.base.to(device)
        return self

    def prepare(self, media: Media) -> Tensor:
        """Return one media as the encoder prepares it."""
        return self.base.prepare(media)

    def embed(self, modality: str, inputs: Sequence[Tensor], **options: Any) -> Any:
        """Return the result of the encoder with its trained blocks; with a gradient while these are trained.

        Raises:
            EncoderError: the encoder computes no gradient.
        """
        # LoRA matrices are put into the blocks when the parameters are first asked for.
        is_trained = any(parameter.requires_grad for parameter in self._parameters.values())
        found = self.base.embed(modality, inputs, **options)
        embeddings = found if isinstance(found, Tensor) else found.embeddings
        if (
            torch.is_grad_enabled()
            and is_trained
            and not embeddings.requires_grad
            and modality == self.modality
        ):
            raise EncoderError(
                f"embed of {type(self.base).__name__} computes no gradient, so its blocks cannot be trained: remove "
                "torch.no_grad from it, and freeze its parameters by requires_grad_(False)"
            )
        return found

    @once
    def _parameters(self) -> dict[str, nn.Parameter]:
        # A model may be built without weights around it, on the meta device.
        with torch.device("cpu"):
            every, blocks = self.base.blocks(self.modality), self.settings["blocks"]
            if len(every) < (blocks or 1):
                raise InputError(
                    f"Tuned has blocks {blocks}, and {type(self.base).__name__} has {len(every)} of them for "
                    f"{self.modality} media: set a smaller number"
                )
            chosen = every[-(blocks or len(every)) :]
            if self.settings["rank"] is not None:
                self._add_matrices(chosen)
        found = {
            f"{number}.{name.replace('.default.', '.')}": parameter
            for number, block in enumerate(chosen)
            for name, parameter in block.named_parameters()
            if self.settings["rank"] is None or ".lora_" in name
        }
        if {parameter.dtype for parameter in found.values()} != {torch.float32}:
            raise InputError(
                f"{type(self.base).__name__} runs in half precision, in which small training steps would vanish: set "
                "its dtype to float32"
            )
        for parameter in found.values():
            parameter.requires_grad_(False)
        return found

    def _add_matrices(self, blocks: Sequence[nn.Module]) -> None:
        """Put LoRA matrices next to the linear projections of the blocks; they change nothing before training."""
        with needs_extra("peft", extra="adapter", purpose="train an encoder by LoRA"):
            from peft import LoraConfig, inject_adapter_in_model
        # The same initial matrices in every run, and no change of the caller's random state.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for block in blocks:
                # Exactly this class: torch's own attention reads the weight of another one without calling it.
                paths = [path for path, part in block.named_modules() if path and type(part) is nn.Linear]
                if not paths:
                    raise InputError(
                        f"Tuned has a rank, and the blocks of {type(self.base).__name__} have no linear projections: "
                        "leave rank out, so that the blocks themselves are trained"
                    )
                rank = self.settings["rank"]
                inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=paths), block)


def tuned_encoders(encoders: Sequence[Encoder]) -> dict[int, Tuned]:
    """Return the encoders of a model that are trained with it, by their index."""
    return {number: encoder for number, encoder in enumerate(encoders) if isinstance(encoder, Tuned)}
