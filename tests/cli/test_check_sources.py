"""What `bindllm check` says of the sources of a recipe, whatever their format."""

import io
import json
import tarfile

import pytest

from bindllm.data.source_config import SourceConfig
from bindllm.training.preflight import Problems, check_sources, read_sources
from tiny import ColorEncoder, color_images, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return color_images(tmp_path_factory.mktemp("pictures"), per_color=2)


def check(*sources: SourceConfig, max_length: int = 200) -> tuple[str, list[str]]:
    """What is printed, and the problems."""
    problems, printed = Problems(), []
    read = read_sources(sources, problems)
    check_sources(read, [ColorEncoder()], tiny_tokenizer(), max_length, problems, printed.append)
    return "\n".join(printed), list(problems)


def write(folder, name: str, rows: list) -> str:
    path = folder / name
    path.write_text(
        json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    )
    return str(path)


def llava(image: str | None, *answers: str) -> dict:
    turns = [
        turn
        for answer in answers
        for turn in ({"from": "human", "value": "What?"}, {"from": "gpt", "value": answer})
    ]
    if image is None:
        return {"conversations": turns}
    turns[0]["value"] = "<image>\nWhat?"
    return {"image": image, "conversations": turns}


def test_conversations_are_counted_with_what_nobody_can_find(folder):
    rows = [
        llava("images/red0.png", "red", "no"),
        llava("images/red0.png", "red"),
        llava("images/gone.png", "grey"),
        llava("images/away.png", "grey"),
        llava(None, "yes"),
        llava("images/blue0.png", "blue", "x" * 300),
    ]
    path = write(folder, "talk.json", rows)
    told, problems = check(SourceConfig(path, format="llava", split="train"))
    assert problems == []
    assert f"{path}: 4 rows (llava), 6 answers, 2 images, 1 rows without media; 4 train" in told
    assert (
        "skipped: 2 x no such image file (talk.json row 3: images/gone.png, talk.json row 4: images/away.png)"
        in told
    )
    assert "of 4 rows 1 are truncated, 0 cannot be used" in told


def test_rows_that_cannot_be_learnt_from_say_why(folder):
    rows = [llava(None, "yes"), llava(None, "a <|im_end|>"), llava(None, "yes " * 4)]
    told, problems = check(
        SourceConfig(write(folder, "bad.json", rows), format="llava", split="train"), max_length=32
    )
    assert "1 x a message spells the control token '<|im_end|>'" in told
    assert "of 3 rows 1 are truncated, 1 cannot be used" in told
    told, problems = check(
        SourceConfig(write(folder, "bad.json", rows[1:2]), format="llava", split="train"), max_length=32
    )
    assert len(problems) == 1
    assert "none of 1 rows can be used: 1 x a message spells the control token" in problems[0]


def test_of_a_pair_the_longer_side_counts(folder):
    rows = [
        {"prompt": "Hi", "chosen": "a", "rejected": "b" * 50},
        {"prompt": "Hi", "chosen": "a", "rejected": "a"},
    ]
    path = write(folder, "pairs.jsonl", rows)
    told, problems = check(SourceConfig(path, format="preference", split="train"))
    assert "pairs of a better and a worse answer" in told
    assert "(longest 72), supervised: " in told
    assert problems == []


def test_media_of_every_modality_need_an_encoder_and_are_opened(folder):
    (folder / "hum.wav").write_bytes(b"RIFF")
    (folder / "damaged.png").write_bytes(b"\x89PNG")
    content = [{"type": "image_url", "image_url": {"url": "damaged.png"}}, {"type": "text", "text": "?"}]
    rows = [{"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}]
    told, problems = check(SourceConfig(write(folder, "m.jsonl", rows), format="messages", split="train"))
    assert "1 x image that cannot be opened (of 1 tried)" in told
    assert "not one image can be opened" in problems[0]
    content[0] = {"type": "input_audio", "input_audio": {"data": "hum.wav"}}
    _, problems = check(SourceConfig(write(folder, "m.jsonl", rows), format="messages", split="train"))
    assert "audio" in problems[0]


def test_of_a_stream_the_first_rows_are_looked_at(folder):
    with tarfile.open(folder / "0.tar", "w") as tar:
        for n in range(3):
            picture = (folder / f"images/red{n % 2}.png").read_bytes()
            for name, data in ((f"{n}.png", picture), (f"{n}.txt", b"red")):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    told, problems = check(SourceConfig(str(folder / "*.tar")))
    assert "1 shards, streamed; the first 3 rows were read" in told
    assert problems == []
    _, problems = check(SourceConfig(str(folder / "*.tar")), SourceConfig(str(folder)))
    assert len(problems) == 1


def test_a_hash_that_holds_out_no_row_is_a_problem(folder):
    rows = [{"image": "images/red0.png", "question": f"Number {n}?", "answer": "red"} for n in range(40)]
    path = write(folder, "one.jsonl", rows)
    told, problems = check(SourceConfig(path, format="vqa"))
    assert "40 train, 0 validation, 0 test" in told
    assert (
        f"{path}: held_out is 0.1, and the hash holds out none of 40 rows, which show 1 diff" in problems[0]
    )
    for changes in ({"held_out": 0.0}, {"split": "train"}, {"split_by": "row"}):
        assert check(SourceConfig(path, format="vqa", **changes))[1] == []


def test_every_source_that_cannot_be_read_is_a_problem(folder):
    broken = write(folder, "broken.json", [])
    _, problems = check(
        SourceConfig(broken, format="llava"), SourceConfig(str(folder / "nope.json"), format="vqa")
    )
    assert len(problems) == 2
