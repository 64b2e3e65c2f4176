import json
import re
from pathlib import Path

import pytest

from tiny import tuned_encoder
from tiny_run import run, tiny_recipe

pytestmark = pytest.mark.usefixtures("work")


def test_parts_and_largest_batch_are_shown(parts, capsys):
    assert run("check", tiny_recipe(parts), "--memory", "--rows", "0") == 0
    told = capsys.readouterr().out
    for part in ("decoder", "activations", "optimizer", "framework", "total"):
        assert part in told
    # "red square<|im_end|>" and its prompt, one token a letter.
    assert "with 4 rows of " in told
    assert "longest of 20 rows" in told
    assert "fits into" in told


def test_a_tuned_encoder_is_in_the_table_with_its_activations(parts, capsys):
    recipe = tiny_recipe(parts, data={"store": None})
    recipe["model"] |= {"encoders": [tuned_encoder()], "trainable": ["encoders"]}
    assert run("check", recipe, "--memory", "--rows", "0") == 0
    told = capsys.readouterr().out
    assert re.search(r"\n *encoders +0\.0 MB", told)
    assert re.search(r"\n *activations of encoders +0\.0 MB", told)
    assert "while media are embedded" not in told


def test_a_run_that_does_not_fit_is_a_problem_with_a_way_out(parts, capsys):
    recipe = tiny_recipe(parts)
    assert run("check", recipe, "--memory_limit", "1MB", "--rows", "0") == 1
    told = capsys.readouterr().out
    assert "which has 1.0 MB" in told
    order = ["checkpoint_activations true", "data.batch_size 1 and 4 times", "bfloat16", "quantize nf4"]
    assert [told.index(words) for words in order] == sorted(told.index(words) for words in order)
    assert "1 problem" in told


@pytest.mark.parametrize(
    "devices", [2, "0,1", *(pytest.param(one, marks=pytest.mark.slow) for one in ("2", [0, 1]))]
)
def test_devices_and_strategy_are_read_off_the_trainer(devices, parts, capsys):
    recipe = tiny_recipe(
        parts, trainer={"accelerator": "cpu", "devices": devices, "strategy": "ddp", "max_epochs": 1}
    )
    run("check", recipe, "--memory", "--rows", "0")
    told = capsys.readouterr().out
    assert "memory of each of 2 devices" in told
    assert "buckets of DDP" in told


def test_media_of_the_largest_message_are_counted(parts, monkeypatch):
    plans = []
    monkeypatch.setattr(
        "bindllm.cli.recipes.check.memory_lines", lambda plan, _: plans.append(plan) or ([], "")
    )
    images = [f"{parts}/pictures/images/red{n}.png" for n in range(3)]
    rows = [{"image": images[: n + 1], "caption": "red", "split": "train"} for n in range(3)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tiny_recipe(parts, data={"sources": [{"path": "rows.jsonl"}], "batch_size": 2})
    run("check", recipe, "--memory", "--rows", "0")
    assert (plans[0].media_groups, plans[0].media) == (1, 3)


def test_memory_belongs_to_a_recipe(parts, capsys):
    from bindllm.cli import main

    assert main(["check", "--folder", str(parts), "--memory"]) == 2
    assert "--config FILE" in capsys.readouterr().err


def test_a_wrong_limit_is_told(parts, capsys):
    assert run("check", tiny_recipe(parts), "--memory_limit", "much", "--rows", "0") == 1
    assert "such as 24GB" in capsys.readouterr().out
