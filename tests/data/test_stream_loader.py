"""Streamed batches: what is in them, where they continue, what is skipped, and how their thread ends."""

import json
import os
import threading
import time
from itertools import islice

import pytest
import torch

from bindllm.data.source_config import Columns, SourceConfig
from bindllm.data.stream.chunks import BAD_SHARD, CANNOT_EMBED
from bindllm.data.stream.loader import StreamLoader, StreamOptions, check_streams
from bindllm.encoders.tokens import flatten_tokens
from bindllm.errors import EncoderError, InputError
from bindllm.media import Media
from bindllm.parallel import Processes, RunContext
from stream_parts import captioned, image_bytes, write_shard, write_shards
from tiny import COLORS, ColorEncoder, TokenEncoder, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def build(*sources, batch_size=4, chunk=16, seed=0, max_length=96, encoders=None, **options):
    return StreamLoader(
        [source if isinstance(source, SourceConfig) else SourceConfig(str(source)) for source in sources],
        tokenizer=TOKENIZER,
        encoders=encoders or [ColorEncoder()],
        options=StreamOptions(batch_size, max_length, seed, chunk),
        length=1000,
        **options,
    )


def texts(batch):
    return [TOKENIZER.decode(labels[labels >= 0]).removesuffix("<|im_end|>") for labels in batch["labels"]]


def number_of(text):
    return int("".join(letter for letter in text if letter.isdigit()))


def take(loader, count):
    batches = iter(loader)
    found = list(islice(batches, count))
    batches.close()
    return found


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(ours, theirs, strict=True)
    )


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith(("stream", "prepare"))]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """40 samples in 5 shards."""
    return write_shards(tmp_path_factory.mktemp("shards"), [8, 9, 7, 10, 6])


@pytest.fixture(scope="module")
def whole(shards):
    """30 batches: 2.5 passes of 3 chunks."""
    return take(build(shards), 30)


def test_two_sources_may_read_other_media_of_one_shard(tmp_path):
    images = {side: image_bytes(color, 0) for side, color in zip(("left", "right"), COLORS, strict=False)}
    row = {"caption": "one", **{side: f"{side}.png" for side in images}}
    members = [(f"a.{side}.png", content) for side, content in images.items()]
    shard = write_shard(tmp_path / "0.tar", [*members, ("a.json", json.dumps(row).encode())])
    sources = [SourceConfig(str(shard), columns=Columns(image=side)) for side in images]
    (batch,) = take(build(*sources, chunk=2), 1)
    encoder = ColorEncoder()
    own = encoder.embed("image", [encoder.prepare(Media.image(content)) for content in images.values()])
    # The rows are shuffled.
    rows = (batch["embeddings"][:, 0] @ own.T).argmax(1)
    assert sorted(rows.tolist()) == [0, 1]
    assert torch.allclose(batch["embeddings"][:, 0], own[rows], atol=1e-6)


def test_each_pass_has_every_row_once_with_the_embedding_of_its_image(whole):
    encoder, seen = ColorEncoder(), []
    for batch in whole[:10]:
        for text, embedding in zip(texts(batch), batch["embeddings"], strict=True):
            number = number_of(text)
            content = image_bytes(list(COLORS)[number % len(COLORS)], number)
            own = encoder.embed("image", [encoder.prepare(Media.image(content))])
            assert torch.allclose(embedding, own, atol=1e-6)
            seen.append(number)
    assert sorted(seen) == list(range(40))
    assert {len(batch["input_ids"]) for batch in whole} == {4}
    assert (whole[0]["numbers"] == -1).all()


def test_rows_of_a_batch_have_like_lengths(whole):
    padding = sum((batch["attention_mask"] == 0).sum() for batch in whole[:10])
    lengths = [int(row.sum()) for batch in whole[:10] for row in batch["attention_mask"]]
    shuffled = sum(4 * max(lengths[n::10]) - sum(lengths[n::10]) for n in range(10))
    assert padding < 0.6 * shuffled


