import pytest
import torch

from bindllm.data.embeddings import MediaEmbeddings
from bindllm.embeddings.embedder import embed_groups
from bindllm.encoders.fusion import fuse
from bindllm.errors import InputError
from bindllm.media import Media
from bindllm.parallel import Processes, RunContext
from side_by_side import together
from tiny import ColorEncoder, TokenEncoder, color_images


class WordEncoder(ColorEncoder):
    """Serves text, in the same space as the images."""

    modalities = ("text",)

    def fingerprint(self) -> str:
        return "ab" * 32

    def prepare(self, media: Media) -> torch.Tensor:
        return torch.full((48,), float(len(media.source)))


@pytest.fixture
def pictures(tmp_path):
    color_images(tmp_path, per_color=1)
    return {name: Media.image(str(tmp_path / "images" / f"{name}0.png")) for name in ("red", "green", "blue")}


def embed(encoder, *media):
    return encoder.embed(media[0].modality, [encoder.prepare(item) for item in media])


def test_lookup_gives_what_the_encoder_of_each_modality_gives(tmp_path, pictures):
    word = Media.text("a word")
    embeddings = MediaEmbeddings([ColorEncoder(), WordEncoder()], tmp_path / "store")
    totals = embeddings.precompute([*pictures.values(), word, pictures["red"]])
    assert (totals.encoded, totals.reused, totals.failed) == (4, 0, {})
    found = embeddings.lookup([(pictures["blue"],), (word,), (pictures["red"],)])
    expected = torch.cat(
        [
            embed(ColorEncoder(), pictures["blue"]),
            embed(WordEncoder(), word),
            embed(ColorEncoder(), pictures["red"]),
        ]
    )
    torch.testing.assert_close(found, expected)


