import numpy as np
import pytest
import torch

from bindllm.conversation import Conversation, Message
from bindllm.data.collate import collate, prompt_batch
from bindllm.data.tokenise import Sample
from bindllm.errors import InputError
from bindllm.media import Media

VECTORS = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.6, 0.8]}


def lookup(groups):
    return torch.tensor([VECTORS[group[0].source] for group in groups]).reshape(-1, 2)


def sample(ids, labels, index, pictures="", name="row") -> Sample:
    turns = tuple(Message("user", [Media.image(letter)]) for letter in pictures) or (Message("user", "Hi"),)
    arrays = (np.array(part, dtype=np.int64) for part in (ids, labels, index))
    return Sample(*arrays, conversation=Conversation(turns), name=name)


ROWS = [
    # Two pictures: tokens 5 6 hear a, 7 8 hear b; 6 and 8 are learnt.
    sample([5, 6, 7, 8], [-100, 6, -100, 8], [0, 0, 1, 1], "ab"),
    # Text only.
    sample([5, 9], [-100, 9], [-1, -1]),
    # One picture.
    sample([4, 5, 6], [-100, -100, 6], [0, 0, 0], "c"),
]


def as_lists(batch):
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_training_batch_is_padded_on_the_right():
    batch = collate(ROWS, lookup, pad_id=3)
    c = torch.tensor([0.6, 0.8]).tolist()
    assert as_lists(batch) == {
        "input_ids": [[5, 6, 7, 8], [5, 9, 3, 3], [4, 5, 6, 3]],
        "attention_mask": [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]],
        "labels": [[-100, 6, -100, 8], [-100, 9, -100, -100], [-100, -100, 6, -100]],
        "media_index": [[0, 0, 1, 1], [-1, -1, -1, -1], [0, 0, 0, -1]],
        "embeddings": [[[1, 0], [0, 1]], [[0, 0], [0, 0]], [c, [0, 0]]],
    }
    assert {tensor.dtype for name, tensor in batch.items() if name != "embeddings"} == {torch.int64}


def test_prompt_batch_ends_before_the_last_answer_and_is_padded_on_the_left():
    batch = prompt_batch(ROWS, lookup, pad_id=3)
    assert as_lists(batch) == {
        # The first answer of the first row is part of its prompt.
        "input_ids": [[5, 6, 7], [3, 3, 5], [3, 4, 5]],
        "attention_mask": [[1, 1, 1], [0, 0, 1], [0, 1, 1]],
        "media_index": [[0, 0, 1], [-1, -1, -1], [-1, 0, 0]],
        "embeddings": collate(ROWS, lookup, pad_id=3)["embeddings"].tolist(),
    }


def test_batch_without_any_media_has_one_empty_group():
    assert as_lists(collate([ROWS[1]], lookup, pad_id=3))["embeddings"] == [[[0, 0]]]


def test_rows_that_teach_nothing_are_refused_by_name():
    mute = sample([5, 6], [-100, -100], [0, 0], "a", name="table line 7")
    with pytest.raises(InputError, match="1 rows of a batch have no token to learn from: table line 7"):
        collate([ROWS[0], mute], lookup, pad_id=3)


@pytest.mark.parametrize("make", [collate, prompt_batch])
def test_empty_batch_is_refused(make):
    with pytest.raises(InputError, match="without rows"):
        make([], lookup, pad_id=3)