@pytest.mark.parametrize("done", [1, 3, 4, 9, 10, 11, 17])
def test_a_loader_continues_after_any_batch(shards, whole, done):
    first = build(shards)
    assert equal(take(first, done), whole[:done])
    rest = build(shards)
    rest.load_state_dict(first.state_dict())
    assert equal(take(rest, 6), whole[done : done + 6])
    # Interrupted once more, and in a loader that was used before.
    again = build(shards)
    take(again, 2)
    again.load_state_dict(rest.state_dict())
    assert equal(take(again, 3), whole[done + 6 : done + 9])


def test_a_step_that_was_cut_off_gets_its_batch_again(shards, whole):
    first = build(shards)
    take(first, 5)
    rest = build(shards, position=lambda: 4)
    rest.load_state_dict(first.state_dict())
    assert equal(take(rest, 2), whole[4:6])
    lost = build(shards, position=lambda: 2)
    lost.load_state_dict(first.state_dict())
    with pytest.raises(InputError, match="cannot resume after batch 2: its saved state is of batch 5"):
        take(lost, 1)


def test_what_is_saved_does_not_depend_on_how_far_the_thread_is(shards):
    states = []
    for pause in (0.0, 0.3):
        loader = build(shards)
        batches = iter(loader)
        for _ in range(3):
            next(batches)
        time.sleep(pause)
        states.append(loader.state_dict())
        batches.close()
    assert states[0] == states[1]
    assert max(map(int, states[0]["states"][0])) == 3


def test_a_state_of_other_data_or_other_processes_is_refused(shards, tmp_path):
    loader = build(shards)
    take(loader, 1)
    state = loader.state_dict()
    for other in (
        build(shards, seed=1),
        build(shards, chunk=8),
        build(shards, batch_size=5),
        build(SourceConfig(str(shards), prompt="What is this?")),
        build(write_shards(tmp_path, [8, 9, 7, 10, 6])),
    ):
        with pytest.raises(InputError, match="shards or their sizes, formats, weights, chunk"):
            other.load_state_dict(state)
    two = build(shards, context=RunContext(Processes(0, 2, gather=lambda value: [value, value])))
    with pytest.raises(InputError, match="saved by 1 processes and cannot resume in 2"):
        two.load_state_dict(state)


def other_caption(shard):
    """Write another caption into a shard of the same size."""
    content = shard.read_bytes()
    start = content.index(b'"caption": "') + len(b'"caption": "')
    shard.write_bytes(content[:start] + b"X" + content[start + 1 :])


@pytest.mark.parametrize(
    "change",
    [lambda folder: write_shards(folder, [9, 4]), lambda folder: other_caption(next(folder.glob("*.tar")))],
)
def test_a_shard_that_grew_or_has_another_text_is_another_shard(tmp_path, change):
    shards = write_shards(tmp_path, [4, 4])
    loader = build(shards)
    take(loader, 1)
    change(tmp_path)
    with pytest.raises(InputError, match="cannot resume from that checkpoint"):
        build(shards).load_state_dict(loader.state_dict())


def test_two_processes_read_disjoint_samples_and_continue_from_one_state(shards):
    states, found = [{}, {}], []
    loaders = [
        build(shards, context=RunContext(Processes(rank, 2, gather=lambda _: states))) for rank in (0, 1)
    ]
    for rank, loader in enumerate(loaders):
        found.append(take(loader, 3))
        states[rank] = {str(done): state.as_dict() for done, state in loader._states.items()}
    first, second = ({number_of(text) for batch in part for text in texts(batch)} for part in found)
    assert not first & second
    saved = loaders[0].state_dict()
    for rank, loader in enumerate(loaders):
        on = build(shards, context=RunContext(Processes(rank, 2, gather=lambda _: states)))
        on.load_state_dict(saved)
        assert equal(take(on, 4), take(loader, 4))


def test_streams_are_mixed_by_weight(shards, tmp_path):
    other = write_shards(tmp_path, [8, 8], first=1000)
    loader = build(SourceConfig(str(shards), weight=3), SourceConfig(str(other)), chunk=16)
    numbers = [number_of(text) for batch in take(loader, 8) for text in texts(batch)]
    assert sum(number >= 1000 for number in numbers) == 8


