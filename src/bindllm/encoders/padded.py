"""Encoders of different widths in one model: each embedding takes its own part of a wider vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch.nn.functional as F

from bindllm.encoders import Embedded, HasBlocks, HasTokens, fingerprint, once, space_of
from bindllm.encoders.trainable import Tuned, build_tower
from bindllm.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bindllm.encoders import Encoder
    from bindllm.media import Media


class Padded:
    """An encoder whose embeddings are surrounded by zeros, so that encoders of different widths fit into one model.

    Give each encoder a part of its own. The first layer of the bind network then holds a projection for each of them,
    and media of several encoders in one message are fused side by side. Encoders that share a part share their space.

    Args:
        encoder: ``class_path`` and ``init_args`` of the encoder.
        start: first position of its embedding in the vector, from 0.
        size: width of the vector; the sum of the widths of all encoders with a part of their own.
        allow: import paths of classes outside bindllm that ``encoder`` may name. Loading ignores the value in a file.

    Raises:
        InputError: no ``class_path``, or a negative start.

    Example:
        Padded({"class_path": "bindllm.encoders.EfficientNetLite"}, start=0, size=1664).embedding_size
    """

    def __init__(
        self, encoder: dict[str, Any], start: int, size: int, *, allow: list[str] | None = None
    ) -> None:
        if not isinstance(encoder, Mapping) or not isinstance(encoder.get("class_path"), str) or start < 0:
            raise InputError(
                f"Padded takes an encoder with its class_path and a start of at least 0, not {encoder!r} and {start!r}"
            )
        self._entry, self._start, self._allow = dict(encoder), start, tuple(allow or ())
        self.embedding_size = size
        self.config: dict[str, Any] = {"encoder": self._entry, "start": start, "size": size}
        self.config |= {"allow": list(allow)} if allow else {}

    @once
    def _inner(self) -> Encoder:
        made = build_tower(self._entry["class_path"], self._entry.get("init_args") or {}, allow=self._allow)
        if isinstance(made, Tuned):
            raise InputError(
                "Padded is around Tuned, whose blocks would not be trained: put Tuned around Padded"
            )
        if self._start + made.embedding_size > self.embedding_size:
            raise InputError(
                f"{type(made).__name__} has {made.embedding_size} numbers, which do not fit into a vector of "
                f"{self.embedding_size} from position {self._start} on"
            )
        return made

    @property
    def modalities(self) -> Sequence[str]:
        """Those of the encoder."""
        return self._inner.modalities

    @property
    def space(self) -> str:
        """The space of the encoder, at its part of the vector."""
        return f"{space_of(self._inner) or self._entry['class_path']} at {self._start}"

    @property
    def token_sizes(self) -> Mapping[str, int]:
        """Those of the encoder; its tokens are not padded."""
        return self._inner.token_sizes if isinstance(self._inner, HasTokens) else {}

    def fingerprint(self) -> str:
        """Return the sha256 of the encoder's fingerprint and the position of its embeddings."""
        position = {"start": self._start, "size": self.embedding_size}
        return fingerprint(position, "padded 1", self._inner.fingerprint())

    def to(self, device: torch.device | str) -> Self:
        """Move the encoder to a device."""
        self._inner.to(device)
        return self

    def prepare(self, media: Media) -> Tensor:
        """Return one media as the encoder prepares it."""
        return self._inner.prepare(media)

    def embed(self, modality: str, inputs: Sequence[Tensor], *, tokens: bool = False) -> Any:
        """Return the embeddings of prepared media, [B, size], unit norm; with ``tokens`` as `Embedded`."""
        if tokens:
            found = self._inner.embed(modality, inputs, tokens=True)
            return Embedded(self._pad(found.embeddings), found.tokens)
        return self._pad(self._inner.embed(modality, inputs))

    def blocks(self, modality: str) -> Sequence[Any]:
        """Return the blocks of the encoder; `Tuned` around this one trains them."""
        if not isinstance(self._inner, HasBlocks):
            raise InputError(
                f"{type(self._inner).__name__} has no blocks that can be trained (see bindllm.encoders.HasBlocks)"
            )
        return self._inner.blocks(modality)

    def _pad(self, embeddings: Tensor) -> Tensor:
        return F.pad(embeddings, (self._start, self.embedding_size - self._start - embeddings.shape[1]))
