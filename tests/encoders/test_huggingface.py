"""Tiny random CLIP, SigLIP, SigLIP 2, CLAP and single towers: our embeddings are transformers' own, and batch-free."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn.functional import normalize
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BitImageProcessorPil,
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)
from transformers.utils import logging

from bindllm.encoders import HuggingFace, Tuned, hub
from bindllm.errors import EncoderError, InputError, MediaError
from bindllm.media import Media
from bindllm.testing import check_encoder

WIDTHS = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
PICTURE = {**WIDTHS, "image_size": 32, "patch_size": 8}
WORDS = {**WIDTHS, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
TEXTS = ["a dog", "a cat on a mat, asleep", "", "dog " * 60]
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((48, 48), (40, 90), (70, 33))]
RATE = 16_000


def tiny_tokenizer(max_length: int, **options) -> PreTrainedTokenizerFast:
    """One token per letter, between a start and an end token."""
    letters = "abcdefghijklmnopqrstuvwxyz ,"
    vocabulary = {word: n for n, word in enumerate(["<pad>", "<s>", "<unk>", "</s>", *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        **options,
    )


def save(folder, model, *parts):
    """Write random weights, large enough to matter, with processors; return the folder."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    for part in (model, *parts):
        part.save_pretrained(folder)
    return str(folder)


def clip(folder):
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**WORDS, "max_position_embeddings": 20}, vision_config=PICTURE, projection_dim=24
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return save(folder, CLIPModel(config), processor, tiny_tokenizer(20))


def siglip(folder):
    torch.manual_seed(0)
    config = SiglipConfig(
        text_config={**WORDS, "max_position_embeddings": 16, "projection_size": 32}, vision_config=PICTURE
    )
    processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return save(folder, SiglipModel(config), processor, tiny_tokenizer(16, model_input_names=["input_ids"]))


def siglip2(folder):
    torch.manual_seed(0)
    vision = {**WIDTHS, "patch_size": 8, "num_patches": 16}
    config = Siglip2Config(
        text_config={**WORDS, "max_position_embeddings": 16, "projection_size": 32}, vision_config=vision
    )
    processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    return save(folder, Siglip2Model(config), processor, tiny_tokenizer(16, model_input_names=["input_ids"]))


def clap(folder, *, fusion=True):
    torch.manual_seed(0)
    audio = {
        "depths": [1, 1],
        "num_attention_heads": [2, 4],
        "hidden_size": 32,
        "patch_embeds_hidden_size": 16,
        "spec_size": 64,
        "num_mel_bins": 16,
        "window_size": 4,
        "enable_fusion": fusion,
        "projection_dim": 24,
    }
    words = {**WORDS, "max_position_embeddings": 40, "pad_token_id": 0, "projection_dim": 24}
    config = ClapConfig(text_config=words, audio_config=audio, projection_dim=24)
    extractor = ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=RATE,
        hop_length=160,
        max_length_s=2,
        fft_window_size=512,
        frequency_max=8000,
        truncation="fusion" if fusion else "rand_trunc",
    )
    return save(folder, ClapModel(config), extractor, tiny_tokenizer(39))


def dinov2(folder):
    torch.manual_seed(0)
    processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return save(folder, Dinov2Model(Dinov2Config(**PICTURE)), processor)


def bert(folder):
    torch.manual_seed(0)
    config = BertConfig(**WORDS, max_position_embeddings=40)
    return save(folder, BertModel(config), tiny_tokenizer(40))


def wav2vec2(folder):
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        **{**WIDTHS, "initializer_range": 0.05},
        conv_dim=(16, 16),
        conv_stride=(40, 8),
        conv_kernel=(80, 8),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    )
    return save(folder, Wav2Vec2Model(config), Wav2Vec2FeatureExtractor(sampling_rate=RATE))