def test_group_of_several_is_fused_by_weight(tmp_path, pictures):
    group = (pictures["red"], Media.image(pictures["blue"].source, weight=3.0))
    embeddings = MediaEmbeddings([ColorEncoder()], tmp_path / "store")
    # The weight is no part of the content: both uses of the blue image are one embedding.
    assert embeddings.precompute([*group, pictures["blue"]]).encoded == 2
    expected = fuse(embed(ColorEncoder(), *group), torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(embeddings.lookup([group])[0], expected)
    single = embeddings.lookup([(pictures["blue"],)])
    torch.testing.assert_close(single, embed(ColorEncoder(), pictures["blue"]))


def test_no_groups_give_no_rows(tmp_path):
    assert MediaEmbeddings([ColorEncoder()], tmp_path / "store").lookup([]).shape == (0, 16)


def test_second_fill_reuses_the_store(tmp_path, pictures):
    MediaEmbeddings([ColorEncoder()], tmp_path / "store").precompute(pictures.values())
    totals = MediaEmbeddings([ColorEncoder()], tmp_path / "store").precompute(pictures.values())
    assert (totals.encoded, totals.reused) == (0, 3)


def test_media_that_cannot_be_read_are_named_with_the_reason(tmp_path, pictures):
    broken, copy = tmp_path / "broken.png", tmp_path / "copy.png"
    broken.write_bytes(b"no picture")
    copy.write_bytes(b"no picture")
    media = [Media.image(str(path)) for path in (broken, copy, tmp_path / "missing.png")]
    totals = MediaEmbeddings([ColorEncoder()], tmp_path / "store").precompute([*media, pictures["red"]])
    assert totals.encoded == 1
    assert set(totals.failed) == set(media)
    assert "broken.png: not an image" in totals.failed[media[0]]
    assert "copy.png" in totals.failed[media[1]]
    assert "missing.png: cannot be opened" in totals.failed[media[2]]


def test_several_processes_fill_the_stores_of_all_encoders(tmp_path, pictures):
    words = [Media.text(str(n)) for n in range(6)]
    media = [*pictures.values(), Media.image(str(tmp_path / "missing.png")), *words]

    def part(processes):
        embeddings = MediaEmbeddings([ColorEncoder(), WordEncoder()], tmp_path / "store")
        # The last one finds no texts in its sources: it fills the store of texts with nothing.
        totals = embeddings.precompute(media if processes.rank < 2 else media[:4], RunContext(processes))
        return embeddings, totals

    ends = together(3, part)
    nobodys = [word for word in words if Processes(2, 3).owns(word.content_hash())]
    assert 0 < len(nobodys) < 6
    assert [totals.encoded for _, totals in ends] == [3 + 6 - len(nobodys)] * 3
    embeddings, totals = ends[0]
    assert list(totals.failed) == [media[3], *nobodys]
    found = embeddings.lookup([(pictures["red"],)])
    torch.testing.assert_close(found, embed(ColorEncoder(), pictures["red"]))
    again = MediaEmbeddings([ColorEncoder(), WordEncoder()], tmp_path / "store")
    assert again.precompute(media).encoded == len(nobodys)


def test_media_that_were_not_filled_are_refused(tmp_path, pictures):
    embeddings = MediaEmbeddings([ColorEncoder()], tmp_path / "store")
    with pytest.raises(InputError, match=r"red0\.png was not embedded"):
        embeddings.lookup([(pictures["red"],)])


def test_modality_that_no_encoder_serves_is_refused(tmp_path):
    with pytest.raises(InputError, match="no encoder serves the modality 'audio'"):
        MediaEmbeddings([ColorEncoder()], tmp_path / "store").precompute([Media.audio("a.wav")])


def test_encoders_must_share_one_size(tmp_path):
    with pytest.raises(InputError, match="ColorEncoder 16, WordEncoder 8"):
        MediaEmbeddings([ColorEncoder(), WordEncoder(8)], tmp_path)
    with pytest.raises(InputError, match="no encoder;"):
        MediaEmbeddings([], tmp_path)


def test_an_encoder_that_fails_gives_the_accelerator_back(tmp_path, pictures):
    class Failing(ColorEncoder):
        def __init__(self, **config):
            super().__init__(**config)
            self.places = []

        def to(self, device):
            self.places.append(str(device))
            return self

        def embed(self, modality, inputs):
            raise RuntimeError("out of memory")

    encoder = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        MediaEmbeddings([encoder], tmp_path / "store").precompute(
            pictures.values(), RunContext(device="cuda:1")
        )
    assert encoder.places == ["cuda:1", "cpu"]


def test_tokens_from_the_store_are_those_of_a_request(tmp_path, pictures):
    word, encoders = Media.text("a word"), [TokenEncoder(), WordEncoder()]
    groups = [(pictures["red"],), (word,), (pictures["blue"], pictures["green"]), (word, pictures["red"])]
    embeddings = MediaEmbeddings(encoders, tmp_path / "store", token_modalities=["image"])
    assert embeddings.precompute([*pictures.values(), word]).encoded == 4
    expected = embed_groups(groups, encoders, device="cpu", token_modalities=["image"])
    assert torch.equal(embeddings.tokens(groups), expected.tokens)
    torch.testing.assert_close(embeddings(groups), expected.embeddings)
    assert torch.equal(embeddings.tokens([(word,)]), torch.zeros(1, 1, 8))
    assert embeddings.tokens([]).shape == (0, 1, 8)
    assert MediaEmbeddings(encoders, tmp_path / "store").tokens(groups) is None


def test_a_store_with_embeddings_only_gets_the_missing_tokens(tmp_path, pictures):
    media = list(pictures.values())
    MediaEmbeddings([TokenEncoder()], tmp_path / "store").precompute(media)
    embeddings = MediaEmbeddings([TokenEncoder()], tmp_path / "store", token_modalities=["image"])
    totals = embeddings.precompute(media)
    assert (totals.encoded, totals.reused) == (3, 0)
    assert embeddings.tokens([(item,) for item in media]).shape == (3, 16, 8)


def test_media_whose_tokens_cannot_be_computed_are_failures(tmp_path, pictures):
    media = list(pictures.values())
    MediaEmbeddings([TokenEncoder()], tmp_path / "store").precompute(media)

    class Broken(TokenEncoder):
        def embed(self, modality, inputs, *, tokens=False):
            found = super().embed(modality, inputs, tokens=tokens)
            found.tokens[0].fill_(float("nan"))
            return found

    embeddings = MediaEmbeddings([Broken()], tmp_path / "store", token_modalities=["image"])
    totals = embeddings.precompute(media)
    assert totals.encoded == 2
    assert "its tokens are not finite" in totals.failed[media[0]]


def test_an_encoder_without_tokens_is_refused(tmp_path):
    with pytest.raises(InputError, match="ColorEncoder has no tokens of image media"):
        MediaEmbeddings([ColorEncoder()], tmp_path, token_modalities=["image"])
