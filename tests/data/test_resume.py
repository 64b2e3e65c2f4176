"""A run that is stopped and resumed sees the batches that it would have seen."""

from contextlib import suppress

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from bindllm.data.datamodule import BindData
from bindllm.data.sources import SourceConfig
from bindllm.errors import InputError
from tiny import ColorEncoder, color_images, tiny_tokenizer

pytestmark = [
    # Lightning 2.6 asks torch 2.13 in a way that torch will drop.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Stop(Exception):
    pass


class Recorder(LightningModule):
    """Notes the embeddings of each training batch, which tell the rows apart."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, bytes]] = []
        self.stop_after = stop_after

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.stop_after:
            raise Stop
        self.seen.append((self.current_epoch, batch["embeddings"].numpy().tobytes()))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(len(self.seen)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    return color_images(folder, per_color=5)


def run(folder, out, *, callbacks=(), stop_after=None, resume=None, seed=0, weight=1.0, **options):
    """Train 3 epochs of 4 batches: 12 training images in batches of 3."""
    data = BindData(
        [SourceConfig(str(folder), weight=weight)],
        store=str(folder / "store"),
        batch_size=3,
        seed=seed,
        tokenizer=tiny_tokenizer(),
        encoders=[ColorEncoder()],
    )
    module = Recorder(stop_after)
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        default_root_dir=out,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with suppress(Stop):
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return module.seen


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    seen = run(folder, tmp_path_factory.mktemp("whole"))
    assert len(seen) == 12
    return seen


def test_each_epoch_has_every_row_in_another_order(whole):
    epochs = [[batch for epoch, batch in whole if epoch == number] for number in range(3)]
    rows = [
        sorted(batch[i : i + 64] for batch in epoch for i in range(0, len(batch), 64)) for epoch in epochs
    ]
    assert rows[0] == rows[1] == rows[2]
    assert len(set(rows[0])) == 12
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("validations", [{"val_check_interval": 2}, {"limit_val_batches": 0}])
@pytest.mark.parametrize("step", [1, 4, 6, 11])
def test_resume_after_any_step_continues_with_the_next_batch(folder, whole, tmp_path, step, validations):
    keep = ModelCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False
    )
    first = run(folder, tmp_path, callbacks=[keep], stop_after=step, **validations)
    rest = run(folder, tmp_path, resume=tmp_path / f"step={step}.ckpt", **validations)
    assert first + rest == whole


def test_resume_from_a_state_that_was_saved_inside_a_step(folder, whole, tmp_path):
    # The batch was fetched but not learned: it comes again.
    keep = OnExceptionCheckpoint(tmp_path, filename="state")
    first = run(folder, tmp_path, callbacks=[keep], stop_after=6)
    rest = run(folder, tmp_path, resume=tmp_path / "state.ckpt")
    assert len(first) == 6
    assert first + rest == whole


@pytest.mark.parametrize("changes", [{"seed": 1}, {"weight": 2.0}])
def test_resume_on_other_data_is_refused(folder, tmp_path, changes):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    run(folder, tmp_path, callbacks=[keep], stop_after=3)
    with pytest.raises(InputError, match="cannot resume from that checkpoint"):
        run(folder, tmp_path, resume=tmp_path / "step=2.ckpt", **changes)


@pytest.mark.parametrize("at_validation", [False, True])
def test_resume_at_the_end_of_an_epoch(folder, whole, tmp_path, at_validation):
    keep = ModelCheckpoint(
        tmp_path,
        filename="{step}",
        every_n_epochs=1,
        save_top_k=-1,
        save_on_train_epoch_end=not at_validation,
    )
    run(folder, tmp_path, callbacks=[keep])
    for epoch in (1, 2):
        rest = run(folder, tmp_path, resume=tmp_path / f"step={4 * epoch}.ckpt")
        assert rest == whole[4 * epoch :]
