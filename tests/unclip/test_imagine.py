"""`Imagine`: media of any modality through a tiny pipeline, its seeds, its files, and the encoders that it refuses."""

import errno
import json

import numpy as np
import pytest
import torch
from PIL import Image

from bindllm import Imagine, Media, VisualCache
from bindllm.cache.blend import CacheSettings
from bindllm.encoders import HuggingFace
from bindllm.encoders.fusion import fuse
from bindllm.errors import CheckpointError, InputError, MediaError, MissingExtraError, StoreError
from bindllm.testing import check_encoder, synthetic_media
from bindllm.unclip.images import PipelineImages
from tiny import COLORS, ColorEncoder, color_images
from unclip_parts import SIDE, WIDTH, JointEncoder, Sounds, save_tiny_clip, save_tiny_pipeline

RED, BLUE = (Media.image(np.full((40, 40, 3), COLORS[name], np.uint8)) for name in ("red", "blue"))
NOISE = synthetic_media("image")[0]
SOUND = Media.audio(np.sin(np.arange(8000, dtype=np.float32)))
CLOUD = Media.point(np.eye(3, dtype=np.float32))


@pytest.fixture(scope="module")
def imagine(pipeline) -> Imagine:
    return Imagine(pipeline, [JointEncoder(str(pipeline))], device="cpu", dtype="float32")


def pixels(imagine: Imagine, media: list[Media], **settings) -> np.ndarray:
    [image] = imagine(media, **{"steps": 1, **settings})
    return np.asarray(image.image)


@pytest.mark.parametrize("media", [RED, SOUND, CLOUD, Media.text("a dog")], ids=lambda media: media.modality)
def test_every_modality_is_drawn_and_another_media_gives_another_image(imagine, media):
    drawn, other = pixels(imagine, [media]), pixels(imagine, [NOISE])
    assert drawn.shape == (SIDE, SIDE, 3)
    assert (drawn != other).mean() > 0.1


def test_a_seed_names_an_image_whatever_is_drawn_before_it(imagine, tmp_path):
    first, second = imagine([SOUND], num_images=2, seed=3, steps=2, noise_level=200)
    first.save(tmp_path / "first.png")
    [again] = imagine([SOUND], seed=3, steps=2, noise_level=200)
    again.save(tmp_path / "again.png")
    [alone] = imagine([SOUND], seed=4, steps=2, noise_level=200)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    assert (second.image.tobytes(), second.facts) == (alone.image.tobytes(), alone.facts)
    assert first.image.tobytes() != second.image.tobytes()


def test_each_setting_changes_the_image(imagine):
    plain = pixels(imagine, [SOUND])
    for change in (
        {"prompt": "a cat"},
        {"negative_prompt": "a cat"},
        {"guidance": 2.0},
        {"steps": 2},
        {"noise_level": 500},
    ):
        assert not np.array_equal(plain, pixels(imagine, [SOUND], **change)), change
    assert pixels(imagine, [SOUND], height=16, width=24).shape == (16, 24, 3)


def test_media_are_mixed_by_their_weights_and_keep_the_length_of_the_pipelines_own_embeddings(imagine):
    encoder = imagine.encoders[0]
    rows = torch.cat([encoder.embed(one.modality, [encoder.prepare(one)]) for one in (RED, SOUND)])
    mixed = [RED, Media.audio(SOUND.source, weight=3)]
    single, both = imagine.embed([[RED], mixed])
    torch.testing.assert_close(single / single.norm(), rows[0])
    torch.testing.assert_close(both / both.norm(), fuse(rows, torch.tensor([1.0, 3.0])))
    # A group does not depend on the others of its batch.
    torch.testing.assert_close(imagine.embed([mixed])[0], both)
    own = [encoder.model(encoder.prepare(one)[None]).image_embeds.norm() for one in synthetic_media("image")]
    torch.testing.assert_close(both.norm(), torch.stack(own).mean())


def test_the_embedding_reaches_the_pipeline_in_its_space(imagine, monkeypatch):
    seen = {}
    draw = type(imagine._pipeline)._encode_image

    def watch(self, **inputs):
        seen.update(inputs)
        return draw(self, **inputs)

    monkeypatch.setattr(type(imagine._pipeline), "_encode_image", watch)
    pixels(imagine, [RED], noise_level=7)
    torch.testing.assert_close(seen["image_embeds"], imagine.embed([[RED]]))
    assert seen["noise_level"].tolist() == [7]


