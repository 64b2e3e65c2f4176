"""The contract check passes good encoders and names every promise that a bad one breaks."""

from __future__ import annotations

import itertools
import random
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import dropout, normalize

from bindllm import testing
from bindllm.encoders import Embedded
from bindllm.errors import EncoderError, MediaError
from bindllm.media import MODALITIES, Media
from bindllm.testing import check_encoder, synthetic_media
from tiny import ColorEncoder, TokenEncoder


class NotNormalized(ColorEncoder):
    def embed(self, modality, inputs):
        return 2 * super().embed(modality, inputs)


class RandomPrepare(ColorEncoder):
    def prepare(self, media):
        return super().prepare(media) + random.random()


class PreparesAnotherShape(ColorEncoder):
    def prepare(self, media):
        return super().prepare(media).tolist()


class BatchDependent(ColorEncoder):
    def embed(self, modality, inputs):
        stacked = torch.stack(list(inputs))
        return super().embed(modality, list(stacked - 0.5 * stacked.mean(0)))


class Sorted(ColorEncoder):
    def embed(self, modality, inputs):
        rows = super().embed(modality, inputs)
        return rows[rows[:, 0].argsort()]


class WrongShape(ColorEncoder):
    def embed(self, modality, inputs):
        return super().embed(modality, inputs)[:, :-1]


class WrongType(ColorEncoder):
    def embed(self, modality, inputs):
        return super().embed(modality, inputs).double()


class WithGradient(ColorEncoder):
    def embed(self, modality, inputs):
        return super().embed(modality, inputs) * torch.ones((), requires_grad=True)


class InferenceMode(ColorEncoder):
    @torch.inference_mode()
    def embed(self, modality, inputs):
        return super().embed(modality, inputs)


class NotFinite(ColorEncoder):
    def embed(self, modality, inputs):
        return super().embed(modality, inputs) * float("nan")


class Constant(ColorEncoder):
    def embed(self, modality, inputs):
        return normalize(torch.ones(len(inputs), self.embedding_size), dim=-1)


class ChangesItsInputs(ColorEncoder):
    def embed(self, modality, inputs):
        rows = super().embed(modality, inputs)
        for tensor in inputs:
            tensor.mul_(1.001)
        return rows


class ChangesTheArray(ColorEncoder):
    def prepare(self, media):
        prepared = super().prepare(media)
        if isinstance(media.source, np.ndarray):
            media.source[0, 0] ^= 1
        return prepared


class NotFrozen(ColorEncoder, torch.nn.Module):
    def __init__(self, embedding_size: int = 16, grid: int = 4) -> None:
        torch.nn.Module.__init__(self)
        ColorEncoder.__init__(self, embedding_size, grid)
        self.eval()

    def to(self, device):
        return self

    def embed(self, modality, inputs):
        return normalize(dropout(super().embed(modality, inputs), 0.5, self.training), dim=-1)


class UnstableFingerprint(ColorEncoder):
    def fingerprint(self):
        return f"{time.perf_counter_ns():032x}"


class FingerprintOfTheInstance(ColorEncoder):
    counter = itertools.count()

    def __init__(self, embedding_size: int = 16, grid: int = 4) -> None:
        super().__init__(embedding_size, grid)
        self.number = next(self.counter)

    def fingerprint(self):
        return f"{self.number:032x}"


class FingerprintChangesWithUse(ColorEncoder):
    used = False

    def embed(self, modality, inputs):
        self.used = True
        return super().embed(modality, inputs)

    def fingerprint(self):
        return ("b" if self.used else "a") * 64


class FingerprintNotHex(ColorEncoder):
    def fingerprint(self):
        return "version one of mine"


class WrongConfig(ColorEncoder):
    @property
    def config(self):
        return {"size": self.embedding_size}


class ForgetfulConfig(ColorEncoder):
    @property
    def config(self):
        return {}

    def __init__(self, embedding_size: int = 16, grid: int = 4) -> None:
        super().__init__(next(self.sizes), grid)

    sizes = itertools.count(16)


class ConfigWithATuple(ColorEncoder):
    @property
    def config(self):
        return {**super().config, "means": (0.5, 0.5)}


class UnknownModality(ColorEncoder):
    modalities = ("image", "imge")


class ModalityNoWord(ColorEncoder):
    modalities = ("image", "Range Doppler")


class ModalityAsText(ColorEncoder):
    modalities = "image"


class SpaceNoWord(ColorEncoder):
    space = 7


