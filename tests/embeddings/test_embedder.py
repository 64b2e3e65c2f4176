"""The embedder: batches by modality, results by media, and errors that name their files."""

import pytest
import torch

from bindllm import Media
from bindllm.embeddings import embedder as embedder_module
from bindllm.embeddings.embedder import Embedder, Work, embed_groups
from bindllm.encoders.tokens import flatten_tokens
from bindllm.errors import EncoderError, InputError, MediaError
from store_parts import CountingEncoder, expected, image_bytes, write_images
from tiny import TokenEncoder


class Letters(CountingEncoder):
    """Embeds texts."""

    modalities = ("text",)

    def prepare(self, media):
        return torch.tensor([float(ord(letter)) for letter in media.source[:48].ljust(48)]) / 64 - 1


class NotFinite(CountingEncoder):
    """Its second embedding of a batch is NaN."""

    def embed(self, modality, inputs):
        embeddings = super().embed(modality, inputs)
        embeddings[1, 0] = float("nan")
        return embeddings


def test_results_in_order_whatever_the_batches():
    images = [Media.image(image_bytes(n)) for n in range(5)]
    media = [images[0], Media.text("a"), *images[1:], Media.text("b")]
    encoder = CountingEncoder()
    with Embedder([encoder, Letters()], batch_size=2, threads=3) as embedder:
        results = embedder.embed_in_order(media)
        assert embedder.seconds_embedding > 0
    assert [result.key for result in results] == list(range(7))
    assert encoder.batches == [2, 2, 1]
    rows = torch.stack([results[n].embedding for n in (0, 2, 3, 4, 5)])
    torch.testing.assert_close(rows, expected(images))


class FailsAtFirst(CountingEncoder):
    """Its first media meets a fault of CPython in threads, or another error of the interpreter."""

    message = "AST constructor recursion depth mismatch (before=36, after=32)"

    def prepare(self, media):
        message, self.message = self.message, ""
        if message:
            raise SystemError(message)
        return super().prepare(media)


def test_a_fault_of_python_in_threads_costs_no_media():
    images = [Media.image(image_bytes(n)) for n in range(3)]
    with Embedder([FailsAtFirst()]) as embedder:
        rows = torch.stack([result.embedding for result in embedder.embed_in_order(images)])
    torch.testing.assert_close(rows, expected(images))
    encoder = FailsAtFirst()
    encoder.message = "another error"
    with Embedder([encoder]) as embedder, pytest.raises(SystemError, match="another error"):
        embedder.embed_in_order(images)


def test_batches_depend_on_sizes_only(monkeypatch):
    """So a stream that resumes makes the same batches, however fast its threads are."""

    class Sizes(CountingEncoder):
        def prepare(self, media):
            return torch.zeros(int(media.source.decode()), dtype=torch.uint8)

        def embed(self, modality, inputs):
            self.batches.append([len(item) for item in inputs])
            return torch.nn.functional.normalize(torch.ones(len(inputs), 16), dim=-1)

    monkeypatch.setattr(embedder_module, "PREPARED_BYTES", 200)
    found = []
    for threads in (1, 4):
        encoder = Sizes()
        with Embedder([encoder], threads=threads, batch_size=5) as embedder:
            sizes = [20] * 6 + [60, 10, 500, 30, 30, 30, 30]
            embedder.embed_in_order(Media.image(str(size).encode()) for size in sizes)
        found.append(encoder.batches)
    assert found[0] == found[1] == [[20] * 5, [20, 60], [10, 500], [30, 30, 30], [30]]


def test_unreadable_media_are_reported_and_others_embedded(tmp_path):
    good, missing = Media.image(image_bytes(1)), Media.image(tmp_path / "none.png")
    with Embedder([CountingEncoder()]) as embedder:
        first, second = embedder.embed_in_order([missing, good])
    assert first.embedding is None
    assert "none.png" in first.error
    torch.testing.assert_close(second.embedding[None], expected([good]))


def test_the_caller_chooses_which_errors_are_reported():
    text = Media.text("a dog")
    with Embedder([CountingEncoder()], reported=(InputError,)) as embedder:
        (result,) = embedder.embed_in_order([text])
    assert "no encoder serves the modality 'text'" in result.error
    with Embedder([CountingEncoder()]) as embedder, pytest.raises(InputError) as caught:
        embedder.embed_in_order([text])
    assert caught.value.__notes__ == ["while preparing 'a dog'"]


def test_embeddings_that_are_not_finite_are_reported_or_raised(tmp_path):
    media = write_images(tmp_path, 3)
    with Embedder([NotFinite()]) as embedder:
        results = embedder.embed_in_order(media)
    assert [bool(result.error) for result in results] == [False, True, False]
    assert results[1].error == f"{media[1].name}: its embedding is not finite"
    with pytest.raises(MediaError, match=r"001\.png: its embedding is not finite"):
        embed_groups([media], [NotFinite()], device="cpu")


