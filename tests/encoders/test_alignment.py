"""Which encoder serves a modality, and whether the encoders of a model were trained together."""

import pytest

from bindllm.encoders import EfficientNetLite, HuggingFace, alignment_warnings, encoder_for, space_of
from bindllm.errors import InputError
from tiny import ColorEncoder


class Ears(ColorEncoder):
    modalities = ("audio",)


class Radar(ColorEncoder):
    modalities = ("radar", "sonar")


def in_space(kind, space):
    encoder = kind()
    encoder.space = space
    return encoder


def test_encoders_of_one_space_are_not_warned_of():
    assert alignment_warnings([]) == []
    assert alignment_warnings([ColorEncoder()]) == []
    assert alignment_warnings([in_space(ColorEncoder, "a"), in_space(Ears, "a"), in_space(Radar, "a")]) == []


def test_each_space_that_is_not_the_first_is_named_with_its_encoders():
    first, second, third = in_space(ColorEncoder, "a"), in_space(Ears, "b"), in_space(Radar, "b")
    (warning,) = alignment_warnings([first, second, third])
    told = "Ears (audio; space 'b') and Radar (radar, sonar; space 'b') were never trained together with "
    assert warning.startswith(f"{told}ColorEncoder (image; space 'a'): ")
    assert len(alignment_warnings([first, second, in_space(Radar, "c")])) == 2


def test_an_encoder_without_a_space_belongs_to_nobody():
    warnings = alignment_warnings([ColorEncoder(), Ears(), in_space(Radar, "a")])
    assert [warning.split(" ")[0] for warning in warnings] == ["Ears", "Radar"]
    assert "ColorEncoder (image; no space named)" in warnings[0]


def test_the_spaces_of_shipped_encoders():
    pinned = HuggingFace("org/clip", revision="abc")
    assert space_of(pinned) == space_of(HuggingFace("org/clip", revision="abc", modalities=["text"]))
    assert space_of(pinned) != space_of(HuggingFace("org/clip", revision="abd"))
    assert space_of(HuggingFace("my/radar", space="imagebind")) == "imagebind"
    assert space_of(EfficientNetLite()) == "efficientnet-lite0"


def test_the_first_encoder_that_serves_a_modality_wins():
    first, second = Ears(), Ears(grid=2)
    assert encoder_for("audio", [ColorEncoder(), first, second]) is first


@pytest.mark.parametrize(
    ("modality", "told"),
    [
        ("imge", r"Did you mean 'image'\?"),
        ("rader", r"Did you mean 'radar'\?"),
        ("vido", r"Did you mean 'video'\?"),
        ("sound", "Known: audio, depth, image"),
        (
            "audio",
            r"no encoder serves the modality 'audio'; the encoders here serve: image, radar, sonar\. Name",
        ),
    ],
)
def test_what_no_encoder_serves_is_named_with_the_closest(modality, told):
    with pytest.raises(InputError, match=told):
        encoder_for(modality, [ColorEncoder(), Radar()])
