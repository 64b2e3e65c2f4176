import csv
import io
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from rich.console import Console

from bindllm.conversation import Conversation, Message
from bindllm.data.rows import Sample
from bindllm.errors import InputError
from bindllm.media import Media
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import DecoderConfig
from bindllm.training.callbacks import (
    ParameterTable,
    RunLog,
    RunProgress,
    SampleCaptions,
    check_trainer,
)
from tiny import ColorEncoder, save_tiny_decoder, tiny_decoder
from tiny_run import make_trainer


def sample(number: int, *, shows: bool = True) -> Sample:
    parts = (Media.image(f"{number}.png"), "What?") if shows else ("What?",)
    index = np.zeros(3, dtype=np.int64) if shows else np.full(3, -1)
    conversation = Conversation((Message("user", parts), Message("assistant", "x")))
    ids = np.arange(3)
    return Sample(ids, ids, index, conversation, name=str(number))


@pytest.mark.parametrize("callback", [EarlyStopping("val_loss"), ModelCheckpoint(monitor="val_loss")])
def test_a_callback_that_watches_what_is_not_measured_is_refused(callback):
    def check(*callbacks, num_validation=0):
        check_trainer(
            make_trainer(".", enable_checkpointing=True, callbacks=list(callbacks)),
            num_validation=num_validation,
        )

    with pytest.raises(
        InputError, match=f"{type(callback).__name__} monitors val_loss, but there are no valid"
    ):
        check(Callback(), callback)
    check(callback, num_validation=1)
    check(EarlyStopping("train_loss"), EarlyStopping("val_loss", strict=False))


@pytest.mark.parametrize("average", [EMAWeightAveraging(), StochasticWeightAveraging(swa_lrs=1e-2)])
def test_averages_of_lightning_are_refused_with_ours(average):
    with pytest.raises(InputError, match=f"{type(average).__name__}.*AverageWeights"):
        check_trainer(make_trainer(".", enable_checkpointing=True, callbacks=[average]), num_validation=1)