@pytest.mark.parametrize(
    ("change", "given"),
    [
        (lambda rows: rows.numpy(), "ndarray"),
        (lambda rows: (rows, None), "tuple"),
        (lambda rows: None, "NoneType"),
        (lambda rows: rows[:1], "torch.float32 [1, 16]"),
        (lambda rows: rows[0], "torch.float32 [16]"),
        (lambda rows: torch.cat([rows, rows]), "torch.float32 [6, 16]"),
        (lambda rows: rows[:, :8], "torch.float32 [3, 8]"),
        (lambda rows: rows.round().long(), "torch.int64 [3, 16]"),
    ],
)
def test_embeddings_of_another_form_end_the_run_by_the_name_of_the_encoder(change, given):
    class Changed(CountingEncoder):
        def embed(self, modality, inputs):
            return change(super().embed(modality, inputs))

    images = [Media.image(image_bytes(n)) for n in range(3)]
    with Embedder([Changed()]) as embedder, pytest.raises(EncoderError) as caught:
        embedder.embed_in_order(images)
    assert (
        f"Changed breaks the contract of an encoder: embed() of 3 inputs must return float32 [3, 16], not {given}."
        in str(caught.value)
    )


def test_embeddings_of_another_precision_become_float32():
    class Double(CountingEncoder):
        def embed(self, modality, inputs):
            return super().embed(modality, inputs).double()

    images = [Media.image(image_bytes(n)) for n in range(3)]
    with Embedder([Double()]) as embedder:
        rows = torch.stack([result.embedding for result in embedder.embed_in_order(images)])
    torch.testing.assert_close(rows, expected(images))


def test_embeddings_without_unit_norm_are_reported_or_raised():
    class Long(CountingEncoder):
        def embed(self, modality, inputs):
            scales = torch.tensor([1.0, 7.0, 0.0])[: len(inputs), None]
            return super().embed(modality, inputs) * scales

    images = [Media.image(image_bytes(n)) for n in range(3)]
    with Embedder([Long()]) as embedder:
        errors = [result.error for result in embedder.embed_in_order(images)]
    assert errors[0] == ""
    assert "its embedding has norm 7 instead of 1" in errors[1]
    assert "its embedding has norm 0 instead of 1" in errors[2]
    with pytest.raises(MediaError, match="norm 7 instead of 1"):
        embed_groups([[image] for image in images], [Long()], device="cpu")


def test_prepared_media_are_tensors():
    class Prepared(CountingEncoder):
        def prepare(self, media):
            return {"pixels": super().prepare(media)}

    with Embedder([Prepared()]) as embedder, pytest.raises(EncoderError) as caught:
        embedder.embed_in_order([Media.image(image_bytes(0))])
    assert "Prepared breaks the contract of an encoder: prepare() must return a tensor, not dict" in str(
        caught.value
    )
    assert caught.value.__notes__ == ["while preparing <182 bytes>"]


def test_a_stop_iteration_of_an_encoder_names_the_media():
    class Stops(CountingEncoder):
        def prepare(self, media):
            return next(iter(()))

    with (
        Embedder([Stops()]) as embedder,
        pytest.raises(RuntimeError, match="StopIteration, while preparing <182 bytes>"),
    ):
        embedder.embed_in_order([Media.image(image_bytes(0))])


def test_names_of_the_caller_stand_in_errors():
    class Broken(CountingEncoder):
        def before_embed(self):
            raise RuntimeError("out of memory")

    works = [Work(n, Media.image(image_bytes(n)), f"shard 7 sample {n}") for n in range(2)]
    with Embedder([Broken()]) as embedder, pytest.raises(RuntimeError) as caught:
        list(embedder.embed(works))
    assert caught.value.__notes__ == ["while embedding shard 7 sample 0, shard 7 sample 1"]


class Picky(CountingEncoder):
    """Cannot embed batches with one of the images, or batches above some size."""

    def __init__(self, bad: Media | None = None, fitting: int = 100) -> None:
        super().__init__()
        self.bad, self.fitting = None if bad is None else super().prepare(bad), fitting

    def embed(self, modality, inputs):
        if len(inputs) > self.fitting or any(
            torch.equal(item, self.bad) for item in inputs if self.bad is not None
        ):
            raise RuntimeError("index out of range")
        return super().embed(modality, inputs)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("position", [1, 4])
def test_media_that_the_encoder_cannot_embed_are_named_and_the_others_embedded(
    tmp_path, batch_size, position
):
    media = write_images(tmp_path, 5)
    bad = media[position]
    with Embedder([Picky(bad)], batch_size=batch_size) as embedder:
        results = embedder.embed_in_order(media)
    problem = f"{bad.name}: the encoder cannot embed it (RuntimeError: index out of range)"
    assert [result.error for result in results] == [problem if item is bad else "" for item in media]
    good = [result.embedding for result in results if not result.error]
    torch.testing.assert_close(torch.stack(good), expected([item for item in media if item is not bad]))
    with pytest.raises(MediaError, match=f"00{position}.png: the encoder cannot embed it"):
        embed_groups([media], [Picky(bad)], device="cpu")


