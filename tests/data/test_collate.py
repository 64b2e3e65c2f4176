from dataclasses import replace

import numpy as np
import pytest
import torch

from bindllm.conversation import Conversation, Message
from bindllm.data.collate import TokenLookup, answer_batch, collate, model_inputs, prompt_batch, tokens_of
from bindllm.data.rows import Sample
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
    # Two images: tokens 5 6 hear a, 7 8 hear b; 6 and 8 are learned.
    sample([5, 6, 7, 8], [-100, 6, -100, 8], [0, 0, 1, 1], "ab"),
    # Text only.
    sample([5, 9], [-100, 9], [-1, -1]),
    # One image.
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
        "numbers": [-1, -1, -1],
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


def test_rejected_answers_lie_below_the_rows_and_share_their_media():
    pair = replace(ROWS[2], rejected=sample([4, 7, 7, 7], [-100, 7, 7, 7], [0] * 4, "c"), number=5)
    text = replace(ROWS[1], rejected=sample([5, 8], [-100, 8], [-1, -1]), number=2)
    asked = []

    def counting(groups):
        asked.append(len(groups))
        return lookup(groups)

    batch = collate([text, pair], counting, pad_id=3)
    c = torch.tensor([0.6, 0.8]).tolist()
    assert as_lists(batch) == {
        "input_ids": [[5, 9, 3, 3], [4, 5, 6, 3], [5, 8, 3, 3], [4, 7, 7, 7]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]],
        "labels": [[-100, 9, -100, -100], [-100, -100, 6, -100], [-100, 8, -100, -100], [-100, 7, 7, 7]],
        "media_index": [[-1] * 4, [0, 0, 0, -1], [-1] * 4, [0] * 4],
        "embeddings": [[[0, 0]], [c], [[0, 0]], [c]],
        "numbers": [2, 5],
        "desirable": [True, True],
    }
    assert asked == [1], "the embedding of a pair is looked up once"
    assert pair.length == 4 > len(pair.input_ids)


def test_of_mixed_rows_only_the_pairs_have_a_second_answer():
    wanted, unwanted = replace(ROWS[0], desirable=True), replace(ROWS[1], desirable=False)
    pair = replace(ROWS[2], rejected=sample([4, 7], [-100, 7], [0, 0], "c"))
    batch = collate([wanted, pair, unwanted], lookup, pad_id=3)
    assert batch["desirable"].tolist() == [True, True, False]
    assert batch["labels"][3].tolist() == [-100, 7, -100, -100]
    torch.testing.assert_close(batch["embeddings"][3], batch["embeddings"][1])
    assert "desirable" not in collate([pair, ROWS[0]], lookup, pad_id=3), "one row does not say"


def test_the_rows_alone_are_what_the_model_takes():
    pair = replace(ROWS[2], rejected=sample([4, 7, 7, 7], [-100, 7, 7, 7], [0] * 4, "c"))
    alone = answer_batch([pair], lookup, pad_id=3)
    assert as_lists(alone) == as_lists(answer_batch([ROWS[2]], lookup, pad_id=3))
    assert model_inputs(collate([pair], lookup, pad_id=3)).keys() == alone.keys()


class WithTokens:
    """Two tokens of each image, one of c."""

    def __init__(self):
        self.asked = 0

    def __call__(self, groups):
        return lookup(groups)

    def tokens(self, groups):
        self.asked += 1
        found = torch.zeros(len(groups), 2, 3)
        for row, group in zip(found, groups, strict=True):
            row[: 1 if group[0].source == "c" else 2] = ord(group[0].source)
        return found


def test_tokens_lie_next_to_the_embeddings():
    source = WithTokens()
    assert isinstance(source, TokenLookup)
    assert tokens_of(lookup, []) is None
    pair = replace(ROWS[2], rejected=sample([4, 7, 7, 7], [-100, 7, 7, 7], [0] * 4, "c"))
    batch = collate([ROWS[0], ROWS[1], pair], source, pad_id=3)
    assert source.asked == 1
    assert batch["tokens"].shape == (4, 2, 2, 3)
    assert batch["tokens"][..., 0].tolist() == [
        [[97, 97], [98, 98]],
        [[0, 0], [0, 0]],
        [[99, 0], [0, 0]],
        [[99, 0], [0, 0]],
    ]
    assert "tokens" in model_inputs(batch)
    for make in (answer_batch, prompt_batch):
        assert torch.equal(make([ROWS[0]], source, pad_id=3)["tokens"], batch["tokens"][:1])
    without = collate([ROWS[0], ROWS[1], pair], lookup, pad_id=3)
    assert without.keys() == batch.keys() - {"tokens"}
    assert all(torch.equal(value, batch[name]) for name, value in without.items())