def test_what_cannot_be_used_is_counted_with_its_name(tmp_path):
    members = [member for n in range(200, 204) for member in captioned(n)]
    members[0] = ("00200.png", b"")
    members[5] = ("00201.json", b"{")
    members += [
        ("00203.wav", b"unused"),
        ("held.png", image_bytes("red", 2)),
        ("held.json", b'{"caption": "held out", "split": "test"}'),
    ]
    write_shard(tmp_path / "a.tar", members)
    (tmp_path / "b.tar").write_bytes(b"no shard" * 100)
    loader = build(str(tmp_path / "{a,b}.tar"), chunk=6)
    batches = take(loader, 3)
    assert [sorted(map(number_of, texts(batch))) for batch in batches] == [[202, 203]] * 3
    report = loader.report
    assert (report.read, report.rows, report.batches) == (15, 6, 3)
    lines = "\n".join(report.skipped.lines())
    for reason in (
        f"3 x {CANNOT_EMBED}",
        "3 x the member .json is not valid JSON",
        "3 x a row of the split test",
    ):
        assert reason in lines
    shard = tmp_path / "a.tar"
    assert f"({shard} sample 1 (00200): <0 bytes>: the file is empty" in lines
    assert f"({shard} sample 2 (00201)" in lines
    assert BAD_SHARD in lines
    notes = [line for line in report.lines() if line.startswith("  note:")]
    assert [line.split(" (")[0] for line in notes] == [
        "  note: 3 x media next to the row that it does not use"
    ]


def test_every_sample_that_was_read_is_accounted_for_after_a_resume_too(shards):
    first, rest = build(shards), build(shards)
    take(first, 2)
    counted = first.report
    assert (counted.read, counted.rows, counted.waiting) == (16, 8, 8)
    assert "8 rows of 16 streamed samples in 2 batches (8 more were ready); " in next(counted.lines())
    rest.load_state_dict(first.state_dict())
    take(rest, 3)
    counted = rest.report
    assert (counted.read, counted.rows, counted.waiting) == (24, 12, 12)


def test_reasons_are_no_more_than_can_be_kept(tmp_path):
    members = [(f"{n}.json", b'{"caption": "x", "split": "%d"}' % n) for n in range(120)]
    write_shard(tmp_path / "a.tar", [*members, *captioned(3)])
    loader = build(str(tmp_path / "a.tar"), chunk=200)
    take(loader, 2)
    assert len(loader.report.skipped.counts) <= 52
    assert loader.report.skipped.total == 240


@pytest.mark.parametrize("members", [captioned(0)[:1], [*captioned(0)[1:], *captioned(1)[1:]]])
def test_a_pass_without_a_row_that_can_be_used_is_an_error(tmp_path, members):
    write_shard(tmp_path / "a.tar", members)
    with pytest.raises(InputError, match="none of the last .* samples of the stream can be used: "):
        take(build(str(tmp_path / "a.tar")), 1)
    assert not threads()


def test_rows_without_media_and_with_several(tmp_path):
    texts_ = [{"type": "text", "text": "Same?"}, {"type": "image_url", "image_url": {"url": "b.png"}}]
    first = {"type": "image_url", "image_url": {"url": "a.png"}}
    rows = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        [{"role": "user", "content": [first, *texts_]}, {"role": "assistant", "content": "No"}],
    ]
    pictures = [image_bytes("red", 1), image_bytes("blue", 2)]
    members = [("0.json", json.dumps({"messages": rows[0]}).encode())]
    members += [("1.a.png", pictures[0]), ("1.b.png", pictures[1])]
    members += [("1.json", json.dumps({"messages": rows[1]}).encode())]
    write_shard(tmp_path / "a.tar", members)
    (batch,) = take(build(SourceConfig(str(tmp_path / "a.tar"), format="messages")), 1)
    by_text = dict(zip(texts(batch), batch["embeddings"], strict=True))
    encoder = ColorEncoder()
    both = encoder.embed("image", [encoder.prepare(Media.image(content)) for content in pictures])
    assert torch.equal(by_text["Hello"], torch.zeros(1, 16))
    assert torch.allclose(by_text["No"][0], torch.nn.functional.normalize(both.mean(0), dim=0), atol=1e-6)


