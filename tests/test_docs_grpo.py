"""docs/grpo.md: its options are those of the code, its recipe is read, and its own reward works."""

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from bindllm.conversation import Conversation, Message
from bindllm.data.rows import tokenize
from bindllm.objectives import GRPO, ExactAnswer, Objective
from tiny import tiny_tokenizer

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/grpo.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.search(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)[1]


def test_the_table_of_options_is_that_of_the_code():
    told = re.findall(r"^\| `(\w+)` \| (\w[\w.]*) \|", PAGE, flags=re.MULTILINE)
    real = [(name, str(known.default)) for name, known in inspect.signature(GRPO).parameters.items()]
    assert told == real


@pytest.mark.parametrize("source", ["the page", "the recipe"])
def test_the_objective_of_a_recipe_is_built(source):
    text = block("yaml") if source == "the page" else (ROOT / "recipes/easyvqa-grpo.yaml").read_text()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--objective", type=Objective)
    built = parser.instantiate(parser.parse_object({"objective": yaml.safe_load(text)["model"]["objective"]}))
    assert isinstance(built.objective, GRPO)
    assert isinstance(built.objective.reward, ExactAnswer)
    assert (built.objective.group_size, built.objective.max_new_tokens) == (8, 8)


def test_the_reward_of_ones_own_judges():
    names: dict = {}
    exec(block("python"), names)
    conversation = Conversation((Message("user", "Shape?"), Message("assistant", "circle")))
    sample = replace(tokenize(conversation, tiny_tokenizer(), 64), references=("circle",))
    rewards = names["RightAndShort"]()(["circle", "a circle", "no idea"], [sample] * 3)
    assert rewards.tolist() == pytest.approx([1.0, 0.9, -0.1])