class ExamplesRaise(ColorEncoder):
    def examples(self):
        raise RuntimeError("none here")


class SizeAsFloat(ColorEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.embedding_size = 16.0


class MovesToACopy(ColorEncoder):
    def to(self, device):
        return ColorEncoder(**self.config)


class NoMediaError(ColorEncoder):
    def prepare(self, media):
        try:
            return super().prepare(media)
        except MediaError as error:
            raise KeyError(media.name) from error


class NamelessMediaError(ColorEncoder):
    def prepare(self, media):
        if isinstance(media.source, str) and not Path(media.source).exists():
            raise MediaError("something is wrong")
        return super().prepare(media)


class MissingFilesAreGrey(ColorEncoder):
    def prepare(self, media):
        if isinstance(media.source, str):
            return torch.zeros(48)
        return super().prepare(media)


class PrepareRaises(ColorEncoder):
    def prepare(self, media):
        raise RuntimeError("no such sense")


class Raises(ColorEncoder):
    def embed(self, modality, inputs):
        raise RuntimeError("out of luck")


class PreparesNothing(ColorEncoder):
    def prepare(self, media):
        super().prepare(media)


class EmbedsNothing(ColorEncoder):
    def embed(self, modality, inputs):
        super().embed(modality, inputs)


class NoFingerprint(ColorEncoder):
    def fingerprint(self):
        super().fingerprint()


class OnTheMetaDevice(ColorEncoder):
    def embed(self, modality, inputs):
        return super().embed(modality, inputs).to("meta")


class MethodAsValue(ColorEncoder):
    to = "cpu"


BROKEN = {
    PreparesNothing: r"prepare\(\) of <array \[224, 224, 3\] uint8> gave None",
    EmbedsNothing: r"embed\(\) gave None",
    NoFingerprint: r"fingerprint\(\) gave None",
    OnTheMetaDevice: "embeddings on the meta device have no values",
    MethodAsValue: "to must be a method",
    NotNormalized: r"must have norm 1, not 2 to 2; return torch\.nn\.functional\.normalize",
    RandomPrepare: r"prepare\(\) gives other bits a second time",
    PreparesAnotherShape: r"prepare\(\) must return a CPU tensor without gradient, not <class 'list'>",
    BatchDependent: "must depend only on its own input",
    Sorted: "must depend only on its own input",
    WrongShape: r"embed\(\) of 5 inputs must return a tensor \[5, 16\], not \[5, 15\]",
    WrongType: "must be float32, not torch.float64",
    WithGradient: "must have no gradient",
    InferenceMode: r"inference_mode\(\) cannot be trained on",
    NotFinite: "must be finite",
    Constant: "different media get the same embedding",
    ChangesItsInputs: r"embed\(\) changes its inputs in place",
    ChangesTheArray: r"prepare\(\) changes the array or image",
    NotFrozen: r"embed\(\) gives other numbers the second time",
    UnstableFingerprint: r"fingerprint\(\) differs from call to call",
    FingerprintOfTheInstance: r"rebuilt from config, its fingerprint\(\) is another",
    FingerprintChangesWithUse: r"fingerprint\(\) changed after embed\(\)",
    FingerprintNotHex: "must be 16 or more lower-case hex digits, not 'version one of mine'",
    WrongConfig: r"config must be keywords of the constructor, not \{'size': 16\}: got an unexpected keyword",
    ForgetfulConfig: "rebuilt from config, its embedding_size is",
    ConfigWithATuple: "config must be a dict that JSON gives back unchanged",
    UnknownModality: r"imge: at least two different samples .* examples\(\) .* Did you mean 'image'\?",
    ModalityNoWord: r"modalities are lower-case words, not \['Range Doppler'\]",
    SpaceNoWord: "space must be a word, not 7",
    ExamplesRaise: r"examples\(\) raised RuntimeError: none here",
    ModalityAsText: r"modalities must be a tuple of names such as \('image',\), not 'image'",
    SizeAsFloat: "embedding_size must be an int above 0, not 16.0",
    MovesToACopy: r"to\(device\) must return the encoder itself",
    NamelessMediaError: r"of a missing file must name the file in its MediaError, not only: something is wrong",
    MissingFilesAreGrey: r"prepare\(\) of a missing file must raise bindllm\.errors\.MediaError$",
    PrepareRaises: r"prepare\(\) of <array \[224, 224, 3\] uint8> raised RuntimeError: no such sense",
    Raises: r"image: embed\(\) raised RuntimeError: out of luck \(test_testing\.py, line \d+\)$",
}


def test_good_encoder_passes():
    assert check_encoder(ColorEncoder()) is None
    assert check_encoder(TokenEncoder()) is None


class OtherEmbeddings(TokenEncoder):
    def embed(self, modality, inputs, *, tokens=False):
        found = super().embed(modality, inputs, tokens=tokens)
        return Embedded(-found.embeddings, found.tokens) if tokens else found


class ChangedTokens(TokenEncoder):
    """Its tokens are those of the subclass's `change`, which gets the list of the batch."""

    def embed(self, modality, inputs, *, tokens=False):
        found = super().embed(modality, inputs, tokens=tokens)
        return Embedded(found.embeddings, self.change(found.tokens)) if tokens else found


class NoEmbeddings(TokenEncoder):
    def embed(self, modality, inputs, *, tokens=False):
        found = super().embed(modality, inputs, tokens=tokens)
        return Embedded(found.embeddings[:, 1:], found.tokens) if tokens else found


class TokenLists(ChangedTokens):
    def change(self, tokens):
        return [each.tolist() for each in tokens]


class TokensOfTheBatch(ChangedTokens):
    def change(self, tokens):
        return [each + 0.1 * sum(tokens) / len(tokens) for each in tokens]


class SameTokens(ChangedTokens):
    def change(self, tokens):
        return [torch.ones_like(each) for each in tokens]


class FlatTokens(ChangedTokens):
    def change(self, tokens):
        return [each.flatten() for each in tokens]


class TooFewTokens(ChangedTokens):
    def change(self, tokens):
        return tokens[:-1]


class WholeTokens(ChangedTokens):
    def change(self, tokens):
        return [each.long() for each in tokens]


class TokensOfNothing(TokenEncoder):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.token_sizes = {"audio": 8}


class TokenSizesRaise(ColorEncoder):
    @property
    def token_sizes(self):
        raise RuntimeError("not ready")


class TokenSizesAsList(TokenEncoder):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.token_sizes = ["image"]


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        (TokenSizesRaise, "token_sizes raised RuntimeError: not ready"),
        (TokenSizesAsList, r"token_sizes must map modalities .* not \['image'\]"),
        (OtherEmbeddings, r"image: embed\(\.\.\., tokens=True\) gives other embeddings than without tokens"),
        (NoEmbeddings, r"embed\(\) of \d inputs must return a tensor \[\d, 16\], not \[\d, 15\]"),
        (TokenLists, r"with a grid of one to three axes, not <class 'list'>"),
        (TokensOfTheBatch, r"tokens of a media must depend only on its own input.*\[4, 4, 8\] in a batch"),
        (SameTokens, "all media get the same tokens"),
        (FlatTokens, r"tokens must be \[\*grid, 8\] with a grid of one to three axes, not \[128\]"),
        (
            TooFewTokens,
            r"of 5 inputs must return a bindllm\.encoders\.Embedded with a list of as many tensors",
        ),
        (WholeTokens, r"tokens must be finite numbers without gradient, not torch\.int64"),
        (
            TokensOfNothing,
            r"token_sizes must map modalities that it serves to ints above 0, not \{'audio': 8\}",
        ),
    ],
)
def test_broken_tokens_are_named(broken, problem):
    with pytest.raises(EncoderError, match=problem) as caught:
        check_encoder(broken())
    assert str(caught.value).count("\n- ") == 1


