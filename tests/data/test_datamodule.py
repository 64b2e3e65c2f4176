import json

import pytest
import torch
from rich.console import Console

from bindllm.data.datamodule import BindData
from bindllm.data.sources import SourceConfig
from bindllm.errors import InputError
from bindllm.media import Media
from stream_parts import write_shards
from tiny import COLORS, ColorEncoder, TokenEncoder, color_images, tiny_tokenizer


def build(folder, *, sources=None, encoders=None, **options) -> BindData:
    return BindData(
        sources or [SourceConfig(str(folder))],
        **{"store": str(folder / "store"), **options},
        tokenizer=tiny_tokenizer(),
        encoders=[ColorEncoder()] if encoders is None else encoders,
    )


def add_rows(folder, *rows: dict) -> None:
    with (folder / "captions.jsonl").open("a") as table:
        table.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path):
    """16 images: 8 for training, 4 for validation, 4 for test."""
    return color_images(tmp_path, per_color=4)


def test_batches_hold_each_row_with_the_embedding_of_its_image(folder):
    data = build(folder, batch_size=3)
    data.setup("fit")
    seen = []
    for batch in data.train_dataloader():
        assert batch["input_ids"].shape == batch["labels"].shape == batch["media_index"].shape
        for labels, embedding in zip(batch["labels"], batch["embeddings"], strict=True):
            seen.append((data.tokenizer.decode(labels[labels >= 0]), embedding[0]))
    encoder = ColorEncoder()
    pictures = {
        f"{colour} square<|im_end|>": [
            encoder.embed("image", [encoder.prepare(Media.image(folder / "images" / f"{colour}{n}.png"))])[0]
            for n in (2, 3)
        ]
        for colour in COLORS
    }
    assert len(seen) == 8
    for caption, embedding in seen:
        assert any(torch.allclose(embedding, other) for other in pictures[caption])


def test_report_counts_everything(folder):
    (folder / "images" / "red2.png").write_bytes(b"")
    add_rows(
        folder,
        {"image": "images/none.png", "caption": "x"},
        {"image": "images/red1.png", "caption": "spells <|im_end|>", "split": "validation"},
        {"image": "images/green2.png", "caption": "long " * 50, "split": "train"},
        {"image": "images/blue2.png", "caption": "bell\x07", "split": "train"},
    )
    (folder / "images" / "copy.png").write_bytes((folder / "images" / "blue3.png").read_bytes())
    add_rows(folder, {"image": "images/copy.png", "caption": "copy", "split": "test"})
    data = build(folder)
    data.setup()
    report = data.report
    assert report.rows == {"train": 9, "validation": 4, "test": 5}
    # Of 17 files one is empty and one is a copy.
    assert report.embeddings == "15 encoded, 1 from the store"
    assert (report.truncated, report.text_only, report.shared_media) == (1, 0, 1)
    assert report.sources[0].remarks.counts == {"a caption with control characters, removed": 1}
    assert report.supervised_tokens == sum(sample.num_supervised for sample in data.samples("train"))
    assert list(report.skipped.counts.values()) == [1, 1, 1]
    lines = "\n".join(report.skipped.lines())
    assert "no such image file (captions.jsonl line 17: images/none.png)" in lines
    assert "media that cannot be embedded (captions.jsonl line 3: " in lines
    assert "red2.png: the file is empty" in lines
    assert "spells the control token '<|im_end|>'" in lines
    assert "(captions.jsonl line 18)" in lines


def test_report_can_be_printed(folder):
    data = build(folder)
    data.setup()
    console = Console(width=100)
    with console.capture() as capture:
        console.print(data.report)
    assert "8 train, 4 validation, 4 test" in capture.get()
    assert "16 encoded, 0 from the store" in capture.get()


def test_a_run_without_a_store_reports_no_counts_of_one(folder):
    data = build(folder, store=None)
    data.setup()
    assert data.report.embeddings == "encoded again for every batch"


def test_second_run_encodes_nothing_and_setup_twice_does_nothing_twice(folder):
    build(folder).setup()
    data = build(folder)
    data.prepare_data()
    data.setup("fit")
    samples = data.samples("train")
    data.prepare_data()
    data.setup("test")
    assert data.samples("train") is samples
    assert data.report.embeddings == "0 encoded, 16 from the store"
    assert len(data.report.sources) == 1


def test_samples_carry_name_references_and_source(folder):
    add_rows(folder, {"image": "images/red2.png", "caption": "scarlet", "split": "train"})
    data = build(folder, sources=[SourceConfig(str(folder)), SourceConfig(str(folder), split="test")])
    red = [sample for sample in data.samples("train") if sample.media[0][0].name.endswith("red2.png")]
    assert [sample.references for sample in red] == [("red square", "scarlet")] * 2
    assert [sample.name for sample in red] == ["captions.jsonl line 3", "captions.jsonl line 17"]
    assert {sample.source for sample in data.samples("test")} == {0, 1}