def test_the_length_can_be_chosen(pipeline):
    chosen = Imagine(pipeline, [PipelineImages(str(pipeline))], device="cpu", norm=3)
    torch.testing.assert_close(chosen.embed([[RED]]).norm(), torch.tensor(3.0))


def test_the_cache_moves_an_embedding_to_images(imagine, pipeline, tmp_path):
    encoder = JointEncoder(str(pipeline))
    images = sorted((color_images(tmp_path / "colors") / "images").iterdir())
    cache = VisualCache.from_images(images, encoder, tmp_path / "cache", store=tmp_path / "store")
    near = Imagine(pipeline, [encoder], cache=tmp_path / "cache", device="cpu", dtype="float32")
    moved, plain = near.embed([[SOUND], [RED]]), imagine.embed([[SOUND], [RED]])
    torch.testing.assert_close(moved[0], cache.blend(plain[:1])[0] * near.norm)
    # Images stay unchanged by default.
    torch.testing.assert_close(moved[1], plain[1])
    assert not np.array_equal(pixels(near, [SOUND]), pixels(imagine, [SOUND]))
    [image] = near([SOUND], steps=1)
    assert image.facts["cache"] == {"images": len(images), **vars(CacheSettings())}
    with pytest.raises(StoreError, match="the two embedding spaces differ"):
        Imagine(pipeline, [PipelineImages(str(pipeline))], cache=cache, device="cpu")


def test_the_file_has_the_facts_and_no_path(imagine, tmp_path):
    [image] = imagine([SOUND, RED], prompt="höher", seed=5, steps=1)
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        facts = json.loads(opened.text["bindllm"])
        assert np.array_equal(np.asarray(opened), np.asarray(image.image))
    assert facts == image.facts
    assert facts["media"] == [
        {"modality": media.modality, "sha256": media.content_hash(), "weight": 1.0} for media in (SOUND, RED)
    ]
    assert (facts["pipeline"], facts["license"]["pipeline"]) == ("tiny", "openrail++")
    assert (facts["prompt"], facts["seed"], facts["height"]) == ("höher", 5, SIDE)
    assert facts["encoders"] == [imagine.encoders[0].fingerprint()]
    assert "/" not in json.dumps(facts)


def test_only_free_names_that_end_in_png_are_written(imagine, tmp_path):
    [image] = imagine([RED], steps=1)
    for name, words in (("a.jpg", "ends in .png"), ("b.png", "exists")):
        (tmp_path / "b.png").write_text("mine")
        with pytest.raises(InputError, match=words):
            image.save(tmp_path / name)
    assert (tmp_path / "b.png").read_text() == "mine"
    image.save(tmp_path / "b.png", overwrite=True)
    assert Image.open(tmp_path / "b.png").size == (SIDE, SIDE)


