"""Families with rules of their own, tiny and random: our embeddings are those of transformers' own forward."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_huggingface import PICTURE, WIDTHS, WORDS, save, tiny_tokenizer
from torch.nn.functional import normalize
from transformers import (
    Aimv2Config,
    Aimv2Model,
    AutoModel,
    CLIPImageProcessorPil,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PeAudioConfig,
    PeAudioFeatureExtractor,
    PeAudioModel,
    VideoMAEConfig,
    VideoMAEModel,
    VJEPA2Config,
    VJEPA2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
    XCLIPConfig,
    XCLIPModel,
)

from bindllm.encoders import HuggingFace
from bindllm.errors import EncoderError, InputError
from bindllm.media import Media
from bindllm.testing import check_encoder

SETTINGS = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}, "resample": 2}
SETTINGS |= {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
VIDEO = np.random.default_rng(0).integers(0, 256, (9, 40, 60, 3), dtype=np.uint8)
WORDED = {**WORDS, "max_position_embeddings": 20}


def written(folder, model, *parts, settings=None, file="preprocessor_config.json"):
    """Save a model with its processors; return the encoder and the model."""
    save(folder, model, *parts)
    if settings is not None:
        (folder / file).write_text(json.dumps(settings))
    return HuggingFace(str(folder)), AutoModel.from_pretrained(folder).eval()


def pixels(image: np.ndarray) -> torch.Tensor:
    return CLIPImageProcessorPil(**SETTINGS)(images=Image.fromarray(image), return_tensors="pt")[
        "pixel_values"
    ][0]


def frames(count: int) -> torch.Tensor:
    """The frames in the middles of equal parts."""
    return torch.stack([pixels(VIDEO[int((n + 0.5) * len(VIDEO) / count)]) for n in range(count)])[None]


def text_ids(folder) -> dict[str, torch.Tensor]:
    return dict(tiny_tokenizer(20)(["a dog"], return_tensors="pt", return_token_type_ids=False))


def embed(encoder, modality, source) -> torch.Tensor:
    return encoder.embed(modality, [encoder.prepare(Media(modality, source))])


def assert_same(encoder, modality, source, expected):
    torch.testing.assert_close(
        embed(encoder, modality, source), normalize(expected, dim=-1), atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_aimv2(tmp_path):
    config = Aimv2Config(text_config=WORDED, vision_config=PICTURE, projection_dim=24)
    encoder, model = written(
        tmp_path, Aimv2Model(config), CLIPImageProcessorPil(**SETTINGS), tiny_tokenizer(20)
    )
    assert (encoder.modalities, encoder.embedding_size) == (("image", "text"), 24)
    # With padding: without it, transformers 5.23 reads a text in both directions.
    texts = tiny_tokenizer(20)(
        ["a dog", "a dog, too"], return_tensors="pt", padding=True, return_token_type_ids=False
    )
    output = model(**texts, pixel_values=pixels(VIDEO[0])[None])
    assert_same(encoder, "image", VIDEO[0], output.image_embeds)
    assert_same(encoder, "text", "a dog", output.text_embeds[:1])
    check_encoder(encoder)


@torch.no_grad()
def test_x_clip(tmp_path):
    mit = {f"mit_{name}": value for name, value in WIDTHS.items() if name != "initializer_range"}
    vision = {**PICTURE, "num_frames": 4, **mit}
    config = XCLIPConfig(
        text_config=WORDED, vision_config=vision, projection_dim=32, prompt_num_attention_heads=2
    )
    encoder, model = written(tmp_path, XCLIPModel(config), tiny_tokenizer(20), settings=SETTINGS)
    assert (encoder.modalities, encoder.embedding_size) == (("video", "text"), 32)
    output = model(**text_ids(tmp_path), pixel_values=frames(4))
    assert_same(encoder, "video", VIDEO, output.video_embeds)
    assert_same(encoder, "text", "a dog", model.get_text_features(**text_ids(tmp_path)).pooler_output)
    check_encoder(encoder)


@torch.no_grad()
def test_videos(tmp_path):
    config = VideoMAEConfig(**PICTURE, num_frames=4)
    encoder, model = written(tmp_path / "mae", VideoMAEModel(config), settings=SETTINGS)
    assert (encoder.modalities, encoder.embedding_size, encoder.token_sizes) == (
        ("video",),
        32,
        {"video": 32},
    )
    states = model(frames(4)).last_hidden_state
    assert_same(encoder, "video", VIDEO, states.mean(1))
    prepared = encoder.prepare(Media("video", VIDEO))
    (tokens,) = encoder.embed("video", [prepared], tokens=True).tokens
    # Two frames of each tubelet, and 4 x 4 patches.
    assert tokens.shape == (2, 4, 4, 32)
    torch.testing.assert_close(tokens.flatten(0, 2), states[0], atol=1e-5, rtol=1e-4)
    # A video of one frame shows it in all places.
    assert embed(encoder, "video", VIDEO[:1]).isfinite().all()
    check_encoder(encoder)
    shape = {
        "crop_size": 32,
        "patch_size": 8,
        "frames_per_clip": 4,
        "tubelet_size": 2,
        "pred_num_mask_tokens": 2,
    }
    sizes = {name: WIDTHS[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    config = VJEPA2Config(**shape, **sizes, **{f"pred_{name}": value for name, value in sizes.items()})
    file = "video_preprocessor_config.json"
    encoder, model = written(tmp_path / "jepa", VJEPA2Model(config), settings=SETTINGS, file=file)
    states = model.get_vision_features(frames(4))
    assert_same(encoder, "video", VIDEO, states.mean(1))
    (tokens,) = encoder.embed("video", [encoder.prepare(Media("video", VIDEO))], tokens=True).tokens
    torch.testing.assert_close(tokens, states[0].unflatten(0, (2, 4, 4)), atol=1e-5, rtol=1e-4)
    # Settings that are missing are never those of another model.
    (tmp_path / "jepa" / file).write_text(json.dumps({**SETTINGS, "image_std": None}))
    with pytest.raises(EncoderError, match="lacks image_std"):
        embed(HuggingFace(str(tmp_path / "jepa")), "video", VIDEO)


@torch.no_grad()
def test_the_encoder_of_whisper(tmp_path):
    sizes = {"encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 1}
    config = WhisperConfig(
        **sizes, **heads, d_model=32, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=3
    )
    extractor = WhisperFeatureExtractor()
    encoder, model = written(tmp_path, WhisperModel(config), extractor)
    assert (encoder.modalities, encoder.embedding_size) == (("audio",), 32)
    for seconds in (2, 30):
        sound = np.random.default_rng(0).normal(size=16_000 * seconds).astype(np.float32) / 10
        made = extractor(sound, sampling_rate=16_000, return_tensors="pt")
        # 50 states a second; the rest of 30 seconds is silence. The last frame of the sound reaches a little further.
        states = model.encoder(**made).last_hidden_state[:, : min(1500, 50 * seconds + 1)]
        assert_same(encoder, "audio", sound, states.mean(1))
    assert encoder.prepare(Media.audio(np.zeros(16_000 * 40, np.float32))).shape == (3, 80, 3000)
    check_encoder(encoder)


@torch.no_grad()
def test_pe_audio(tmp_path):
    text = {
        **WORDED,
        "model_type": "modernbert",
        "max_position_embeddings": 64,
        "cls_token_id": 1,
        "sep_token_id": 3,
    }
    dac = {"encoder_hidden_size": 4, "downsampling_ratios": [16, 40], "codebook_dim": 8, "hidden_size": 16}
    config = PeAudioConfig(text_config=text, audio_config={**WIDTHS, "head_dim": 8, "dac_config": dac})
    extractor = PeAudioFeatureExtractor(hop_length=640)
    encoder, model = written(tmp_path, PeAudioModel(config), extractor, tiny_tokenizer(20))
    assert (encoder.modalities, encoder.embedding_size) == (("audio", "text"), 32)
    sound = np.random.default_rng(0).normal(size=9_600).astype(np.float32) / 10
    made = extractor(sound, sampling_rate=48_000, return_tensors="pt")
    output = model(**text_ids(tmp_path), input_values=made["input_values"])
    assert_same(encoder, "audio", Media.audio(sound, sampling_rate=48_000).source, output.audio_embeds)
    assert_same(encoder, "text", "a dog", output.text_audio_embeds)
    check_encoder(encoder)


@torch.no_grad()
def test_dinov3_needs_no_torchvision(tmp_path):
    settings = {
        **SETTINGS,
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "size": {"height": 32, "width": 32},
    }
    del settings["crop_size"]
    encoder, model = written(tmp_path, DINOv3ViTModel(DINOv3ViTConfig(**PICTURE)), settings=settings)
    image = Image.fromarray(VIDEO[0]).resize((32, 32), Image.Resampling.BILINEAR)
    values = (np.asarray(image, np.float32) / 255 - SETTINGS["image_mean"]) / SETTINGS["image_std"]
    expected = model(torch.from_numpy(values).float().permute(2, 0, 1)[None]).pooler_output
    assert_same(encoder, "image", VIDEO[0], expected)
    check_encoder(encoder)


def test_the_first_dimensions_only(tmp_path):
    config = DINOv3ViTConfig(**PICTURE)
    settings = {**SETTINGS, "image_processor_type": "DINOv3ViTImageProcessorFast"}
    whole, _ = written(tmp_path, DINOv3ViTModel(config), settings=settings)
    short = HuggingFace(str(tmp_path), dimensions=8)
    torch.testing.assert_close(
        embed(short, "image", VIDEO[0]), normalize(embed(whole, "image", VIDEO[0])[:, :8], dim=-1)
    )
    assert short.embedding_size == 8
    assert short.fingerprint() != whole.fingerprint()
    assert "dimensions" not in whole.config
    check_encoder(short)
    with pytest.raises(EncoderError, match="has 32 dimensions, not 33"):
        _ = HuggingFace(str(tmp_path), dimensions=33).embedding_size
    with pytest.raises(InputError, match="dimensions"):
        HuggingFace(str(tmp_path), dimensions=0)


@pytest.mark.parametrize("kind", ["pe_video", "pe_audio_video"])
def test_models_that_need_timm_are_refused_with_what_to_use_instead(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(EncoderError, match="need the package timm.*use PE-Audio"):
        _ = HuggingFace(str(tmp_path)).modalities
