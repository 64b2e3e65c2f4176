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

from bindllm.conversation import Conversation, Message
from bindllm.data.rows import Sample
from bindllm.errors import InputError
from bindllm.media import Media
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import DecoderConfig
from bindllm.training.callbacks import (
    ParameterTable,
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
