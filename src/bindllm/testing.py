"""Contract check for encoders: does a class keep every promise of `bindllm.encoders.Encoder`?

The test of a new encoder is one line, ``check_encoder(MyEncoder())``.
"""

from __future__ import annotations

import math
import re
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bindllm.encoders import Embedded, Encoder, HasExamples, HasTokens, member_problems
from bindllm.errors import EncoderError, MediaError
from bindllm.media import MODALITIES, Media

__all__ = ["check_encoder", "synthetic_media"]

# Largest difference of an embedding: from norm 1, between batch and single, between two equal calls.
_NORM_TOLERANCE = 1e-3
_BATCH_TOLERANCE = 1e-4
_REPEAT_TOLERANCE = 1e-6
# Largest difference between the tokens of a media in a batch and alone, in units of their root mean square.
_TOKEN_TOLERANCE = 1e-3
# CPU seconds of a constructor: many times more than needed, and too few to load large weights.
_CONSTRUCTOR_SECONDS = 2.0


def check_encoder(
    encoder: Encoder, samples: Sequence[Media] | None = None, *, modalities: Sequence[str] | None = None
) -> None:
    """Check an encoder against its contract; return when it keeps all of it.

    Args:
        encoder: the encoder to check, on the CPU, with its weights available.
        samples: at least two different media of each modality that it serves. By default the encoder's own
            ``examples()``, or else synthetic media for modalities of `bindllm.media.MODALITIES`.
        modalities: check only these of its modalities; by default all.

    Raises:
        EncoderError: lists every broken promise, not only the first.

    Examples:
        >>> class Empty: ...
        >>> check_encoder(Empty())
        Traceback (most recent call last):
        bindllm.errors.EncoderError: Empty breaks the contract of an encoder:
        - it lacks modalities, embedding_size, config, fingerprint, to, prepare, embed
    """
    # How to read this: each method checks one promise and adds to `problems`; nothing raises before the end, so the
    # author sees all of them at once.
    check = _Check(encoder)
    check.members()
    samples = check.samples(samples)
    # Without members of the right types nothing can be called, and further messages would be noise.
    if not check.problems:
        twin = check.rebuilt()
        fingerprint = check.fingerprint(twin)
        for media in samples:
            served = media.modality in encoder.modalities
            check.require(served, f"the sample {media!r} is of a modality that it does not serve")
        # The caller's samples win over the encoder's own.
        samples += check.examples(unless={media.modality for media in samples})
        for modality in encoder.modalities if modalities is None else modalities:
            given = [media for media in samples if media.modality == modality]
            check.modality(modality, given or synthetic_media(modality), twin)
        if fingerprint is not None:
            same = check.attempt("fingerprint()", encoder.fingerprint) == fingerprint
            check.require(same, "fingerprint() changed after embed()")
    if check.problems:
        lines = "".join(f"\n- {problem}" for problem in dict.fromkeys(check.problems))
        name = encoder.__name__ if isinstance(encoder, type) else type(encoder).__name__
        raise EncoderError(f"{name} breaks the contract of an encoder:{lines}")