def sounds() -> list[np.ndarray]:
    """Mono and stereo at 16 kHz: shorter than any window, and longer than CLAP's of 2 seconds here."""
    time = np.arange(3 * RATE) / RATE
    tones = [
        np.sin(2 * np.pi * pitch * time * (1 + 0.3 * time)).astype(np.float32) for pitch in (220, 400, 1300)
    ]
    return [tones[0][: RATE // 2], tones[1][: 2 * RATE], np.stack([tones[2], tones[0]])]


def samples(encoder) -> list[Media]:
    made = {
        "image": [Media.image(array) for array in PICTURES],
        "text": [Media.text(text) for text in TEXTS],
        "audio": [Media.audio(array) for array in sounds()] if "audio" in encoder.modalities else [],
    }
    return [media for modality in encoder.modalities for media in made[modality]]


def embed(encoder, media: list[Media]) -> torch.Tensor:
    return encoder.embed(media[0].modality, [encoder.prepare(item) for item in media])


def own_images(folder, processor, arrays):
    from PIL import Image

    return processor.from_pretrained(folder)(images=[Image.fromarray(a) for a in arrays], return_tensors="pt")


@pytest.mark.parametrize(
    "make", [clip, siglip, siglip2, clap, dinov2, bert, wav2vec2], ids=lambda make: make.__name__
)
def test_the_contract_is_kept(make, tmp_path):
    encoder = HuggingFace(make(tmp_path))
    check_encoder(encoder, samples(encoder))


@pytest.mark.parametrize(
    ("make", "processor", "width"),
    [
        (clip, CLIPImageProcessorPil, 24),
        (siglip, SiglipImageProcessorPil, 32),
        (siglip2, Siglip2ImageProcessorPil, 32),
    ],
    ids=["clip", "siglip", "siglip2"],
)
@torch.no_grad()
def test_joint_models_of_pictures_and_texts_are_transformers_own(make, processor, width, tmp_path):
    folder = make(tmp_path)
    encoder, model = HuggingFace(folder), AutoModel.from_pretrained(folder).eval()
    assert (encoder.modalities, encoder.embedding_size) == (("image", "text"), width)
    expected = model.get_image_features(**own_images(folder, processor, PICTURES)).pooler_output
    found = embed(encoder, [Media.image(array) for array in PICTURES])
    torch.testing.assert_close(found, normalize(expected, dim=-1), atol=1e-5, rtol=0)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    padding = True if make is clip else "max_length"
    ids = tokenizer(TEXTS, padding=padding, truncation=True, return_tensors="pt")
    expected = model.get_text_features(
        **{n: ids[n] for n in tokenizer.model_input_names if n in ids and n != "token_type_ids"}
    )
    found = embed(encoder, [Media.text(text) for text in TEXTS])
    torch.testing.assert_close(found, normalize(expected.pooler_output, dim=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("make", [clip, siglip, clap, dinov2, bert, wav2vec2], ids=lambda make: make.__name__)
def test_the_last_block_of_each_modality_can_be_trained(make, rank, tmp_path):
    folder = str(make(tmp_path))
    for modality in HuggingFace(folder).modalities:
        entry = {"class_path": "bindllm.encoders.HuggingFace", "init_args": {"name": folder}}
        encoder = Tuned(entry, blocks=1, rank=rank, modality=modality)
        media = [media for media in samples(encoder) if media.modality == modality]
        assert torch.equal(embed(encoder, media), embed(HuggingFace(folder), media))
        for parameter in encoder.parameters().values():
            parameter.requires_grad_(True)
            # At the start the second matrix is zero, and then the first has no gradient.
            parameter.data += 0.05
        embed(encoder, media)[:, :3].sum().backward()
        graded = [name for name, x in encoder.parameters().items() if x.grad.abs().max() > 1e-12]
        # A softmax does not change with a bias of all keys.
        assert {*encoder.parameters()} - {*graded} <= {name for name in encoder.parameters() if "k" in name}
        every = encoder.base._model.named_parameters()
        assert sum(x.grad is not None for _, x in every) == len(encoder.parameters())


def test_a_long_text_keeps_its_end_token(tmp_path):
    encoder = HuggingFace(clip(tmp_path))
    ids = encoder.prepare(Media.text("dog " * 60))
    assert (len(ids), ids[0].item(), ids[-1].item()) == (20, 1, 3)
    assert encoder.prepare(Media.text("dog")).tolist()[-1] == 3


@pytest.mark.parametrize("fusion", [True, False])
@torch.no_grad()
def test_clap_hears_three_windows_of_a_long_sound(fusion, tmp_path):
    folder = clap(tmp_path, fusion=fusion)
    encoder, model = HuggingFace(folder), ClapModel.from_pretrained(folder).eval()
    extractor = ClapFeatureExtractor.from_pretrained(folder)
    assert (encoder.modalities, encoder.embedding_size) == (("text", "audio"), 24)
    short, exact, long = sounds()
    mono = long.mean(0)
    clips = [short, exact, mono[: 2 * RATE], mono[RATE // 2 : RATE // 2 + 2 * RATE], mono[-2 * RATE :]]
    features = extractor(clips, sampling_rate=RATE, return_tensors="pt")["input_features"]
    none = torch.zeros(len(clips), 1, dtype=torch.bool)
    expected = model.get_audio_features(features.float(), is_longer=none).pooler_output
    expected = torch.stack([*expected[:2], normalize(expected[2:].mean(0), dim=0)])
    found = embed(encoder, [Media.audio(array) for array in sounds()])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    expected = model.get_text_features(ids["input_ids"], attention_mask=ids["attention_mask"]).pooler_output
    torch.testing.assert_close(
        embed(encoder, [Media.text(text) for text in TEXTS]), expected, atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_single_towers_pool_as_documented(tmp_path):
    folder = dinov2(tmp_path / "dinov2")
    pixels = own_images(folder, BitImageProcessorPil, PICTURES)["pixel_values"]
    output = Dinov2Model.from_pretrained(folder).eval()(pixels)
    media = [Media.image(array) for array in PICTURES]
    for pooling, expected in {
        "auto": output.pooler_output,
        "first": output.last_hidden_state[:, 0],
        "mean": output.last_hidden_state.mean(1),
        "last": output.last_hidden_state[:, -1],
    }.items():
        found = embed(HuggingFace(folder, pooling=pooling), media)
        torch.testing.assert_close(found, normalize(expected, dim=-1), atol=1e-5, rtol=0)

    folder = bert(tmp_path / "bert")
    model, tokenizer = (
        BertModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    own = [model(tokenizer(text, return_tensors="pt")["input_ids"]) for text in TEXTS[:3]]
    media = [Media.text(text) for text in TEXTS[:3]]
    for pooling, pick in {
        "auto": lambda o: o.last_hidden_state[0].mean(0),
        "last": lambda o: o.last_hidden_state[0, -1],
        "pooler": lambda o: o.pooler_output[0],
    }.items():
        expected = normalize(torch.stack([pick(output) for output in own]), dim=-1)
        torch.testing.assert_close(
            embed(HuggingFace(folder, pooling=pooling), media), expected, atol=1e-5, rtol=0
        )

    folder = wav2vec2(tmp_path / "wav2vec2")
    model, extractor = (
        Wav2Vec2Model.from_pretrained(folder).eval(),
        Wav2Vec2FeatureExtractor.from_pretrained(folder),
    )
    own = [
        model(
            extractor(s if s.ndim == 1 else s.mean(0), sampling_rate=RATE, return_tensors="pt")[
                "input_values"
            ]
        )
        for s in sounds()
    ]
    expected = normalize(torch.stack([output.last_hidden_state[0].mean(0) for output in own]), dim=-1)
    found = embed(HuggingFace(folder), [Media.audio(array) for array in sounds()])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def own_tokens(encoder, media: list[Media]) -> list[torch.Tensor]:
    return encoder.embed(media[0].modality, [encoder.prepare(item) for item in media], tokens=True).tokens


@torch.no_grad()
def test_tokens_are_the_states_of_patches_ids_and_frames(tmp_path):
    images = [Media.image(array) for array in PICTURES]
    folder = clip(tmp_path / "clip")
    encoder, model = HuggingFace(folder), AutoModel.from_pretrained(folder).eval()
    assert encoder.token_sizes == {"image": 32, "text": 32}
    states = model.get_image_features(**own_images(folder, CLIPImageProcessorPil, PICTURES)).last_hidden_state
    for found, row in zip(own_tokens(encoder, images), states, strict=True):
        # The class token comes first, then 4 rows of 4 patches.
        torch.testing.assert_close(found, row[1:].unflatten(0, (4, 4)), atol=1e-5, rtol=0)
    tokenizer, words = AutoTokenizer.from_pretrained(folder), ["a dog", "a cat on a mat", ""]
    for found, text in zip(own_tokens(encoder, [Media.text(text) for text in words]), words, strict=True):
        own = model.get_text_features(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(found, own, atol=1e-5, rtol=0)

    folder = siglip2(tmp_path / "siglip2")
    shapes = [tuple(tokens.shape) for tokens in own_tokens(HuggingFace(folder), images)]
    assert shapes == [(*HuggingFace(folder).prepare(image).shape[:2], 32) for image in images]
    folder = clap(tmp_path / "clap")
    heard = own_tokens(HuggingFace(folder), [Media.audio(array) for array in sounds()])
    assert [len(tokens) for tokens in heard] == [1, 1, 3]
    assert {(tokens.dim(), tokens.shape[-1]) for tokens in heard} == {(4, 32)}
    folder = wav2vec2(tmp_path / "wav2vec2")
    heard = own_tokens(HuggingFace(folder), [Media.audio(array) for array in sounds()[:2]])
    torch.testing.assert_close(
        normalize(heard[0][0].mean(0), dim=0),
        embed(HuggingFace(folder), [Media.audio(sounds()[0])])[0],
        atol=1e-5,
        rtol=0,
    )


@torch.no_grad()
def test_hierarchical_towers_and_spectrograms_have_grids(tmp_path):
    torch.manual_seed(0)
    sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
    processor = BitImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    folder = save(tmp_path / "swin", SwinModel(SwinConfig(image_size=32, patch_size=4, **sizes)), processor)
    encoder = HuggingFace(folder)
    # 8 x 8 patches of 4 pixels, merged two by two.
    assert [tuple(t.shape) for t in own_tokens(encoder, [Media.image(PICTURES[0])])] == [(4, 4, 32)]
    check_encoder(encoder)
    shape = {"num_mel_bins": 16, "max_length": 64, "patch_size": 8, "frequency_stride": 4, "time_stride": 8}
    model = ASTModel(ASTConfig(**WIDTHS, **shape))
    extractor = ASTFeatureExtractor(num_mel_bins=16, max_length=64, sampling_rate=RATE)
    encoder = HuggingFace(save(tmp_path / "ast", model, extractor))
    (tokens,) = own_tokens(encoder, [Media.audio(sounds()[0])])
    assert tokens.shape == (1, 3, 8, 32)


@torch.no_grad()
def test_a_pooler_without_weights_is_never_used(tmp_path):
    torch.manual_seed(0)
    processor = CLIPImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    folder = save(tmp_path, ViTModel(ViTConfig(**PICTURE), add_pooling_layer=False), processor)
    media = [Media.image(array) for array in PICTURES]
    torch.testing.assert_close(
        embed(HuggingFace(folder), media), embed(HuggingFace(folder, pooling="first"), media)
    )
    with pytest.raises(
        EncoderError, match=r"no fitting weights for pooler\.dense\.bias.*they would be random"
    ):
        embed(HuggingFace(folder, pooling="pooler"), media)


def test_sentence_transformers_folders_say_how_to_pool(tmp_path):
    folder = bert(tmp_path)
    media = [Media.text("a dog"), Media.text("a cat on a mat")]
    first, mean = (embed(HuggingFace(folder, pooling=p), media) for p in ("first", "mean"))
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling/config.json"
    before = HuggingFace(folder).fingerprint()
    for settings, expected in (
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, first),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, mean),
        ({"pooling_mode": "cls"}, first),
    ):
        file.write_text(json.dumps(settings))
        assert torch.equal(embed(HuggingFace(folder), media), expected)
        assert HuggingFace(folder).fingerprint() != before
    file.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(EncoderError, match=r"pooling \['max'\] is not supported"):
        embed(HuggingFace(folder), media)
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(EncoderError, match=r"modules \['Dense'\] are not supported"):
        HuggingFace(folder).modalities  # noqa: B018


def test_the_fingerprint_is_of_the_content(tmp_path):
    first, second = clip(tmp_path / "a"), clip(tmp_path / "b")
    before = HuggingFace(first).fingerprint()
    assert before == HuggingFace(second, modalities=["text"]).fingerprint()
    assert before != HuggingFace(first, dtype="bfloat16").fingerprint()
    file = tmp_path / "b/preprocessor_config.json"
    file.write_text(file.read_text().replace("32", "24"))
    assert before != HuggingFace(second).fingerprint()
    weights = tmp_path / "a/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert before != HuggingFace(first).fingerprint()


def test_modalities_can_be_chosen_and_half_precision_stays_close(tmp_path):
    folder = clip(tmp_path)
    assert HuggingFace(folder, modalities=["text"]).modalities == ("text",)
    with pytest.raises(InputError, match="embeds text media, not 'image'"):
        HuggingFace(folder, modalities=["text"]).prepare(Media.image(PICTURES[0]))
    with pytest.raises(EncoderError, match=r"does not serve 'txt'. Did you mean 'text'"):
        HuggingFace(folder, modalities=["txt"]).modalities  # noqa: B018
    media = [Media.image(array) for array in PICTURES]
    exact, rough = (embed(HuggingFace(folder, dtype=dtype), media) for dtype in ("float32", "bfloat16"))
    assert rough.dtype == torch.float32
    assert (exact * rough).sum(-1).min() > 0.999


def test_the_constructor_reads_nothing():
    encoder = HuggingFace("nowhere/at/all")
    with pytest.raises(EncoderError, match="encoder folder 'nowhere/at/all' does not exist in /"):
        encoder.modalities  # noqa: B018
    with pytest.raises(EncoderError, match="give its revision too"):
        HuggingFace("openai/clip").fingerprint()
    with pytest.raises(InputError, match=r"unknown pooling 'maen'. Did you mean 'mean'"):
        HuggingFace("a/b", pooling="maen")
    with pytest.raises(InputError, match="unknown dtype 'int8'"):
        HuggingFace("a/b", dtype="int8")


def test_what_is_no_encoder_is_refused(tmp_path):
    folder = clip(tmp_path / "clip")
    with pytest.raises(EncoderError, match="joint model with a pooling of its own"):
        HuggingFace(folder, pooling="mean").modalities  # noqa: B018
    (tmp_path / "clip/model.safetensors").rename(tmp_path / "clip/pytorch_model.bin")
    with pytest.raises(EncoderError, match=r"holds no model.safetensors; other weights .* are pickles"):
        HuggingFace(folder).fingerprint()
    other = tmp_path / "t5"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(EncoderError, match="T5Model takes .* is not an encoder with one vector"):
        HuggingFace(str(other)).modalities  # noqa: B018
    (other / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "code.Config"}}))
    with pytest.raises(EncoderError, match="no usable model here"):
        HuggingFace(str(other)).modalities  # noqa: B018


def test_an_extreme_image_is_refused_before_its_processor_enlarges_it(tmp_path):
    line = Media.image(np.zeros((1, 20_000, 3), np.uint8))
    with pytest.raises(MediaError, match="20000 x 1 pixels, longer than 100 times the short side; crop"):
        HuggingFace(clip(tmp_path / "clip")).prepare(line)
    # SigLIP's processor makes every image a square.
    assert HuggingFace(siglip(tmp_path / "siglip")).prepare(line).shape == (3, 32, 32)


def test_a_bad_picture_is_a_media_error(tmp_path):
    encoder = HuggingFace(clip(tmp_path / "clip"))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(MediaError, match=r"broken\.png"):
        encoder.prepare(Media.image(tmp_path / "broken.png"))


def test_loading_leaves_the_settings_of_transformers_as_they_were():
    logging.enable_progress_bar()
    try:
        with pytest.raises(EncoderError, match="no usable model"), hub.loading("folder"):
            assert not logging.is_progress_bar_enabled()
            raise ValueError
        assert logging.is_progress_bar_enabled()
    finally:
        logging.disable_progress_bar()
