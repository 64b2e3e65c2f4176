"""`bindllm zero_shot`: the whole way from a command line to a table and a JSON file, and its mistakes."""

import json
import re
from pathlib import Path

import pytest

import tiny_layouts as tiny
from bindllm.cache.visual_cache import VisualCache
from bindllm.cli import main
from bindllm.embeddings.precompute import precompute_embeddings
from bindllm.embeddings.store import EmbeddingStore
from bindllm.media import Media
from tiny_layouts import LAYOUTS

pytestmark = pytest.mark.usefixtures("work")

ENCODER = ["--encoder", "tiny_layouts.WordEncoder", "--device", "cpu"]


def shown(text: str) -> dict[str, float]:
    """The results in a printed table, by measure."""
    rows = re.findall(r"│ (\S.*?) +│ +([\d.]+) │ +[\d.]+ │", text)
    return {name: float(value) for name, value in rows}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_from_the_command_line(layout, capsys):
    LAYOUTS[layout](Path("set"))
    assert main(["zero_shot", layout, "set", *ENCODER, "--output", "out/result.json"]) == 0
    told = capsys.readouterr().out
    found = json.loads(Path("out/result.json").read_text())
    values = {one["name"]: one["value"] for one in found["measures"]}
    assert shown(told) == {name: pytest.approx(value, abs=1e-4) for name, value in values.items()}
    assert found["encoders"][0]["class"] == "tiny_layouts.WordEncoder"
    assert (found["layout"], found["folder"], found["format"]) == (layout, "set", 1)
    assert f"{found['num_measured']} of {found['num_listed']} {found['modality']} media measured" in told
    expected = {"retrieve": 0.75, "classify": 0.75, "tag": (1 / 2 + 11 / 12) / 2}[found["kind"]]
    assert next(iter(values.values())) == pytest.approx(expected, abs=1e-6)


def test_what_is_missing_is_printed(capsys):
    tiny.audiocaps(Path("set"))
    tiny.write(Path("set/audio/rain1.wav"), "broken")
    assert main(["zero_shot", "audiocaps", "set", *ENCODER]) == 0
    told = capsys.readouterr().out
    assert "1 of 3 audio media measured" in told
    assert "skipped: 1 x the file does not exist (vanishedxxx from 20 s)" in told
    assert "skipped: 1 x the file cannot be read (set/audio/rain1.wav: broken)" in told


def test_names_of_files_do_not_command_the_terminal(capsys):
    tiny.esc50(Path("set"))
    tiny.write(
        Path("set/meta/esc50.csv"), "filename,fold,target,category\n1-a.wav,1,0,dog\n\x1b[31m.wav,1,1,cat\n"
    )
    assert main(["zero_shot", "esc50", "set", *ENCODER]) == 0
    told = capsys.readouterr().out
    assert "1 x the file does not exist (?[31m.wav)" in told
    assert "\x1b" not in told


def test_the_second_run_encodes_nothing(capsys):
    tiny.esc50(Path("set"))
    line = ["zero_shot", "esc50", "set", *ENCODER, "--fold", "1", "--fold", "2", "--store", "kept"]
    assert main(line) == 0
    # Two of the four clips have the same content.
    assert "6 encoded now" in capsys.readouterr().out
    assert main(line) == 0
    assert "\n0 encoded now" in capsys.readouterr().out
    assert Path("kept").is_dir()


def test_an_option_may_name_the_home_folder_after_its_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tiny.esc50(Path("set"))
    assert main(["zero_shot", "esc50", "set", *ENCODER, "--store=~/kept", "--output=~/result.json"]) == 0
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"kept", "result.json"}
    assert not Path("~").exists()


def test_options_reach_the_measurement(capsys):
    tiny.esc50(Path("set"))
    tiny.write(Path("prompts.txt"), "the noise of {}\n{}\n")
    line = ["zero_shot", "esc50", "set", *ENCODER, "--output", "r.json", "--fold", "1", "--limit", "1"]
    assert main([*line, "--prompts", "prompts.txt"]) == 0
    found = json.loads(Path("r.json").read_text())
    assert found["templates"] == ["the noise of {}", "{}"]
    assert found["num_measured"] == 1
    assert main([*line, "--prompt", "hear {}"]) == 0
    assert json.loads(Path("r.json").read_text())["templates"] == ["hear {}"]
    Path("r.json").unlink()
    Path("r.json").mkdir()
    assert main(line) == 2
    assert "--output r.json is a folder; give a file in it" in capsys.readouterr().err
    assert main([*line, "--output", "prompts.txt/r.json"]) == 2
    assert "--output prompts.txt/r.json: its folder cannot be made" in capsys.readouterr().err