class _Check:
    """Runs the parts of the check on one encoder and collects the problems."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.problems: list[str] = []
        self.token_sizes: dict[str, int] = {}

    def require(self, holds: bool, problem: str) -> bool:
        """Note a problem unless ``holds``, which is returned."""
        if not holds:
            self.problems.append(problem)
        return holds

    def attempt(self, action: str, call: Callable[..., Any], *args: Any) -> Any:
        """Return the result of a call, or note its exception, or that it is None, and return None."""
        try:
            result = call(*args)
        # This is untrusted code: any exception of it is reported with the other problems.
        except Exception as error:
            self.problems.append(f"{action} raised {_with_line(error)}")
            return None
        # Nothing that is checked here may be None, such as the result of a method without `return`.
        self.require(result is not None, f"{action} gave None")
        return result

    def members(self) -> None:
        """All members are there, and the plain ones have the right types."""
        encoder = self.encoder
        # Properties may raise: reading each of them is an attempt of its own.
        plain = [name for name in ("modalities", "embedding_size", "config") if name in dir(encoder)]
        if None in [self.attempt(name, getattr, encoder, name) for name in plain]:
            return
        self.problems += member_problems(encoder)
        if self.problems:
            return
        # Optional, and perhaps a property that raises.
        sizes = self.attempt(
            "token_sizes", lambda: encoder.token_sizes if isinstance(encoder, HasTokens) else {}
        )
        self.token_sizes = dict(sizes) if isinstance(sizes, Mapping) else {}
        self.require(
            isinstance(sizes, Mapping | None)
            and all(
                name in encoder.modalities and type(c) is int and c > 0
                for name, c in self.token_sizes.items()
            ),
            f"token_sizes must map modalities that it serves to ints above 0, not {sizes!r}",
        )

    def samples(self, given: Any) -> list[Media]:
        """The samples are a list of media; other items are noted and skipped."""
        if not self.require(
            given is None or isinstance(given, list | tuple),
            f"samples must be a list of Media, such as [Media.image('a.png'), ...], not {given!r}",
        ):
            return []
        usable = []
        for media in given or ():
            if self.require(
                isinstance(media, Media),
                f"the sample {media!r} is not a Media; wrap it, as in Media.image({media!r})",
            ):
                usable.append(media)
        return usable

    def examples(self, *, unless: set[str]) -> list[Media]:
        """Media that the encoder itself brings, without those of modalities that others were given for."""
        if not isinstance(self.encoder, HasExamples):
            return []
        given = self.attempt("examples()", self.encoder.examples)
        return [media for media in self.samples(given) if media.modality not in unless]

    def rebuilt(self) -> Encoder | None:
        """``type(encoder)(**config)`` is the same encoder; it is returned."""
        mine = self.encoder
        moved = self.attempt("to('cpu')", mine.to, "cpu")
        self.require(moved is mine, "to(device) must return the encoder itself")
        # CPU time: other processes on the machine must not fail the check.
        start = time.process_time()
        # A checkpoint stores class and config only, so this is how every loaded encoder comes to life.
        twin = self.attempt("type(encoder)(**encoder.config)", lambda: type(mine)(**mine.config))
        spent = time.process_time() - start
        self.require(
            spent < _CONSTRUCTOR_SECONDS,
            f"the constructor computes for {spent:.1f} s; load weights at the first embed(), since a recipe is read "
            "without them",
        )
        if twin is not None:
            self.require(twin.config == mine.config, f"rebuilt from config, its config is {twin.config!r}")
            size = twin.embedding_size
            self.require(size == mine.embedding_size, f"rebuilt from config, its embedding_size is {size}")
        return twin

    def fingerprint(self, twin: Encoder | None) -> str | None:
        """The fingerprint is hexadecimal, stable, and that of the rebuilt encoder."""
        first = self.attempt("fingerprint()", self.encoder.fingerprint)
        if first is None:
            return None
        is_hex = isinstance(first, str) and re.fullmatch("[0-9a-f]{16,}", first) is not None
        self.require(is_hex, f"fingerprint() must be 16 or more lower-case hex digits, not {first!r}")
        stable = self.attempt("fingerprint()", self.encoder.fingerprint) == first
        if not self.require(stable, "fingerprint() differs from call to call"):
            return None
        if twin is not None:
            same = self.attempt("fingerprint()", twin.fingerprint) == first
            self.require(same, "rebuilt from config, its fingerprint() is another")
        return first

    def modality(self, modality: str, samples: list[Media], twin: Encoder | None) -> None:
        """Prepare and embed the samples of one modality."""
        hashes = [self.attempt(f"reading the sample {media!r}", media.content_hash) for media in samples]
        if None in hashes:
            return
        close = get_close_matches(modality, MODALITIES, n=1) if modality not in MODALITIES else []
        if not self.require(
            len(set(hashes)) > 1,
            f"{modality}: at least two different samples are needed to check it; pass samples=[...] (on the command "
            f"line --media {modality}:FILE, twice), or give the class a method examples() that returns some"
            f"{f'. Did you mean {close[0]!r}?' if close else ''}",
        ):
            return
        inputs: list[Tensor] = []
        for media in samples:
            tensor = self.prepared(media, twin)
            # The others would break the same promise.
            if tensor is None:
                break
            inputs.append(tensor)
        untouched = hashes == [media.content_hash() for media in samples]
        self.require(untouched, f"{modality}: prepare() changes the array or image that it is given")
        if len(inputs) == len(samples):
            # Text has no files.
            if modality != "text":
                self.unreadable(modality)
            self.embedded(modality, inputs)

    def prepared(self, media: Media, twin: Encoder | None) -> Tensor | None:
        """Preparation gives a CPU tensor, with the same bits every time."""
        action = f"{media.modality}: prepare()"
        first = self.attempt(f"{action} of {media.name}", self.encoder.prepare, media)
        if first is None:
            return None
        is_plain = isinstance(first, Tensor) and first.device.type == "cpu" and not first.requires_grad
        if not self.require(
            is_plain, f"{action} must return a CPU tensor without gradient, not {type(first)}"
        ):
            return None
        for encoder, how in ((self.encoder, "a second time"), (twin, "by the encoder rebuilt from config")):
            if encoder is not None:
                again = self.attempt(action, encoder.prepare, media)
                same = isinstance(again, Tensor) and torch.equal(first, again)
                if not self.require(same, f"{action} gives other bits {how}"):
                    break
        return first

    def unreadable(self, modality: str) -> None:
        """A file that cannot be read is a MediaError with its name: a run then skips it and continues."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in (("missing.bin", None), ("nonsense.bin", b"\0\xff no media")):
                file = Path(folder, name)
                if content is not None:
                    file.write_bytes(content)
                action = f"{modality}: prepare() of a {'missing' if content is None else 'damaged'} file"
                try:
                    self.encoder.prepare(Media(modality, str(file)))
                except MediaError as error:
                    self.require(
                        name in str(error),
                        f"{action} must name the file in its MediaError, not only: {error}",
                    )
                # This is untrusted code: any exception of it is reported with the other problems.
                except Exception as error:
                    self.problems.append(
                        f"{action} must raise bindllm.errors.MediaError, not {_with_line(error)}"
                    )
                else:
                    # Nonsense may be a file of a kind that has no wrong content.
                    self.require(content is not None, f"{action} must raise bindllm.errors.MediaError")

    def embedded(self, modality: str, inputs: list[Tensor]) -> None:
        """Embeddings have the promised form and depend only on their own input."""
        # Copies, to find encoders that change their inputs.
        given = [tensor.clone() for tensor in inputs]
        # A trainer may call it with gradients enabled; the encoder itself must switch them off.
        with torch.enable_grad():
            batch = self.attempt(f"{modality}: embed()", self.encoder.embed, modality, given)
        if batch is None or not self.form(modality, batch, len(inputs)):
            return
        untouched = all(torch.equal(a, b) for a, b in zip(given, inputs, strict=True))
        self.require(untouched, f"{modality}: embed() changes its inputs in place")
        # A constant embedding would pass every other check.
        apart = torch.nn.functional.pdist(batch.detach().double()).min()
        self.require(bool(apart > _BATCH_TOLERANCE), f"{modality}: different media get the same embedding")

        if isinstance(self.encoder, nn.Module):
            # Trainers switch every module that they can reach; a frozen encoder gives the same numbers.
            self.encoder.train()
        again = self.distance(modality, inputs, batch)
        if self.require(
            again <= _REPEAT_TOLERANCE,
            f"{modality}: embed() gives other numbers the second time (by {again:.2g}); "
            "it must stay frozen, in evaluation mode and free of chance",
        ):
            single = max(self.distance(modality, [one], batch[n : n + 1]) for n, one in enumerate(inputs))
            # Reversed order finds statistics over the batch and positions that leak between rows.
            turned = self.distance(modality, inputs[::-1], batch.flip(0))
            self.require(
                max(single, turned) <= _BATCH_TOLERANCE,
                f"{modality}: a row of embed() must depend only on its own input, whatever the batch and its "
                f"order (off by {single:.2g} embedded singly, by {turned:.2g} in reversed order)",
            )
        if modality in self.token_sizes:
            self.tokens(modality, inputs, batch)

    def tokens(self, modality: str, inputs: list[Tensor], batch: Tensor) -> None:
        """Tokens have the promised form, come with the same embeddings, and depend only on their own input."""
        found = self.tokens_of(modality, inputs)
        if found is None or not self.form(modality, found.embeddings, len(inputs)):
            return
        apart = float((found.embeddings - batch).abs().max())
        self.require(
            apart <= _REPEAT_TOLERANCE,
            f"{modality}: embed(..., tokens=True) gives other embeddings than without tokens (by {apart:.2g})",
        )
        first, *others = found.tokens
        # Constant tokens would pass every other check.
        self.require(
            any(other.shape != first.shape or not torch.equal(other, first) for other in others),
            f"{modality}: all media get the same tokens",
        )
        for one, tokens in zip(inputs, found.tokens, strict=True):
            single = self.tokens_of(modality, [one])
            if single is None:
                return
            alone = single.tokens[0].float()
            same = alone.shape == tokens.shape
            off = (
                float((alone - tokens.float()).abs().max() / alone.square().mean().sqrt())
                if same
                else math.inf
            )
            if not self.require(
                off <= _TOKEN_TOLERANCE,
                f"{modality}: the tokens of a media must depend only on its own input, whatever the batch: "
                f"{list(tokens.shape)} in a batch, {list(alone.shape)} alone, off by {off:.2g}",
            ):
                return

    def tokens_of(self, modality: str, inputs: list[Tensor]) -> Embedded | None:
        """Return embeddings and tokens of (copies of) the inputs, or None if they have another form."""
        action, size = f"{modality}: embed(..., tokens=True)", self.token_sizes[modality]
        copies = [tensor.clone() for tensor in inputs]
        with torch.enable_grad():
            found = self.attempt(action, lambda: self.encoder.embed(modality, copies, tokens=True))
        if found is None or not self.require(
            isinstance(found, Embedded) and len(found.tokens) == len(inputs),
            f"{action} of {len(inputs)} inputs must return a bindllm.encoders.Embedded with a list of as many tensors",
        ):
            return None
        for tokens in found.tokens:
            shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else ()
            if not self.require(
                len(shape) in (2, 3, 4) and shape[-1] == size and 0 not in shape,
                f"{modality}: tokens must be [*grid, {size}] with a grid of one to three axes, not "
                f"{list(shape) or type(tokens)}",
            ) or not self.require(
                tokens.is_floating_point() and not tokens.requires_grad and bool(tokens.isfinite().all()),
                f"{modality}: tokens must be finite numbers without gradient, not {tokens.dtype}",
            ):
                return None
        return found

    def form(self, modality: str, batch: Any, count: int) -> bool:
        """[B, E], float32, finite, unit norm, usable in training but without gradient."""
        expected = (count, self.encoder.embedding_size)
        if not self.require(
            isinstance(batch, Tensor) and batch.shape == expected,
            f"{modality}: embed() of {count} inputs must return a tensor {list(expected)}, not "
            f"{list(batch.shape) if isinstance(batch, Tensor) else type(batch)}",
        ):
            return False
        if not self.require(not batch.is_meta, f"{modality}: embeddings on the meta device have no values"):
            return False
        self.require(
            batch.dtype == torch.float32, f"{modality}: embeddings must be float32, not {batch.dtype}"
        )
        self.require(
            not batch.requires_grad, f"{modality}: embeddings must have no gradient; use torch.no_grad()"
        )
        self.require(
            not batch.is_inference(),
            f"{modality}: embeddings made in torch.inference_mode() cannot be trained on; use torch.no_grad()",
        )
        if not self.require(bool(batch.isfinite().all()), f"{modality}: embeddings must be finite"):
            return False
        norms = batch.detach().double().norm(dim=1)
        self.require(
            bool(((norms - 1).abs() <= _NORM_TOLERANCE).all()),
            f"{modality}: embeddings must have norm 1, not {norms.min():.4g} to {norms.max():.4g}; "
            "return torch.nn.functional.normalize(rows, dim=-1)",
        )
        return True

    def distance(self, modality: str, inputs: list[Tensor], expected: Tensor) -> float:
        """Largest difference between the embeddings of (copies of) the inputs and the expected ones."""
        copies = [tensor.clone() for tensor in inputs]
        found = self.attempt(f"{modality}: embed()", self.encoder.embed, modality, copies)
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return float("inf")
        return float((found.detach() - expected.detach()).abs().max())


