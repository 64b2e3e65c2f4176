from types import SimpleNamespace

import numpy as np
import pytest
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from bindllm.conversation import Conversation, Message
from bindllm.data.tokenise import Sample
from bindllm.errors import InputError
from bindllm.media import Media
from bindllm.training.callbacks import refuse_unmeasured, spread


def sample(number: int, *, shows: bool = True) -> Sample:
    parts = (Media.image(f"{number}.png"), "What?") if shows else ("What?",)
    index = np.zeros(3, dtype=np.int64) if shows else np.full(3, -1)
    conversation = Conversation((Message("user", parts), Message("assistant", "x")))
    ids = np.arange(3)
    return Sample(ids, ids, index, conversation, name=str(number))


def test_samples_are_spread_and_show_something():
    samples = [sample(n, shows=n % 2 == 0) for n in range(20)]
    assert [one.name for one in spread(samples, 3)] == ["0", "6", "12"]
    assert [one.name for one in spread(samples[:3], 9)] == ["0", "2"]
    assert spread([], 4) == []
    assert spread([SimpleNamespace(media=())], 4) == []


@pytest.mark.parametrize("callback", [EarlyStopping("val_loss"), ModelCheckpoint(monitor="val_loss")])
def test_a_callback_that_watches_what_is_not_measured_is_refused(callback):
    with pytest.raises(
        InputError, match=f"{type(callback).__name__} watches val_loss, but there are no valid"
    ):
        refuse_unmeasured([Callback(), callback], num_validation=0)
    refuse_unmeasured([callback], num_validation=1)
    refuse_unmeasured(
        [EarlyStopping("train_loss"), EarlyStopping("val_loss", strict=False)], num_validation=0
    )