def test_columns_of_a_table():
    rows = [{"image": f"{name}.png", "sound": f"{name}.ogg", "split": "val"} for name in ("dog", "rain")]
    tiny.write(Path("set/captions.jsonl"), "\n".join(map(json.dumps, rows)))
    for row in rows:
        for file in row.values():
            tiny.write(Path("set", file), Path(file).stem)
    line = ["zero_shot", "table", "set", *ENCODER, "--split", "validation", "--output", "r.json"]
    assert main([*line, "--from", "audio:sound", "--to", "image"]) == 0
    found = json.loads(Path("r.json").read_text())
    assert {one["name"]: one["value"] for one in found["measures"]} == {
        "audio to image recall@1": 1,
        "image to audio recall@1": 1,
    }


def test_a_cache_from_its_folder(capsys):
    encoder = tiny.WordEncoder()
    store = EmbeddingStore.for_encoder("pictures", encoder)
    precompute_embeddings(store, encoder, [Media.image(tiny.write(Path("a.png"), "dog dog rain"))])
    VisualCache.build("cache", store)
    tiny.write(Path("set/dog/a.wav"), "dog dog dog dog rain rain rain rain rain")
    tiny.write(Path("set/rain/b.wav"), "rain")
    line = ["zero_shot", "folder", "set", *ENCODER]
    assert main(line) == 0
    assert shown(capsys.readouterr().out)["top-1 accuracy"] == 0.5
    assert main([*line, "--cache", "cache", "--cache_top_k", "1"]) == 0
    told = capsys.readouterr().out
    assert shown(told)["top-1 accuracy"] == 1
    assert re.search(r"cache: folder \S*cache.*, top_k 1, temperature \d+\.0, weight", told)
    assert main([*line, "--cache", "cache", "--cache_weight", "0"]) == 0
    assert shown(capsys.readouterr().out)["top-1 accuracy"] == 0.5


def test_encoders_of_a_checkpoint_and_further_ones(capsys):
    tiny.esc50(Path("set"))
    Path("folder").mkdir()
    entry = {"class_path": "tiny_layouts.WordEncoder", "init_args": {"modalities": "audio"}}
    entry["fingerprint"] = tiny.WordEncoder("audio").fingerprint()
    Path("folder/bindllm.json").write_text(json.dumps({"format": 1, "encoders": [entry]}))
    line = ["zero_shot", "esc50", "set", "--checkpoint", "folder", "--allow", "tiny_layouts.WordEncoder"]
    assert main(line) == 1
    assert "needs an encoder of text" in capsys.readouterr().err
    assert main([*line, *ENCODER, "--encoder.space", "other"]) == 0
    told = capsys.readouterr().out
    assert shown(told)["top-1 accuracy"] == 0.75
    assert "warning: WordEncoder (image, audio, video, point, depth, text; space 'other') was never" in told


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        (
            ["esc5", "set", *ENCODER],
            2,
            "unknown layout 'esc5'. Did you mean 'esc50'? Known: audiocaps, audioset",
        ),
        (["esc50", "set"], 2, "no encoder to evaluate: name one with --encoder"),
        (["esc50", "nowhere", *ENCODER], 1, "nowhere does not exist"),
        (
            ["esc50", "set", *ENCODER, "--split", "test"],
            1,
            "the layout esc50 takes no split; it takes folds, classes",
        ),
        (
            ["esc50", "set", *ENCODER, "--fold", "0"],
            2,
            "--fold: 0 does not conform to restriction v>0",
        ),
        (["esc50", "set", *ENCODER, "--prompt", "a sound"], 1, "'a sound' has no {} for the class name"),
        (["esc50", "set", *ENCODER, "--promt", "a {}"], 2, "Did you mean '--prompt'?"),
        (["esc50", "set", *ENCODER, "--cache_weight", "0.5"], 2, "--cache_weight needs a visual cache"),
        (["esc50", "set", *ENCODER, "--cache", "nowhere"], 1, "nowhere"),
        (
            ["table", "set", *ENCODER, "--from", "Audio:x"],
            2,
            "expected a modality and a column, such as audio:sound",
        ),
        (["esc50", "set", *ENCODER, *ENCODER, "--encoder.space", "x"], 2, "needs exactly one --encoder"),
        (["esc50", "set", "--encoder", "tiny_layouts.Nope"], 1, "tiny_layouts has no 'Nope'"),
    ],
)
def test_mistakes_are_explained(line, code, told, capsys):
    tiny.esc50(Path("set"))
    assert main(["zero_shot", *line]) == code
    assert told in capsys.readouterr().err


def test_help_lists_the_layouts(capsys):
    with pytest.raises(SystemExit):
        main(["zero_shot", "--help"])
    told = capsys.readouterr().out
    assert all(f"\n  {layout} " in told for layout in (*LAYOUTS, "folder", "table"))
