import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from bindllm.training.callbacks import RunProgress


@pytest.fixture
def trainer():
    return SimpleNamespace(
        global_step=0,
        current_epoch=0,
        estimated_stepping_batches=10,
        callback_metrics={"train_loss": torch.tensor(4.0), "val_loss": torch.tensor(1.25)},
    )


def shown(progress, trainer, *, terminal):
    out = io.StringIO()
    progress.console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    progress.on_train_start(trainer, None)
    for step in range(1, 11):
        trainer.global_step = step
        progress.on_train_batch_end(trainer, None, {"loss": torch.tensor(99.0)}, None, step - 1)
    progress.on_validation_start(trainer, None)
    progress.on_validation_end(trainer, None)
    progress.on_train_end(trainer, None)
    return out.getvalue()


def test_a_log_file_gets_few_lines(trainer):
    captions = SimpleNamespace(latest=[{"reference": "red square", "model": "blue\x1b[31m\n"}])
    lines = shown(RunProgress(captions), trainer, terminal=False).splitlines()
    assert lines == [
        "epoch 1  step 10  train loss 4.000  validation loss 1.250",
        "  red square  →  blue?[31m?",
    ]


def test_a_log_file_gets_lines_with_the_time_left_when_a_run_takes_long(trainer):
    lines = shown(RunProgress(every_seconds=0), trainer, terminal=False).splitlines()
    assert lines[4] == "step 5/10  epoch 1  loss 4.000  0:00 left"
    assert len(lines) == 11


def test_a_terminal_gets_a_bar_of_the_whole_run_that_resumes_with_it(trainer):
    trainer.global_step = 4
    text = shown(RunProgress(), trainer, terminal=True)
    assert " 4/10" in text
    assert "10/10" in text
    assert "validation loss 1.250" in text
