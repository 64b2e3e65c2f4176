"""An alignment on two devices: each tells half of the pairs apart, and one of them writes the folder."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from align_parts import align_recipe, radar_table

pytestmark = pytest.mark.slow


def test_two_processes_share_the_pairs_and_leave_one_folder(tmp_path):
    source = {"path": str(radar_table(tmp_path / "radar")), "modality": "radar"}
    recipe = align_recipe(tmp_path, data={"sources": [source], "batch_size": 4})
    recipe["model"]["tower"] = {"class_path": "align_parts.BeatTower"}
    recipe["trainer"] |= {"log_every_n_steps": 1, "logger": {"class_path": "CSVLogger"}}
    recipe["trainer"]["logger"]["init_args"] = {"save_dir": "logs"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "bindllm.cli", "align", "--config", "recipe.yaml"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    # A machine without a network still has this one.
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(
        [*command, "--trainer.devices", "2", "--trainer.strategy", "ddp"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("train: 24 pairs") == 1
    assert done.stdout.count("aligned encoder:") == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["taught"]
    (log,) = Path(tmp_path / "logs").rglob("metrics.csv")
    with log.open(newline="") as stream:
        steps = [int(row["step"]) for row in csv.DictReader(stream) if row["train_loss"]]
    # 24 pairs, 4 on each of 2 devices, 3 epochs.
    assert steps == list(range(9))
    metrics = json.loads((tmp_path / "checkpoints/taught/metrics.json").read_text())
    assert metrics["epochs"] == 3
    assert metrics["test"]["radar_to_image"]["queries"] == 4