def _with_line(error: Exception) -> str:
    """Return an exception and the line of code that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    # The innermost frame outside installed libraries: the mistake is there.
    own = [frame for frame in frames if _is_own(frame.filename)]
    line = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{line}"


def _is_own(file: str) -> bool:
    return not file.startswith("<") and "site-packages" not in file and file != __file__


def synthetic_media(modality: str) -> list[Media]:
    """Return different media of one modality, as arrays or texts of several sizes; none if the modality is unknown.

    Examples:
        >>> [media.name for media in synthetic_media("depth")]
        ['<array [48, 64] float32>', '<array [90, 60] float32>']
    """
    # A fixed seed, so that every run tests the same media.
    random = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray:
        return random.random(shape, dtype=np.float32)

    def gray(*shape: int) -> np.ndarray:
        return random.integers(0, 256, shape, dtype=np.uint8)

    def tone(pitch: float, seconds: float) -> np.ndarray:
        return np.sin(2 * np.pi * pitch * np.arange(round(16_000 * seconds)) / 16_000).astype(np.float32)

    plain = [np.full((100, 100, 3), color, np.uint8) for color in ((200, 30, 30), (30, 30, 200))]
    made: dict[str, list[Any]] = {
        # Several sizes and proportions, because encoders must accept all of them.
        "image": [gray(224, 224, 3), gray(180, 320, 3), gray(64, 48, 3), *plain],
        "video": [gray(1, 48, 64, 3), gray(40, 60, 48, 3)],
        "audio": [tone(220, 0.3), tone(880, 3.0), np.stack([noise(48_000) - 0.5, tone(440, 3.0)])],
        "text": ["a dog", "two cats on a mat, asleep in the sun", "word " * 200],
        "point": [noise(300, 3), noise(5000, 3) * np.float32([1, 4, 0.1])],
        "depth": [1 + 3 * noise(48, 64), 0.5 + 8 * noise(90, 60)],
        "thermal": [noise(48, 64), noise(90, 60) ** 2],
        "imu": [noise(400, 6) - 0.5, 3 * noise(5000, 6)],
    }
    return [Media(modality, source) for source in made.get(modality, [])]
