"""`/v1/embeddings`: any modality, lists and base64, and refusals."""

import base64

import numpy as np
import pytest
import torch

from bindllm.media import Media
from serving_parts import FakeEngine, client_of, image_part, png
from tiny import ColorEncoder, tiny_model


class WordEncoder(ColorEncoder):
    """Serves texts too: by the numbers of their characters."""

    modalities = ("image", "text")

    def prepare(self, media: Media) -> torch.Tensor:
        if media.modality == "image":
            return super().prepare(media)
        codes = torch.tensor([ord(c) / 100 for c in media.source[:48]])
        return torch.nn.functional.pad(codes, (0, 48 - len(codes)))


@pytest.fixture(scope="module")
def model(decoder):
    return tiny_model(decoder, encoders=[WordEncoder()])


def embed(model, value, **fields):
    return client_of(model).post("/v1/embeddings", json={"model": "tiny", "input": value, **fields})


def test_texts_and_media_are_embedded_as_by_encode(model):
    red, blue = image_part(), image_part((20, 20, 220))
    answer = embed(model, ["a dog", red, [red, blue], [{"type": "text", "text": "a cat"}]]).json()
    assert [(row["object"], row["index"]) for row in answer["data"]] == [("embedding", n) for n in range(4)]
    images = [Media.image(png()), Media.image(png((20, 20, 220)))]
    expected = model.encode([[Media.text("a dog")], images[:1], images, [Media.text("a cat")]])
    found = torch.tensor([row["embedding"] for row in answer["data"]])
    assert torch.equal(found, expected)
    assert answer["usage"] == {"prompt_tokens": 0, "total_tokens": 0}


def test_base64_is_little_endian_float32(model):
    text = embed(model, "a dog", encoding_format="base64").json()["data"][0]["embedding"]
    row = np.frombuffer(base64.b64decode(text), dtype="<f4")
    assert np.array_equal(row, model.encode([Media.text("a dog")])[0].numpy())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([1, 2, 3], "token ids"),
        ([[1, 2], [3]], "token ids"),
        ([True], "token ids"),
        ("", "empty text"),
        ([], "0 inputs"),
        ([[]], "expected a text or a content part"),
        ([None], "expected a text or a content part"),
        (["a"] * 2049, "2049 inputs"),
        (
            [{"type": "input_audio", "input_audio": {"data": "AAAA"}}],
            "input[0] (input_audio): the model does not serve audio, only image, text",
        ),
        ([{"type": "image"}], "input[0] (image): it names the modality image and has no image"),
        ([{"text": "a", "image": "data:,a"}], "has image and text"),
        (["x" * 500_000, "y"], "500,001 characters"),
        ([["a"] * 1025] * 2, "more than 2,048 media"),
        ([{"type": "image", "image": "/etc/passwd"}], "expected a data: URI"),
        ([{"type": "image", "image": "data:image/png;base64,AAAA"}], "input[0] (image): not an image"),
        (["a", [{"type": "image_url", "image_url": {"url": "data:,x"}}]], "input[1][0] (image_url): not an"),
    ],
)
def test_an_input_that_cannot_be_embedded_is_refused(model, value, words):
    answer = embed(model, value)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_fields_that_cannot_be_used_are_refused(model):
    assert embed(model, "a", dimensions=16).status_code == 200
    for fields in ({"dimensions": 8}, {"encoding_format": "int8"}, {"cache": True}, {"normalize": False}):
        answer = embed(model, "a", **fields)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(fields)))


def test_texts_without_an_encoder_for_them_are_refused(decoder):
    answer = client_of(tiny_model(decoder), FakeEngine()).post("/v1/embeddings", json={"input": "a dog"})
    assert "the model does not serve text, only image" in answer.json()["error"]["message"]