def test_an_error_in_the_thread_is_raised_where_batches_are_taken(shards):
    class Broken(ColorEncoder):
        def embed(self, modality, inputs):
            raise EncoderError("the weights are gone")

    with pytest.raises(EncoderError, match="the weights are gone"):
        take(build(shards, encoders=[Broken()]), 1)
    assert not threads()


@pytest.mark.parametrize("end", ["close the loader", "close the batches", "forget the batches"])
def test_no_thread_outlives_the_run(shards, end):
    loader = build(shards)
    batches = iter(loader)
    next(batches)
    assert threads()
    if end == "close the loader":
        loader.close()
    elif end == "close the batches":
        batches.close()
    else:
        del batches
    assert not threads()


def test_the_thread_is_no_further_ahead_than_two_chunks(shards):
    encoded = []

    class Counting(ColorEncoder):
        def embed(self, modality, inputs):
            encoded.append(len(inputs))
            return super().embed(modality, inputs)

    batches = iter(build(shards, encoders=[Counting()], chunk=4))
    next(batches)
    time.sleep(0.5)
    # One in use, one that waits, one that is made.
    assert sum(encoded) == 12
    batches.close()


def test_waiting_is_measured(shards):
    class Slow(ColorEncoder):
        def embed(self, modality, inputs):
            time.sleep(0.05)
            return super().embed(modality, inputs)

    slow, fast = build(shards, encoders=[Slow()], chunk=4), build(shards, chunk=4)
    take(slow, 8)
    for _ in islice(iter(fast), 8):
        time.sleep(0.05)
    assert slow.report.waiting_share > 0.8
    assert fast.report.waiting_share < 0.2
    assert "training waited" in next(slow.report.lines())


def source(path, **options):
    return SourceConfig(path, **options)


def test_what_cannot_be_streamed_together_is_refused(shards, tmp_path):
    stream, own = str(shards), str(write_shards(tmp_path, [3]))
    (tmp_path / "link.tar").symlink_to(tmp_path / "000.tar")
    check_streams([source(stream), source(stream.replace("{000..004}", "{000..004}"))])
    check_streams([source(stream), source(own, split="test", limit=3), source("a.jsonl", split="validation")])
    for sources, message in (
        ([source(stream, limit=5)], "has no limit"),
        ([source(stream), source(own, split="test")], "give this source a limit"),
        ([source(stream), source("a.jsonl")], "a run trains only on streams or on none"),
        (
            [source(stream), source(stream, split="validation", limit=3)],
            "is held out by .* and trained on by",
        ),
        (
            [source(stream), source(os.path.relpath(stream), split="validation", limit=3)],
            "is held out by .* and trained on by",
        ),
        (
            [source(own), source(str(tmp_path / "link.tar"), split="validation", limit=3)],
            "is held out by .* and trained on by",
        ),
        ([source(str(tmp_path / "none.tar"))], "names no shard that exists"),
    ):
        with pytest.raises(InputError, match=message):
            check_streams(sources)


def test_streamed_batches_hold_the_tokens_of_their_images(shards, whole):
    encoder = TokenEncoder()
    found = take(build(shards, encoders=[encoder], token_modalities=["image"]), 12)
    for batch, before in zip(found, whole, strict=False):
        assert all(torch.equal(value, batch[name]) for name, value in before.items() if name != "embeddings")
        for text, tokens in zip(texts(batch), batch["tokens"], strict=True):
            number = number_of(text)
            content = image_bytes(list(COLORS)[number % len(COLORS)], number)
            own = encoder.embed("image", [encoder.prepare(Media.image(content))], tokens=True).tokens
            torch.testing.assert_close(tokens[0], flatten_tokens(own[0]), atol=1e-3, rtol=0)
    # A resumed loader makes the same ones.
    first = build(shards, encoders=[encoder], token_modalities=["image"])
    take(first, 5)
    rest = build(shards, encoders=[encoder], token_modalities=["image"])
    rest.load_state_dict(first.state_dict())
    assert equal(take(rest, 6), found[5:11])


def test_a_stream_of_an_encoder_without_tokens_is_refused(shards):
    with pytest.raises(InputError, match="ColorEncoder has no tokens of image media"):
        take(build(shards, token_modalities=["image"]), 1)