@pytest.mark.parametrize("batch_size", [1, 2])
def test_an_encoder_that_breaks_ends_the_run_and_bad_media_do_not(tmp_path, batch_size):
    class Breaking(CountingEncoder):
        error: Exception = RuntimeError("device lost")

        def before_embed(self):
            if len(self.batches) > 2:
                raise self.error

    media = write_images(tmp_path, 8)
    done = []
    with (
        Embedder([Breaking()], batch_size=batch_size) as embedder,
        pytest.raises(RuntimeError, match="lost") as caught,
    ):
        done.extend(embedder.embed(Work(n, item) for n, item in enumerate(media)))
    # Of batches of one, the first two failures could be those of single files.
    assert [bool(result.error) for result in done] == {1: [False] * 2 + [True] * 2, 2: [False] * 4}[
        batch_size
    ]
    assert caught.value.__notes__ == [
        f"while embedding {', '.join(item.name for item in media[4:][:batch_size])}"
    ]
    encoder = Breaking()
    encoder.error = MediaError("this image is black")
    with Embedder([encoder], batch_size=batch_size) as embedder:
        results = embedder.embed_in_order(media)
    assert [bool(result.error) for result in results] == [n >= 2 * batch_size for n in range(8)]


def test_a_batch_that_is_too_large_for_the_encoder_is_embedded_one_by_one(tmp_path):
    media = write_images(tmp_path, 3)
    encoder = Picky(fitting=1)
    torch.testing.assert_close(
        embed_groups([[item] for item in media], [encoder], device="cpu").embeddings, expected(media)
    )
    assert encoder.batches == [1, 1, 1]


def test_an_encoder_without_weights_is_tried_once(tmp_path):
    class Missing(CountingEncoder):
        def before_embed(self):
            raise EncoderError("no weights")

    encoder = Missing()
    with Embedder([encoder]) as embedder, pytest.raises(EncoderError, match="no weights") as caught:
        embedder.embed_in_order(media := write_images(tmp_path, 2))
    assert caught.value.__notes__ == [f"while embedding {media[0].name}, {media[1].name}"]
    assert encoder.batches == [2]


def test_tokens_of_groups_are_padded_with_zeros(tmp_path):
    first, second = write_images(tmp_path, 2)
    encoder, word = TokenEncoder(grid=2), Media.text("a")
    groups = [(first,), (first, second), (word,), (word, second)]
    found = embed_groups(groups, [encoder, Letters()], device="cpu", token_modalities=["image"])
    pooled = embed_groups(groups, [encoder, Letters()], device="cpu")
    assert pooled.tokens is None
    assert torch.equal(found.embeddings, pooled.embeddings)
    inputs = [encoder.prepare(item) for item in (first, second)]
    one, two = map(flatten_tokens, encoder.embed("image", inputs, tokens=True).tokens)
    assert found.tokens.shape == (4, 8, 8)
    for row, expected_tokens in zip(found.tokens, (one, torch.cat([one, two]), one[:0], two), strict=True):
        assert torch.equal(row[: len(expected_tokens)], expected_tokens)
        assert not row[len(expected_tokens) :].any()
    alone = embed_groups([(word,)], [encoder, Letters()], device="cpu", token_modalities=["image"])
    assert torch.equal(alone.tokens, torch.zeros(1, 1, 8))


def test_tokens_that_are_not_finite_are_reported(tmp_path):
    class Broken(TokenEncoder):
        def embed(self, modality, inputs, *, tokens=False):
            found = super().embed(modality, inputs, tokens=tokens)
            found.tokens[1][0, 0, 0] = float("inf")
            return found

    media = write_images(tmp_path, 3)
    with Embedder([Broken()], token_modalities=["image"]) as embedder:
        results = embedder.embed_in_order(media)
    assert [result.error for result in results] == ["", f"{media[1].name}: its tokens are not finite", ""]
    assert [result.tokens is None for result in results] == [False, True, False]


def test_an_encoder_without_tokens_is_refused_by_name(tmp_path):
    (image,) = write_images(tmp_path, 1)
    with pytest.raises(InputError, match="CountingEncoder has no tokens of image media"):
        embed_groups([(image,)], [CountingEncoder()], device="cpu", token_modalities=["image"])


def test_groups_are_fused_by_weight(tmp_path):
    first, second = write_images(tmp_path, 2)
    heavy = Media.image(second.source, weight=3)
    encoder = CountingEncoder()
    found = embed_groups([(first,), (first, heavy)], [encoder], device="cpu").embeddings
    rows = expected([first, second])
    mean = torch.nn.functional.normalize(rows[0] + 3 * rows[1], dim=0)
    torch.testing.assert_close(found, torch.stack([rows[0], mean]))
    assert encoder.batches == [3]
    with pytest.raises(InputError, match="is empty"):
        embed_groups([()], [encoder], device="cpu")
