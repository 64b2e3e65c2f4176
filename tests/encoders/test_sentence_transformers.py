"""Tiny random models of sentence-transformers: our embeddings are those of the library itself."""

import json

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from test_huggingface import bert, clip
from torch.nn.functional import normalize

from bindllm.encoders import SentenceTransformers, Tuned
from bindllm.encoders.hub import _DOWNLOADED
from bindllm.errors import EncoderError, InputError
from bindllm.media import Media
from bindllm.media.limits import Budget, MediaLimits, decoding_one
from bindllm.testing import check_encoder

library = pytest.importorskip("sentence_transformers", exc_type=ImportError)
TEXTS = ["a dog", "a cat on a mat.jpg"]


def embed(encoder, modality, sources):
    return encoder.embed(modality, [encoder.prepare(Media(modality, source)) for source in sources])


@pytest.fixture
def sentences(tmp_path):
    """A text model with a dense layer after its pooling."""
    modules = library.sentence_transformer.modules
    bert(tmp_path / "bert")
    transformer = library.base.modules.Transformer(str(tmp_path / "bert"))
    torch.manual_seed(0)
    dense = library.base.modules.Dense(32, 24)
    model = library.SentenceTransformer(modules=[transformer, modules.Pooling(32), dense])
    model.save(str(tmp_path / "model"))
    return tmp_path / "model"


def test_texts_through_a_dense_layer(sentences):
    encoder, own = SentenceTransformers(str(sentences)), library.SentenceTransformer(str(sentences))
    assert (encoder.modalities, encoder.embedding_size) == (("text",), 24)
    expected = normalize(own.encode(TEXTS, convert_to_tensor=True), dim=-1)
    torch.testing.assert_close(embed(encoder, "text", TEXTS), expected, atol=1e-5, rtol=1e-4)
    check_encoder(encoder)
    short = SentenceTransformers(str(sentences), dimensions=8)
    torch.testing.assert_close(
        embed(short, "text", TEXTS), normalize(expected[:, :8], dim=-1), atol=1e-5, rtol=1e-4
    )
    assert short.fingerprint() != encoder.fingerprint()
    with pytest.raises(EncoderError, match="has 24 dimensions, not 25"):
        _ = SentenceTransformers(str(sentences), dimensions=25).embedding_size
    # A chat template writes the texts that the model reads.
    (sentences / "chat_template.jinja").write_text("{{ messages }}")
    assert SentenceTransformers(str(sentences)).fingerprint() != encoder.fingerprint()


def test_the_blocks_of_a_pipeline_are_trained(sentences):
    entry = {"class_path": "bindllm.encoders.SentenceTransformers", "init_args": {"name": str(sentences)}}
    encoder, plain = Tuned(entry, blocks=1), SentenceTransformers(str(sentences))
    assert torch.equal(embed(encoder, "text", TEXTS), embed(plain, "text", TEXTS))
    for parameter in encoder.parameters().values():
        parameter.requires_grad_(True)
    embed(encoder, "text", TEXTS)[:, 0].sum().backward()
    first, *rest = encoder.base.blocks("text")
    assert len(rest) == len(plain.blocks("text")) - 1 > 0
    assert all(
        parameter.grad.any() for name, parameter in encoder.parameters().items() if "key.bias" not in name
    )
    assert all(parameter.grad is None for parameter in first.parameters())
    entry["init_args"]["dtype"] = "bfloat16"
    with pytest.raises(InputError, match="set its dtype to float32"):
        Tuned(entry, blocks=1).parameters()


def test_prompts_are_those_of_the_library(sentences):
    own = library.SentenceTransformer(str(sentences))
    own[1].include_prompt = False
    own.prompts, own.default_prompt_name = {"query": "find: "}, "query"
    own.save(str(sentences))
    for prompt in (None, "see: ", ""):
        encoder = SentenceTransformers(str(sentences), prompt=prompt)
        expected = normalize(own.encode(TEXTS, prompt=prompt, convert_to_tensor=True), dim=-1)
        torch.testing.assert_close(embed(encoder, "text", TEXTS), expected, atol=1e-5, rtol=1e-4)
    plain = SentenceTransformers(str(sentences), prompt="")
    assert not torch.allclose(
        embed(plain, "text", TEXTS), embed(SentenceTransformers(str(sentences)), "text", TEXTS)
    )


def test_texts_that_are_cut_are_reported(sentences):
    encoder = SentenceTransformers(str(sentences))
    limit = encoder._model.max_seq_length
    with decoding_one(Budget(MediaLimits())) as warnings:
        encoder.prepare(Media.text("a dog"))
        assert not warnings
        encoder.prepare(Media.text("dog " * (limit + 9)))
    assert [f"reads the first {limit:,} " in words for words in warnings] == [True]


def test_all_files_of_a_pipeline_are_downloaded(sentences):
    (sentences / "chat_template.jinja").write_text("{{ messages }}")
    files = {file.relative_to(sentences).as_posix() for file in sentences.rglob("*") if file.is_file()}
    assert "2_Dense/model.safetensors" in files
    kept = filter_repo_objects([*files, "model.bin"], **_DOWNLOADED["encoder"])
    assert set(kept) == files - {"README.md"}


def test_images_and_texts_of_a_joint_model(tmp_path):
    clip(tmp_path / "clip")
    own = library.SentenceTransformer(modules=[library.base.modules.Transformer(str(tmp_path / "clip"))])
    own.save(str(tmp_path / "model"))
    encoder = SentenceTransformers(str(tmp_path / "model"))
    assert set(encoder.modalities) == {"text", "image"}
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    expected = normalize(own.encode([Image.fromarray(pixels)], convert_to_tensor=True), dim=-1)
    torch.testing.assert_close(embed(encoder, "image", [pixels]), expected, atol=1e-5, rtol=1e-4)
    check_encoder(encoder)


def test_folders_that_are_not_read(sentences):
    with pytest.raises(InputError, match="dimensions is 0"):
        SentenceTransformers(str(sentences), dimensions=0)
    with pytest.raises(EncoderError, match="does not serve audio, only text"):
        _ = SentenceTransformers(str(sentences), modalities=["audio"]).modalities
    modules = json.loads((sentences / "modules.json").read_text())
    (sentences / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(EncoderError, match=r"holds pytorch_model.bin: such files are not read"):
        SentenceTransformers(str(sentences)).fingerprint()
    (sentences / "pytorch_model.bin").unlink()
    (sentences / "modules.json").write_text(json.dumps([*modules, {"type": "evil.Module"}]))
    with pytest.raises(
        EncoderError, match=r"its modules .*evil.Module; expected classes of sentence_transformers"
    ):
        SentenceTransformers(str(sentences)).fingerprint()
