from types import SimpleNamespace

import numpy as np

from bindllm.conversation import Conversation, Message
from bindllm.data.tokenise import Sample
from bindllm.media import Media
from bindllm.training.callbacks import spread


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