@pytest.mark.parametrize("broken", BROKEN, ids=lambda kind: kind.__name__)
def test_broken_encoders_are_told_what_is_wrong(broken):
    with pytest.raises(EncoderError, match=BROKEN[broken]) as caught:
        check_encoder(broken())
    # One fault gives one message, not a crowd of consequences.
    assert str(caught.value).count("\n- ") == 1


def test_all_broken_promises_are_listed():
    class Bad(NotNormalized, WithGradient, FingerprintNotHex, MovesToACopy): ...

    with pytest.raises(EncoderError) as caught:
        check_encoder(Bad())
    message = str(caught.value)
    assert message.startswith("Bad breaks the contract of an encoder:\n- ")
    for words in ("norm 1", "no gradient", "hex digits", "the encoder itself"):
        assert words in message


def test_a_bad_file_must_be_a_media_error():
    with pytest.raises(EncoderError) as caught:
        check_encoder(NoMediaError())
    for kind in ("missing", "damaged"):
        told = rf"image: prepare\(\) of a {kind} file must raise .*MediaError, not KeyError: .*, line \d+\)"
        assert re.search(told, str(caught.value))
    assert str(caught.value).count("\n- ") == 2


def test_a_constructor_that_computes_is_told_of(monkeypatch):
    class Slow(ColorEncoder):
        def __init__(self, embedding_size: int = 16, grid: int = 4) -> None:
            super().__init__(embedding_size, grid)
            while time.process_time() < self.until:
                pass

        until = 0.0

    encoder = Slow()
    check_encoder(encoder)
    monkeypatch.setattr(testing, "_CONSTRUCTOR_SECONDS", 0.05)
    Slow.until = time.process_time() + 0.2
    with pytest.raises(
        EncoderError, match=r"the constructor computes for 0\.\d s; load weights at the first embed"
    ):
        check_encoder(encoder)


