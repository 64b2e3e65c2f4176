"""From rows of every format to samples: what is learned, and which image speaks to it."""

import json

import pytest

from bindllm.conversation import NO_MEDIA
from bindllm.data.datamodule import BindData
from bindllm.data.formats import FORMATS
from bindllm.data.rows import IGNORE
from bindllm.data.source_config import SourceConfig
from format_rows import TRUE_ROWS
from tiny import ColorEncoder, color_images, tiny_tokenizer


@pytest.fixture
def data(tmp_path):
    """Gives the data of sources, each of one format and one row, all trained on."""
    color_images(tmp_path / "pictures", per_color=2)
    picture, other = sorted((tmp_path / "pictures/images").iterdir())[:2]

    def data(rows: dict) -> BindData:
        sources = []
        for format, row in rows.items():
            text = json.dumps(row).replace("a.png", str(picture)).replace("b.png", str(other))
            (tmp_path / f"{format}.jsonl").write_text(text)
            sources.append(SourceConfig(str(tmp_path / f"{format}.jsonl"), format, split="train"))
        (tmp_path / "image").mkdir(exist_ok=True)
        (tmp_path / "image/7.jpg").write_bytes(picture.read_bytes())
        return BindData(
            sources,
            str(tmp_path / "store"),
            batch_size=16,
            tokenizer=tiny_tokenizer(),
            encoders=[ColorEncoder()],
            max_length=400,
        )

    return data


def learnt(sample, tokenizer) -> list[str]:
    """The stretches of text that give a loss."""
    ids, stretches = [], []
    for label in [*sample.labels.tolist(), IGNORE]:
        if label != IGNORE:
            ids.append(label)
        elif ids:
            stretches.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
            ids = []
    return stretches


def test_every_format_reaches_a_batch(data):
    read = data({**TRUE_ROWS, "caption": {"image": "a.png", "caption": "red"}})
    samples = dict(zip(FORMATS, read.samples("train"), strict=True))
    answers = {**{format: ["red"] for format in FORMATS}, "choice": ["The answer is (B)."]}
    assert {format: learnt(sample, read.tokenizer) for format, sample in samples.items()} == answers
    has_media = {format: bool((sample.media_index != NO_MEDIA).all()) for format, sample in samples.items()}
    assert [format for format, has in has_media.items() if has] == ["caption", "llava", "minigpt4", "vqa"]
    assert (samples["choice"].options, samples["vqa"].type) == (("blue", "red"), "color")
    assert learnt(samples["preference"].rejected, read.tokenizer) == ["blue"]
    assert read.report.skipped.total == 0


def test_each_turn_is_learned_with_its_own_image(data):
    turns = ["<image>\nOne?", "red", "Sure?", "yes", "<image>\nTwo?", "blue"]
    conversations = [{"from": ("human", "gpt")[n % 2], "value": words} for n, words in enumerate(turns)]
    read = data({"llava": {"image": ["a.png", "b.png"], "conversations": conversations}})
    (sample,) = read.samples("train")
    assert learnt(sample, read.tokenizer) == ["red", "yes", "blue"]
    supervised = sample.labels != IGNORE
    first, last = sample.media_index[supervised][0], sample.media_index[supervised][-1]
    assert (first, last, set(sample.media_index)) == (0, 1, {0, 1})
    assert [[media.name[-5:] for media in group] for group in sample.media] == [["0.png"], ["1.png"]]
    (batch,) = read.train_dataloader()
    assert batch["embeddings"].shape[:2] == (1, 2)