def test_weights_of_sources_reach_the_batches(folder, tmp_path):
    sources = [SourceConfig(str(folder), split="train", weight=w) for w in (1.0, 2.0)]
    data = build(folder, sources=sources, batch_size=4)
    assert len(data.train_dataloader()) == (16 + 32) // 4


def test_validation_batches_hold_all_rows_once(folder):
    data = build(folder, batch_size=1)
    batches = list(data.val_dataloader())
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2]
    assert len(list(data.test_dataloader())) == 2


def test_split_without_rows_gives_an_empty_loader(folder):
    data = build(folder, sources=[SourceConfig(str(folder), split="train")])
    assert list(data.val_dataloader()) == []
    assert len(data.val_dataloader()) == 0


def test_no_training_rows_is_an_error(folder):
    data = build(folder, sources=[SourceConfig(str(folder), split="test")])
    with pytest.raises(InputError, match=r"no training rows; there are .*'test': 16"):
        data.train_dataloader()


def test_no_row_that_fits_is_an_error_with_the_reason(folder):
    with pytest.raises(InputError, match="16 x the prompt leaves no room for an answer in max_length=20"):
        build(folder, max_length=20).setup()


def test_preview_shows_rows_and_embeds_nothing(folder):
    add_rows(folder, {"image": "images/red2.png", "caption": "a <|im_start|>", "split": "train"})
    data = build(folder, encoders=[])
    lines = [str(line) for line in data.preview(2)]
    assert lines[0] == "captions.jsonl line 3: 50 tokens, 11 to learn"
    assert lines[2] == "  media 0  learned 'red square<|im_end|>'"
    assert lines[4].startswith("captions.jsonl line 17: skipped (a message spells the control token")
    assert not (folder / "store").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_length": -1}, "max_length must be at least 1"),
        ({"chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_sizes_below_one_are_refused(folder, options, message):
    with pytest.raises(InputError, match=message):
        build(folder, **options)


def test_no_sources_and_unknown_splits_are_refused(folder):
    with pytest.raises(InputError, match=r"data\.sources is empty"):
        BindData([])
    with pytest.raises(InputError, match="Did you mean 'validation'"):
        build(folder).samples("valid")


def test_samples_know_their_place_in_their_split(folder):
    (folder / "images" / "red2.png").write_bytes(b"")
    data = build(folder)
    for split in ("train", "validation"):
        assert [sample.number for sample in data.samples(split)] == list(range(len(data.samples(split))))
    batch = next(iter(data.train_dataloader()))
    assert set(batch["numbers"].tolist()) <= set(range(7))


def test_streamed_rows_are_trained_on_and_held_out(folder):
    streams = [
        SourceConfig(str(write_shards(folder / "train", [6, 6]))),
        SourceConfig(str(write_shards(folder / "test", [3, 3], first=100)), split="test", limit=4),
        SourceConfig(str(folder), split="validation"),
    ]
    data = build(folder, sources=streams, batch_size=4, chunk=12)
    assert data.streamed
    assert data.samples("train") == []
    assert [sample.references for sample in data.samples("test")][:2] == [
        ("red square xx100",),
        ("green square xxx101",),
    ]
    assert data.report.rows == {"validation": 16, "test": 4}
    assert data.report.embeddings == "20 encoded, 0 from the store; those of the stream during training"
    console = Console(width=200)
    with console.capture() as capture:
        console.print(data.report)
    assert "2 shards, streamed" in capture.get()
    batches = iter(data.train_dataloader())
    assert [next(batches)["input_ids"].shape[0] for _ in range(3)] == [4, 4, 4]
    assert data.report.stream.rows == 12
    data.teardown("fit")
    held_out = next(iter(data.test_dataloader()))
    encoder = ColorEncoder()
    own = encoder.embed("image", [encoder.prepare(media[0]) for media in data.samples("test")[0].media])
    assert any(torch.allclose(row, own, atol=1e-6) for row in held_out["embeddings"])


def test_batches_hold_tokens_if_the_model_asks_for_them(folder):
    encoder = TokenEncoder()
    plain = build(folder, encoders=[encoder])
    data = build(folder, encoders=[encoder], token_modalities=["image"])
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        for batch, before in zip(getattr(data, loader)(), getattr(plain, loader)(), strict=True):
            assert batch["tokens"].shape == (len(batch["labels"]), 1, 16, 8)
            assert before.keys() == batch.keys() - {"tokens"}
            assert all(torch.equal(value, batch[name]) for name, value in before.items())


def test_streamed_batches_hold_tokens_too(folder, tmp_path):
    shards = SourceConfig(str(write_shards(tmp_path / "shards", [8])))
    data = build(folder, sources=[shards], encoders=[TokenEncoder()], token_modalities=["image"])
    batches = iter(data.train_dataloader())
    assert next(batches)["tokens"].shape == (8, 1, 16, 8)
    batches.close()