def test_only_some_modalities_may_be_checked():
    class Both(ColorEncoder):
        modalities = ("image", "radar")

    check_encoder(Both(), modalities=["image"])
    with pytest.raises(EncoderError, match="--media radar:FILE, twice"):
        check_encoder(Both(), modalities=["radar"])


def test_missing_members_are_named():
    class Half:
        modalities = ("image",)

        def embed(self, modality, inputs): ...

    with pytest.raises(EncoderError, match="it lacks embedding_size, config, fingerprint, to, prepare$"):
        check_encoder(Half())


class LetterEncoder(ColorEncoder):
    modalities = ("text",)

    def prepare(self, media):
        codes = [ord(letter) for letter in media.source[:48].ljust(48)]
        return torch.tensor(codes, dtype=torch.float32) / 64 - 1


def test_samples_are_made_up_or_given():
    check_encoder(LetterEncoder())
    with pytest.raises(
        EncoderError, match=r"text: at least two different samples .* pass samples=\[\.\.\.\]"
    ):
        check_encoder(LetterEncoder(), [Media.text("a dog"), Media.text("a dog")])
    check_encoder(LetterEncoder(), [Media.text("a dog"), Media.text("a cat")])


@pytest.mark.parametrize("modality", MODALITIES)
def test_synthetic_media_are_different(modality):
    hashes = [media.content_hash() for media in synthetic_media(modality)]
    assert len(set(hashes)) == len(hashes) >= 2
    assert hashes == [media.content_hash() for media in synthetic_media(modality)]


class RadarEncoder(LetterEncoder):
    """Serves a modality that nobody here has heard of."""

    modalities = ("radar",)

    def prepare(self, media):
        if not isinstance(media.source, np.ndarray):
            raise MediaError(f"{media.name}: expected an array")
        return torch.from_numpy(np.resize(media.source, 48).astype(np.float32))


class RadarEncoderWithExamples(RadarEncoder):
    def examples(self):
        return [Media("radar", np.arange(n, 60 + n)) for n in (0, 7)]


def test_a_modality_of_ones_own_needs_samples_or_examples():
    with pytest.raises(EncoderError, match=r"radar: at least two different samples") as caught:
        check_encoder(RadarEncoder())
    assert "Did you mean" not in str(caught.value)
    check_encoder(RadarEncoder(), RadarEncoderWithExamples().examples())
    check_encoder(RadarEncoderWithExamples())
    # What is given takes the place of the encoder's own.
    with pytest.raises(EncoderError, match="radar: at least two different samples"):
        check_encoder(RadarEncoderWithExamples(), [Media("radar", np.ones(9))])


def test_samples_of_another_modality():
    samples = [Media.text("a dog"), Media.text("a cat"), Media.audio("dog.wav")]
    with pytest.raises(
        EncoderError, match=r"Media\.audio\('dog\.wav'\) is of a modality that it does not serve"
    ):
        check_encoder(LetterEncoder(), samples)


class ConfigRaises(ColorEncoder):
    @property
    def config(self):
        raise RuntimeError("not ready")


@pytest.mark.parametrize(
    ("encoder", "samples", "told"),
    [
        (ColorEncoder(), ["a.png"], r"'a\.png' is not a Media; wrap it, as in Media\.image\('a\.png'\)"),
        (ColorEncoder(), Media.image("a.png"), "samples must be a list of Media"),
        (ColorEncoder(), [Media.image("nowhere.png")], "nowhere.png: cannot be opened"),
        (ConfigRaises(), None, "config raised RuntimeError: not ready"),
        (ColorEncoder, None, "ColorEncoder breaks .*\n- it is a class; give an instance"),
    ],
)
def test_what_cannot_be_checked_is_listed(encoder, samples, told):
    with pytest.raises(EncoderError, match=told):
        check_encoder(encoder, samples)
