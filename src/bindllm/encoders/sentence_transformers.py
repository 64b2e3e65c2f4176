"""Any model of sentence-transformers 5.4 or later as an encoder: texts, and images, audio and videos if it serves them.

Unlike `HuggingFace`, the pipeline of the folder is run as it is: dense layers, routers, prompts and Matryoshka.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bindllm.atomic import read_json
from bindllm.encoders import fingerprint, once
from bindllm.encoders.families import find_blocks
from bindllm.encoders.hub import find_folder, loading, never_ask
from bindllm.errors import EncoderError, InputError, MediaError, check_choice, needs_extra
from bindllm.media import Media, open_image
from bindllm.media.audio import cut_audio
from bindllm.media.limits import warn
from bindllm.media.video import read_frames

# Raise the number when other numbers come out for the same media: stored embeddings are then computed again.
_REVISION = "sentence-transformers 2"

_SERVED = ("text", "image", "audio", "video")
_OWN = "sentence_transformers."
_SETTINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".vocab")
"""Endings of the settings, the tokenizer and the chat template of a folder."""
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class SentenceTransformers:
    """A folder of sentence-transformers as an encoder.

    Images are opened as everywhere in bindllm. Audio is mono, and used whole. Videos give frames from the middles of
    equal parts. Only safetensors are read, and no code of the folder is run.

    Args:
        name: a folder with ``modules.json``, or the id of a model on the hub.
        revision: commit of a model on the hub; needed for an id.
        modalities: the modalities to serve, out of the model's; by default all.
        dimensions: keep only the first numbers of a vector (Matryoshka); None: all.
        prompt: text before each text, such as ``query: ``; None: the model's own default.
        audio_rate: samples a second of the audio that the model reads.
        frames: frames of a video.
        dtype: "float32" or "bfloat16"; None: that of the folder. A `Tuned` encoder needs float32.
        space: name of the joint space, when it is that of other encoders; by default one of its own.

    Raises:
        InputError: a number below 1.

    Example:
        SentenceTransformers("checkpoints/minilm-l6")
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str | None = None,
        modalities: list[str] | None = None,
        dimensions: int | None = None,
        prompt: str | None = None,
        audio_rate: int = 16_000,
        frames: int = 16,
        dtype: Literal["float32", "bfloat16"] | None = None,
        space: str | None = None,
    ) -> None:
        for key, value in (("dimensions", dimensions), ("audio_rate", audio_rate), ("frames", frames)):
            if value is not None and value < 1:
                raise InputError(f"{key} is {value}, expected at least 1")
        if dtype is not None:
            check_choice("dtype", dtype, ("float32", "bfloat16"))
        self.config: dict[str, Any] = {
            "name": str(name),
            "revision": revision,
            "modalities": None if modalities is None else list(modalities),
            "dimensions": dimensions,
            "prompt": prompt,
            "audio_rate": audio_rate,
            "frames": frames,
            "dtype": dtype,
            "space": space,
        }
        self.space = space or (f"{name}@{revision}" if revision else str(name))
        self._device = torch.device("cpu")

    @property
    def modalities(self) -> tuple[str, ...]:
        """The model's modalities, or the requested part of them; loads the model.

        Raises:
            EncoderError: the model does not serve a requested modality.
        """
        served = tuple(name for name in _SERVED if self._model.supports(name))
        chosen = self.config["modalities"]
        if other := [name for name in chosen or () if name not in served]:
            raise EncoderError(f"{self._name} does not serve {', '.join(other)}, only {', '.join(served)}")
        return served if chosen is None else tuple(chosen)

    @once
    def embedding_size(self) -> int:
        """E, measured on a text or a small image; loads the model."""
        first = self.modalities[0]
        example = {"text": "a", "image": Image.new("RGB", (32, 32))}.get(first)
        if example is None:
            raise EncoderError(f"{self._name} serves neither texts nor images, so its width is not known")
        return self._encode(first, [example]).shape[1]

    def fingerprint(self) -> str:
        """Return the sha256 of weights, settings and tokenizer of the folder, the arguments, and the code's version."""
        return self._fingerprint

    @once
    def _fingerprint(self) -> str:
        settings = {
            key: self.config[key] for key in ("dimensions", "prompt", "audio_rate", "frames", "dtype")
        }
        parts: list[str | Path] = []
        for file in sorted(file for file in self._folder.rglob("*") if file.suffix in _SETTINGS):
            parts += [file.relative_to(self._folder).as_posix(), file]
        for file in sorted(self._folder.rglob("*.safetensors")):
            parts += [file.relative_to(self._folder).as_posix(), file]
        return fingerprint(settings, _REVISION, *parts)

    def to(self, device: torch.device | str) -> Self:
        """Move the model, now or once it is loaded, to a device."""
        self._device = torch.device(device)
        if "_model" in vars(self):
            self._model.to(self._device)
        return self

    def prepare(self, media: Media) -> Tensor:
        """Return one media as plain numbers; the model's own processors run in `embed`.

        Returns:
            a text: its bytes in UTF-8, uint8 [T]; an image: uint8 [H, W, 3]; audio: float32 [N]; a video: uint8
            [frames, H, W, 3].

        Raises:
            MediaError: it cannot be read; the message names it.
        """
        if media.modality not in self.modalities:
            raise InputError(
                f"{self._name} embeds {', '.join(self.modalities)} media, not {media.modality!r}"
            )
        match media.modality:
            case "text":
                content = str(media.source).encode("utf-8", "surrogatepass")
                if not content.strip():
                    raise MediaError(f"{media.name}: a text without words; expected at least one")
                self._warn_if_cut(media)
                return torch.frombuffer(bytearray(content), dtype=torch.uint8)
            case "image":
                return torch.from_numpy(np.array(open_image(media.source, size=None)))
            case "audio":
                (samples,) = cut_audio(media.source, rate=self.config["audio_rate"], cut=lambda n: [(0, n)])
                return torch.from_numpy(samples.mean(axis=0, dtype=np.float32))
        return self._prepare_video(media)

    def _warn_if_cut(self, media: Media) -> None:
        """Warn if a text is longer than the model reads."""
        tokenizer, limit = (getattr(self._model, name, None) for name in ("tokenizer", "max_seq_length"))
        # Only tokenizers of transformers: those of static embeddings have other calls, and read texts whole.
        if limit and hasattr(tokenizer, "is_fast"):
            text = (self.config["prompt"] or "") + str(media.source)
            if (count := len(tokenizer(text, verbose=False)["input_ids"])) > limit:
                message = f"{count:,} tokens; the encoder reads the first {limit:,} of a text"
                warn(media.name, message, kind="text")

    def _prepare_video(self, media: Media) -> Tensor:
        wanted, places = self.config["frames"], []

        def pick(count: int, rate: Any) -> list[int]:
            places[:] = [(2 * n + 1) * count // (2 * wanted) for n in range(wanted)]
            return sorted(set(places))

        frames = {
            number: torch.from_numpy(np.array(frame))
            for number, frame in read_frames(media.source, pick=pick)
        }
        return torch.stack([frames[number] for number in places])

    def embed(self, modality: str, inputs: Sequence[Tensor]) -> Tensor:
        """Return the embeddings of prepared media: [B, E], float32, unit norm."""
        rows = self._encode(modality, [self._plain(modality, item) for item in inputs])
        return torch.nn.functional.normalize(rows.float(), dim=-1)

    def blocks(self, modality: str) -> list[nn.Module]:
        """Return the blocks of the transformer for a modality, in order.

        Raises:
            EncoderError: several transformers, as for queries and documents, or none.
        """
        from transformers import PreTrainedModel

        models: dict[str, nn.Module] = {}
        for path, part in self._model.named_modules():
            # Parents come first: a tower inside of a model is not one more.
            if isinstance(part, PreTrainedModel) and not any(path.startswith(f"{one}.") for one in models):
                models[path] = part
        if len(models) != 1:
            raise EncoderError(
                f"{self._name} has {len(models)} transformers, and the blocks of one can be trained; use a model with "
                "one, or this encoder without Tuned"
            )
        (model,) = models.values()
        # The tower of a modality, as in CLIP, or else the longest list.
        return find_blocks(model, modality, joint=True) or find_blocks(model, modality, joint=False)

    def _plain(self, modality: str, item: Tensor) -> Any:
        """Return prepared media as the library takes them."""
        array = item.cpu().numpy()
        match modality:
            case "text":
                return array.tobytes().decode("utf-8", "surrogatepass")
            case "image":
                return Image.fromarray(array)
            case "audio":
                return {"array": array, "sampling_rate": self.config["audio_rate"]}
        return array

    def _encode(self, modality: str, values: Sequence[Any]) -> Tensor:
        # Named by their modality: a text such as cat.jpg would be taken for a file.
        given = [{modality: value} for value in values]
        model, prompt = self._model, self.config["prompt"] if modality == "text" else None
        if prompt is None:
            prompt = model.prompts.get(model.default_prompt_name)
        # Not `encode`, which computes no gradient.
        fields = model.preprocess(given, prompt=prompt)
        on_device = {
            key: value.to(self._device) if isinstance(value, Tensor) else value
            for key, value in fields.items()
        }
        rows, wanted = model(on_device)["sentence_embedding"], self.config["dimensions"]
        if (wanted or 0) > rows.shape[1]:
            raise EncoderError(f"{self._name} has {rows.shape[1]} dimensions, not {wanted}")
        return rows[:, : wanted or model.truncate_dim]

    @property
    def _name(self) -> str:
        return f"SentenceTransformers({self.config['name']!r})"

    @once
    def _folder(self) -> Path:
        folder = find_folder(self.config["name"], self.config["revision"])
        modules = read_json(folder / "modules.json", EncoderError, "give a folder of sentence-transformers")
        kinds = (
            [str(one.get("type")) for one in modules if isinstance(one, Mapping)]
            if isinstance(modules, list)
            else []
        )
        # Any other class would be imported, and might be code of the folder.
        if not kinds or not all(kind.startswith(_OWN) for kind in kinds):
            raise EncoderError(
                f"{folder}: its modules {', '.join(kinds) or 'are missing'}; expected classes of {_OWN[:-1]}"
            )
        if pickles := sorted(file.name for file in folder.rglob("*") if file.suffix in _PICKLES):
            raise EncoderError(
                f"{folder} holds {', '.join(pickles)}: such files are not read; save it as safetensors"
            )
        return folder

    @once
    def _model(self) -> Any:
        with needs_extra(
            "sentence_transformers", extra="sentence", purpose="run models of sentence-transformers"
        ):
            from sentence_transformers import SentenceTransformer

        never_ask()
        with loading(self._folder):
            model = SentenceTransformer(
                str(self._folder), device=str(self._device), trust_remote_code=False, local_files_only=True
            )
        if self.config["dtype"] is not None:
            model.to(getattr(torch, self.config["dtype"]))
        return model.eval().requires_grad_(False)
