"""docs/preferences.md: its options are those of the code, its recipe is read, and its own objective works."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from bindllm.objectives import DPO, KTO, ORPO, Objective

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/preferences.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_table_of_options_is_that_of_the_code():
    told = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\S+) \|", PAGE, flags=re.MULTILINE)
    real = [
        (kind.__name__, name, str(parameter.default))
        for kind in (DPO, ORPO, KTO)
        for name, parameter in inspect.signature(kind).parameters.items()
    ]
    assert told == real


@pytest.mark.parametrize(("source", "beta"), [("the page", 0.1), ("the recipe", 0.5)])
def test_the_objective_of_a_recipe_is_built(source, beta):
    text = blocks("yaml")[0] if source == "the page" else (ROOT / "recipes/easyvqa-dpo.yaml").read_text()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--objective", type=Objective)
    built = parser.instantiate(parser.parse_object({"objective": yaml.safe_load(text)["model"]["objective"]}))
    assert isinstance(built.objective, DPO)
    assert built.objective.beta == beta


def test_the_objective_of_ones_own_has_a_loss():
    """The pairs' log-probabilities are -1 and -3 for the chosen, -2 and -2 for the rejected answers."""
    names: dict = {}
    exec(blocks("python")[0], names)
    sums = torch.tensor([-1.0, -3.0, -2.0, -2.0])
    names["answer_log_probs"] = lambda *_: (sums, None)
    loss, metrics = names["Hinge"]().loss(None, {})
    assert loss.item() == 1.0  # (0 + 2) / 2
    assert metrics["accuracy"].item() == 0.5