def test_a_full_disk_leaves_the_earlier_file(imagine, tmp_path, monkeypatch):
    [image] = imagine([RED], steps=1)
    image.save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        image.save(tmp_path / "a.png", overwrite=True)
    assert [*tmp_path.iterdir()] == [tmp_path / "a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"height": 30}, "height is 30, expected a multiple of 8"),
        ({"width": 0}, "width is 0, expected a multiple of 8"),
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"steps": 1001}, "steps is 1001, expected 1 to 1000"),
        ({"seed": -1}, "seed is -1"),
        ({"noise_level": 1000}, "noise_level is 1000, expected 0 to 999"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"negative_prompt": "a", "guidance": 1.0}, "has no effect at guidance 1"),
        ({"prompt": "a " * 80}, "prompt has 82 tokens, and the pipeline reads 77"),
        ({"negative_prompt": "a " * 80}, "negative_prompt has 82 tokens"),
        ({"num_images": 0}, "num_images is 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_drawn_are_refused_before_the_first_image(imagine, settings, words):
    with pytest.raises(InputError, match=words):
        imagine([RED], **settings)


def test_without_media_nothing_is_drawn(imagine, tmp_path):
    with pytest.raises(InputError, match="no media to draw"):
        imagine([], prompt="a cat")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(MediaError, match=r"broken\.png"):
        imagine([Media.image(tmp_path / "broken.png")])
    with pytest.raises(InputError, match="no encoder serves the modality 'depth'"):
        imagine([Media.depth(np.ones((4, 4)))])


def test_a_text_without_images_near_it_is_drawn_with_a_warning(imagine, caplog):
    imagine([Media.text("a dog")])
    assert "their embeddings lie apart from those of images" in caplog.text
    caplog.clear()
    imagine([Media.text("a dog"), RED])
    assert not caplog.text


def test_numbers_that_are_not_finite_are_not_an_image(pipeline, monkeypatch):
    imagine = Imagine(pipeline, [PipelineImages(str(pipeline))], device="cpu", dtype="float32")
    imagine._pipeline.vae.decode = lambda latents, **_: (latents[:, :3] * float("nan"),)
    with pytest.raises(InputError, match="not finite in torch.float32"):
        next(imagine([RED], steps=1))


def test_the_pipelines_own_encoder_keeps_the_contract(pipeline):
    check_encoder(PipelineImages(str(pipeline)))
    with pytest.raises(MediaError, match="longer than 100 times the short side"):
        PipelineImages(str(pipeline)).prepare(Media.image(np.zeros((1, 200, 3), np.uint8)))


def test_a_clip_with_the_pipelines_image_encoder_shares_its_space(pipeline, tmp_path):
    """As a CLIP ViT-H of the hub next to a pipeline that was trained on it."""
    save_tiny_clip(pipeline, tmp_path / "same")
    imagine = Imagine(pipeline, [HuggingFace(str(tmp_path / "same"))], device="cpu")
    own = PipelineImages(str(pipeline))
    expected = own.embed("image", [own.prepare(RED)])[0] * imagine.norm
    torch.testing.assert_close(imagine.embed([[RED]])[0], expected)
    save_tiny_clip(save_tiny_pipeline(tmp_path / "other", seed=1), tmp_path / "another")
    with pytest.raises(CheckpointError, match="HuggingFace embeds images in another space than tiny"):
        Imagine(pipeline, [HuggingFace(str(tmp_path / "another"))], device="cpu")


def test_encoders_of_another_space_are_refused_with_the_way_to_a_map(pipeline, tmp_path):
    how = "bindllm fit_map MAP"
    with pytest.raises(
        CheckpointError, match="embeds in 16 numbers and tiny draws embeddings of 32"
    ) as refused:
        Imagine(pipeline, [ColorEncoder()], device="cpu")
    assert how in str(refused.value)
    # Of the same width, and yet another space.
    with pytest.raises(CheckpointError, match="embeds images in another space than tiny") as refused:
        Imagine(pipeline, [ColorEncoder(WIDTH)], device="cpu")
    assert how in str(refused.value)
    other = save_tiny_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="embeds images in another space than other"):
        Imagine(other, [JointEncoder(str(pipeline))], device="cpu")


def test_an_encoder_without_images_needs_one_of_its_space(pipeline):
    sounds, joint = Sounds(str(pipeline)), JointEncoder(str(pipeline))
    with pytest.raises(CheckpointError, match="no encoder here serves images"):
        Imagine(pipeline, [sounds], device="cpu")
    torch.testing.assert_close(
        Imagine(pipeline, [sounds, joint], device="cpu").embed([[SOUND]]),
        Imagine(pipeline, [joint], device="cpu").embed([[SOUND]]),
    )
    sounds.space = "elsewhere"
    with pytest.raises(CheckpointError, match="was never trained together with"):
        Imagine(pipeline, [sounds, joint], device="cpu")


def test_bfloat16_draws_nearly_the_same(imagine, pipeline):
    half = Imagine(pipeline, imagine.encoders, device="cpu", dtype="bfloat16")
    difference = pixels(half, [SOUND]).astype(int) - pixels(imagine, [SOUND])
    assert np.abs(difference).mean() < 16


def test_an_extra_that_is_not_installed_is_named(pipeline, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'bindllm\[imagine\]'"):
        Imagine(pipeline, [PipelineImages(str(pipeline))], device="cpu")
