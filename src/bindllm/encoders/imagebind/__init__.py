"""ImageBind: images, video, text, audio, depth maps, thermal images and IMU signals in one joint space.

Six frozen trunks (https://arxiv.org/abs/2305.05665, sections 3 and 4), written from the published facts and equal to
the published results. The published weights are licensed CC-BY-NC 4.0: not for commercial use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bindllm.encoders import Embedded, fingerprint, once
from bindllm.encoders.imagebind.clips import audio_input, video_input
from bindllm.encoders.imagebind.config import (
    CONFIG,
    HUGE,
    TRUNK_OF,
    ImageBindConfig,
    how_to_convert,
    read_config,
)
from bindllm.encoders.imagebind.inputs import depth_input, image_input, imu_input, thermal_input
from bindllm.encoders.imagebind.network import (
    Trunk,
    average_views,
    cut_views,
    load_trunk,
    run_views,
    trunk_file,
)
from bindllm.encoders.imagebind.text import Tokenizer
from bindllm.errors import EncoderError, InputError, MediaError, check_choice, did_you_mean
from bindllm.media import Media

Coverage = Literal["published", "full"]
Dtype = Literal["float32", "bfloat16", "float16"]
Scale = Literal["unit", "published"]

# Raise the number when other numbers come out for the same media: stored embeddings are then computed again.
_REVISION = "imagebind 2"

_TOKENIZER = "tokenizer.json"


class ImageBind:
    """ImageBind's trunks over a converted folder; a trunk is loaded at its first use.

    Args:
        weights: folder made by ``bindllm convert imagebind``.
        modalities: those to serve; None: all that the folder has trunks for, and texts if it has the tokenizer. Media
            of another modality are refused, and their weights do not count in the fingerprint.
        coverage: how much of an audio or video file is used: "published" takes three clips of two seconds of audio and
            five of a video, whatever the length; "full" lays clips over the whole file.
        max_clips: with "full": most clips of one file.
        depth_baseline: meters between the two lenses of the depth camera, for turning meters into disparity.
        depth_focal: focal length of that camera, in pixels.
        dtype: precision of weights and activations; embeddings are float32 in any case.
        scale: "unit" gives embeddings of norm 1; "published" those of the released model, each view stretched by
            the modality's factor (text up to 100) and averaged, not of norm 1: for comparisons, not for training.

    Raises:
        InputError: an option that does not exist.
        EncoderError: the folder has a ``config.json`` that does not describe ImageBind.

    Examples:
        >>> encoder = ImageBind("checkpoints/imagebind", modalities=["image", "audio"])
        >>> encoder.modalities, encoder.embedding_size
        (('image', 'audio'), 1024)
    """

    space = "imagebind"
    """Encoders of one space were trained together: their embeddings can be compared and fused."""

    def __init__(
        self,
        weights: str = "checkpoints/imagebind",
        *,
        modalities: Sequence[str] | None = None,
        coverage: Coverage = "published",
        max_clips: int = 64,
        depth_baseline: float = 0.075,
        depth_focal: float = 518.86,
        dtype: Dtype = "float32",
        scale: Scale = "unit",
    ) -> None:
        # How to read this: options are checked, then kept in `config`, from which the encoder can be rebuilt; no
        # weight is read.
        for name, value, known in (
            ("coverage", coverage, Coverage),
            ("dtype", dtype, Dtype),
            ("scale", scale, Scale),
        ):
            check_choice(name, value, get_args(known))
        if type(max_clips) is not int or max_clips < 1:
            raise InputError(f"max_clips={max_clips!r} is not a whole number above 0")
        if not (0 < depth_baseline < math.inf and 0 < depth_focal < math.inf):
            raise InputError(f"depth_baseline={depth_baseline} and depth_focal={depth_focal} must be above 0")
        self.config: dict[str, Any] = {
            "weights": str(weights),
            "modalities": None if modalities is None else list(modalities),
            "coverage": coverage,
            "max_clips": max_clips,
            "depth_baseline": depth_baseline,
            "depth_focal": depth_focal,
            "dtype": dtype,
            "scale": scale,
        }
        self._folder = Path(weights)
        # A recipe is read before its folder is made; the sizes are then those of the published model.
        self._sizes = read_config(self._folder) if (self._folder / CONFIG).exists() else HUGE
        self.modalities = _choose(modalities, self._sizes, self._folder)
        self.embedding_size = self._sizes.embedding_size
        self._device = torch.device("cpu")
        self._trunks: dict[str, Trunk] = {}
        self._fingerprint: str | None = None

    @property
    def token_sizes(self) -> dict[str, int]:
        """The width of its trunk for each modality."""
        return {name: self._sizes.trunks[TRUNK_OF[name]].width for name in self.modalities}

    def fingerprint(self) -> str:
        """Return the sha256 of everything that affects the embeddings of the served modalities.

        That is the content of their trunks' files, the tokenizer if texts are served, the options that touch
        them, the revision of the preprocessing, and the dtype: half precision turns an embedding by about a degree, and
        a store or an index must not mix the two kinds unnoticed.

        Raises:
            EncoderError: weights are missing.
        """
        # How to read this: one hash over trunks, tokenizer and options, limited to the served modalities.
        if self._fingerprint is None:
            sizes = self._read_sizes()
            trunks = sorted({TRUNK_OF[modality] for modality in self.modalities})
            settings: dict[str, Any] = {name: self.config[name] for name in self._settings()}
            settings["trunks"] = {trunk: sizes.sizes(trunk) for trunk in trunks}
            files = [trunk_file(self._folder, trunk) for trunk in trunks]
            files += [self._require_tokenizer()] if "text" in self.modalities else []
            self._fingerprint = fingerprint(settings, _REVISION, *files)
        return self._fingerprint

    def to(self, device: torch.device | str) -> Self:
        """Move the trunks, those loaded now and those loaded later, to a device."""
        self._device = torch.device(device)
        for trunk in self._trunks.values():
            trunk.to(self._device)
        return self

    def prepare(self, media: Media) -> Tensor:
        """Return one media as its trunk takes it.

        Returns:
            image: uint8 [3, 224, 224]; video: float32 [S, 3, 2, 224, 224], S clips times three crops; audio: float32
            [S, 1, 128, 204], S clips; depth and thermal: float32 [1, 224, 224]; imu: float32 [6, 2000]; text: int64
            [77].

        Raises:
            InputError: a modality that is not served.
            MediaError: the media cannot be read.
            EncoderError: a text, and the folder has no tokenizer.
        """
        self._require(media.modality)
        clips = {name: self.config[name] for name in ("coverage", "max_clips")}
        match media.modality:
            case "image":
                return image_input(media.source)
            case "video":
                return video_input(media.source, **clips)
            case "audio":
                return audio_input(media.source, **clips)
            case "depth":
                baseline, focal = self.config["depth_baseline"], self.config["depth_focal"]
                return depth_input(media.source, baseline=baseline, focal=focal)
            case "thermal":
                return thermal_input(media.source)
            case "imu":
                return imu_input(media.source)
            case _:
                return self._encode_text(media)

    # jsonargparse compares the last annotation with `Encoder`; the two overloads describe both results.
    @overload
    def embed(self, modality: str, inputs: Sequence[Tensor], *, tokens: Literal[False] = False) -> Tensor: ...

    @overload
    def embed(self, modality: str, inputs: Sequence[Tensor], *, tokens: Literal[True]) -> Embedded: ...

    def embed(self, modality: str, inputs: Sequence[Tensor], *, tokens: bool = False) -> Tensor:
        """Return the embeddings of prepared media: [B, E], float32, norm 1 (see ``scale``), on the encoder's device.

        The embedding of several views (clips, crops) is the mean of their unit embeddings, normalized again.

        Args:
            modality: one of ``modalities``.
            inputs: B prepared tensors, each one view or [S, ...] with S views, S free for each. 8-bit images and
                frames are normalized here; float ones are taken as normalized. Square images of another size
                than 224 are taken too.
            tokens: also return the output of the trunk's last block, before the head's norm, in the dtype of the
                weights: image [16, 16, D]; depth and thermal [14, 14, D]; video [S, 16, 16, D]; audio
                [S, 12, 19, D]; imu [250, D]; text up to its end token, [T, D].

        Raises:
            InputError: a modality that is not served, or tensors of another shape.
            EncoderError: the weights are missing or do not fit.
        """
        self._require(modality)
        views, counts = cut_views(modality, inputs)
        trunk = self._trunk(TRUNK_OF[modality])
        # A trainer's autocast would change the embeddings, and the fingerprint would not show it.
        with torch.autocast(self._device.type, enabled=False):
            embedded, sequences = run_views(trunk, modality, views, keep_tokens=tokens)
            # Clips and crops are unit vectors; their mean is shorter, so it is normalized again.
            means = average_views(embedded, counts)
            embeddings = (
                F.normalize(means, dim=-1) if self.config["scale"] == "unit" else means * trunk.scale()
            )
        if not tokens:
            return embeddings
        # Tokens come as one flat list of views; each media takes as many as it has views.
        waiting = iter(sequences)
        return Embedded(
            embeddings, [_join(modality, [next(waiting) for _ in range(count)]) for count in counts]
        )

    def blocks(self, modality: str) -> list[nn.Module]:
        """Return the blocks of the trunk of a modality, in order."""
        self._require(modality)
        return list(self._trunk(TRUNK_OF[modality]).blocks)

    def _require(self, modality: str) -> None:
        if modality not in self.modalities:
            # Text is served only with a tokenizer; its absence is the likeliest cause.
            if modality == "text" and self.config["modalities"] is None:
                self._require_tokenizer()
            raise InputError(
                f"this ImageBind does not serve {modality!r} media. {did_you_mean(modality, self.modalities)}"
            )

    def _trunk(self, name: str) -> Trunk:
        # Threads that share an encoder must not load a trunk each.
        with once.lock:
            if name not in self._trunks:
                sizes = self._read_sizes()
                dtype = getattr(torch, self.config["dtype"])
                self._trunks[name] = load_trunk(self._folder, name, sizes, dtype=dtype, device=self._device)
        return self._trunks[name]

    def _read_sizes(self) -> ImageBindConfig:
        # The folder may have been written since the constructor assumed the published sizes.
        sizes = read_config(self._folder)
        if sizes != self._sizes:
            raise EncoderError(
                f"{self._folder}: the folder was written after this encoder was made, and has other sizes than it "
                "was taken to have; create the encoder again"
            )
        return sizes

    def _settings(self) -> list[str]:
        """Return the options that change the embeddings of the modalities served."""
        # An option of a modality that is not served must not make stored embeddings useless.
        served = set(self.modalities)
        names = ["dtype", "scale"]
        if served & {"audio", "video"}:
            names.append("coverage")
            # Without full coverage the number of clips is fixed, so the option changes nothing.
            names += ["max_clips"] if self.config["coverage"] == "full" else []
        return names + (["depth_baseline", "depth_focal"] if "depth" in served else [])

    @once
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self._require_tokenizer())

    def _encode_text(self, media: Media) -> Tensor:
        try:
            return self._tokenizer.encode(str(media.source), name=media.name)
        except InputError as error:
            # One text that cannot be read must not lose the others of a run.
            raise MediaError(f"{media.name}: {error}") from error

    def _require_tokenizer(self) -> Path:
        file = self._folder / _TOKENIZER
        if not file.is_file():
            raise EncoderError(
                f"{file}: texts need the tokenizer. {how_to_convert(self._folder)}; or leave 'text' out of `modalities`"
            )
        return file


def _join(modality: str, views: list[Tensor]) -> Tensor:
    """Return the tokens of all views of one media on one grid."""
    if views[0].dim() == 2:
        return torch.cat(views)
    # Audio and video keep the axis of their clips even for one clip, so that positions mean the same for all lengths.
    return torch.stack(views) if modality in ("audio", "video") or len(views) > 1 else views[0]


def _choose(wanted: Sequence[str] | None, sizes: ImageBindConfig, folder: Path) -> tuple[str, ...]:
    """Return the modalities to serve, each once."""
    served = sizes.modalities
    if wanted is None:
        # A folder may have been converted without the tokenizer, to do without texts.
        can_read = not (folder / CONFIG).exists() or (folder / _TOKENIZER).exists()
        return tuple(name for name in served if name != "text" or can_read)
    if isinstance(wanted, str) or not wanted:
        raise InputError(
            f"modalities must be a list of names such as ['image', 'audio'], or null, not {wanted!r}"
        )
    for name in wanted:
        if name not in TRUNK_OF:
            raise InputError(f"modalities: ImageBind has no {name!r}. {did_you_mean(str(name), TRUNK_OF)}")
        if name not in served:
            raise InputError(
                f"modalities: {folder} has no {TRUNK_OF[name]} trunk, so no {name!r}. {did_you_mean(name, served)}"
            )
    return tuple(dict.fromkeys(wanted))