class Log:
    """Stands for the log of a run."""

    def __init__(self):
        self.captions = []

    def log_captions(self, captions, step):
        self.captions += [{"step": step, **caption} for caption in captions]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Return a function that captions samples as after step 7, and gives what was logged and looked up."""
    folder = save_tiny_decoder(tmp_path_factory.mktemp("decoder"))
    config = DecoderConfig(str(folder), dtype="float32")
    model = BindLLM.build(config, device="cpu", encoders=[ColorEncoder()]).eval()

    def caption(samples):
        shown, log = [], Log()

        def lookup(groups):
            shown.extend(group[0].name for group in groups)
            return torch.eye(16)[: len(groups)]

        trainer = SimpleNamespace(
            datamodule=SimpleNamespace(samples=lambda split: samples, lookup=lookup),
            fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=7)),
            sanity_checking=False,
            is_global_zero=True,
            loggers=[],
        )
        callback = SampleCaptions(log, count=3, max_new_tokens=2)
        callback.on_validation_epoch_end(trainer, SimpleNamespace(model=model))
        return log.captions, shown

    return caption


def tokens(sample: Sample, length: int) -> Sample:
    """Give a sample that many tokens of prompt, and one of answer."""
    ids = np.arange(3, 4 + length)
    labels = np.where(np.arange(len(ids)) < length, -100, ids)
    index = np.full(len(ids), int(sample.media_index[0]))
    return replace(sample, input_ids=ids, labels=labels, media_index=index, references=("x",))


def test_captions_are_of_a_few_evenly_spread_images_and_rows_without_are_skipped(captioned):
    samples = [tokens(sample(n, shows=n % 2 == 0), 3 + n) for n in range(12)]
    assert captioned(samples)[1] == ["0.png", "4.png", "8.png"]
    samples = [tokens(sample(n, shows=n in (1, 4)), 3 + n) for n in range(6)]
    captions, shown = captioned(samples)
    assert shown == ["1.png", "4.png"]
    assert [(row["step"], row["media"], row["reference"]) for row in captions] == [
        (7, "1.png", "x"),
        (7, "4.png", "x"),
    ]


def test_rows_whose_picture_speaks_to_none_of_their_tokens_are_not_captioned(captioned):
    """Media index -1 everywhere: the turn with the picture was left out, though the conversation has it."""
    unheard = tokens(sample(0), 3)
    unheard = replace(unheard, media_index=np.full_like(unheard.media_index, -1))
    assert unheard.conversation.media_groups
    assert captioned([unheard]) == ([], [])
    captions, shown = captioned([unheard, tokens(sample(1), 4)])
    assert shown == ["1.png"] == [row["media"] for row in captions]


@pytest.mark.parametrize("adapter", [None, AdapterConfig(rank=2)])
def test_the_table_counts_every_parameter_once(tmp_path, capsys, adapter):
    decoder = DecoderConfig(str(save_tiny_decoder(tmp_path / "d")), dtype="float32")
    model = BindLLM.build(decoder, device="cpu", encoders=[ColorEncoder()], adapter=adapter)
    model.set_trainable(list(model.parameter_groups()))
    trainer = SimpleNamespace(is_global_zero=True, datamodule=SimpleNamespace(report=""))
    ParameterTable().on_train_start(trainer, SimpleNamespace(model=model))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = {row[0]: row[1:] for row in rows if row}
    frozen = sum(value.numel() for value in tiny_decoder().parameters())
    assert counts["decoder"] == [f"{frozen:,}", "frozen"]
    assert ("adapter" in counts) == (adapter is not None)


def test_what_was_asked_is_kept_for_questions_and_each_reference_once(captioned):
    samples = [
        replace(tokens(sample(0), 3), task="answer", references=("yes", "yep", "yes")),
        replace(tokens(sample(1), 3), task="caption", references=("x",)),
    ]
    first, second = captioned(samples)[0]
    assert (first["question"], first["reference"]) == ("What?", "yes | yep")
    assert "question" not in second


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as stream:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(stream)]


def test_rows_are_on_disk_at_once_and_new_columns_keep_old_rows(tmp_path):
    log = RunLog(tmp_path)
    log.log_metrics({"train_loss": 2.5, "epoch": 0}, step=0)
    assert rows(tmp_path) == [{"epoch": "0", "step": "0", "train_loss": "2.5"}]
    log.log_metrics({"my_metric": 1.0}, step=1)
    assert rows(tmp_path) == [
        {"epoch": "0", "step": "0", "train_loss": "2.5"},
        {"step": "1", "my_metric": "1.0"},
    ]


def test_a_resumed_run_keeps_earlier_rows_and_drops_those_it_will_log_again(tmp_path):
    first = RunLog(tmp_path)
    for step in range(4):
        first.log_metrics({"train_loss": step, "extra": 7}, step=step)
        first.log_captions([{"model": f"at {step}"}], step)
    again = RunLog(tmp_path)
    again.keep_before(2)
    again.log_metrics({"train_loss": 20}, step=2)
    assert [row["train_loss"] for row in rows(tmp_path)] == ["0", "1", "20"]
    assert rows(tmp_path)[0]["extra"] == "7"
    captions = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert captions == [{"step": 0, "model": "at 0"}, {"step": 1, "model": "at 1"}]


def test_a_line_that_was_cut_by_a_kill_is_dropped(tmp_path):
    log = RunLog(tmp_path)
    log.log_metrics({"train_loss": 1.0}, step=0)
    log.log_captions([{"model": "red"}], 0)
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write("0,")
    with (tmp_path / "captions.jsonl").open("a") as stream:
        stream.write('{"step": 0, "gen')
    again = RunLog(tmp_path)
    again.keep_before(5)
    assert len(rows(tmp_path)) == 1
    assert (tmp_path / "captions.jsonl").read_text() == '{"step": 0, "model": "red"}\n'


def test_a_fresh_run_starts_with_the_header_alone(tmp_path):
    RunLog(tmp_path).keep_before(0)
    assert (tmp_path / "metrics.csv").read_text() == "epoch,step,train_loss,val_loss,lr,gradient_norm\n"


def test_a_caption_with_an_odd_line_break_is_one_line(tmp_path):
    log = RunLog(tmp_path)
    log.log_captions([{"model": "one\u2028two\x85three"}], 0)
    log.keep_before(1)
    (line,) = (tmp_path / "captions.jsonl").read_text(encoding="utf-8").strip("\n").split("\n")
    assert json.loads(line)["model"] == "one\u2028two\x85three"


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
