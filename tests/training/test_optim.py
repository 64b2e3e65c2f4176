import pytest
import torch
from rich.console import Console
from torch import nn

from bindllm.errors import InputError
from bindllm.training.optim import (
    OptimConfig,
    build_optimizer,
    build_schedule,
    describe_groups,
    groups_table,
    lr_factor,
)


def groups():
    """The names are chosen to mislead: a substring match on 'gate' or 'norm' would get them wrong."""
    return {
        "bind": [
            ("bind.blocks.0.gate.weight", nn.Parameter(torch.randn(4, 3))),
            ("bind.blocks.0.norm.weight", nn.Parameter(torch.randn(3))),
            ("bind.projection.bias", nn.Parameter(torch.randn(4))),
        ],
        "inject": [
            ("injection.gates", nn.Parameter(torch.zeros(2, 2))),
            ("injection.queries", nn.Parameter(torch.randn(2, 4))),
        ],
    }


def test_gates_queries_norms_and_biases_do_not_decay():
    optimizer = build_optimizer(groups(), OptimConfig(weight_decay=0.3))
    decay = {tuple(p.shape): part["weight_decay"] for part in optimizer.param_groups for p in part["params"]}
    assert decay == {(4, 3): 0.3, (3,): 0.0, (4,): 0.0, (2, 2): 0.0, (2, 4): 0.0}


def test_frozen_parameters_are_not_given_to_the_optimizer():
    named = groups()
    for _, parameter in named["bind"]:
        parameter.requires_grad_(False)
    optimizer = build_optimizer(named, OptimConfig())
    assert sum(len(part["params"]) for part in optimizer.param_groups) == 2


def test_schedule_warms_up_and_ends_at_the_final_rate():
    config = OptimConfig(warmup=0.1, final_lr=0.2)
    factors = [lr_factor(step, total=100, config=config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == factors[10] == 1.0
    assert factors[100] == pytest.approx(0.2)
    assert factors[10:] == sorted(factors[10:], reverse=True)


@pytest.mark.parametrize("warmup", [0, 0.0, 50, 1000])
def test_any_warmup_gives_rates_between_zero_and_one(warmup):
    factors = [lr_factor(step, total=20, config=OptimConfig(warmup=warmup)) for step in range(30)]
    assert all(0 < factor <= 1 for factor in factors)


def test_a_run_without_end_has_no_schedule():
    optimizer = build_optimizer(groups(), OptimConfig())
    with pytest.raises(InputError, match="max_epochs"):
        build_schedule(optimizer, float("inf"), OptimConfig())


def test_schedule_state_holds_no_code():
    """It is saved with the run's state, which is read without unpickling."""
    schedule = build_schedule(build_optimizer(groups(), OptimConfig()), 10, OptimConfig())
    assert schedule.state_dict()["lr_lambdas"] in ([{}, {}], [None, None])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"warmup": float("inf")}, "warmup is inf"),
        ({"lr": float("inf"), "weight_decay": float("nan")}, "lr is inf, .*; weight_decay is nan"),
        ({"final_lr": 2.0, "warmup": -1}, "warmup is -1"),
    ],
)
def test_impossible_settings_are_named(values, told):
    with pytest.raises(InputError, match=told):
        OptimConfig(**values)


def test_table_shows_groups_counts_and_what_is_frozen():
    named = groups()
    for _, parameter in named["inject"]:
        parameter.requires_grad_(False)
    rows = {row["group"]: row for row in describe_groups(named)}
    assert rows["bind"] == {"group": "bind", "tensors": 3, "parameters": 19, "decayed": 12, "trainable": True}
    assert rows["inject"]["trainable"] is False
    console = Console(width=100)
    with console.capture() as captured:
        console.print(groups_table(named, frozen=1_234_567))
    lines = captured.get().splitlines()
    assert any("bind" in line and "19" in line and "12" in line and "trained" in line for line in lines)
    assert any("inject" in line and "frozen" in line for line in lines)
    assert any("decoder" in line and "1,234,567" in line and "frozen" in line for line in lines)


def test_another_optimizer_by_its_import_path():
    config = OptimConfig(lr=0.1, weight_decay=0.3, optimizer="torch.optim.SGD", options={"momentum": 0.5})
    optimizer = build_optimizer(groups(), config)
    assert type(optimizer) is torch.optim.SGD
    assert {part["weight_decay"] for part in optimizer.param_groups} == {0.0, 0.3}
    assert {(part["lr"], part["momentum"]) for part in optimizer.param_groups} == {(0.1, 0.5)}


def test_an_optimizer_without_weight_decay():
    optimizer = build_optimizer(groups(), OptimConfig(weight_decay=0, optimizer="torch.optim.Rprop"))
    assert type(optimizer) is torch.optim.Rprop


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optimizer": "torch.optim.Nothing"}, "cannot be imported"),
        ({"optimizer": "torch.nn.Linear"}, "is not a class of torch.optim.Optimizer"),
        ({"optimizer": "torch.optim.SGD", "options": {"speed": 1}}, "refuses its arguments"),
        ({"optimizer": "torch.optim.Rprop"}, r"Rprop has no weight_decay, and the recipe's is 0\.05"),
        ({"options": {"momentum": 0.5}}, "those of another optimizer"),
        ({"optimizer": "torch.optim.LBFGS", "weight_decay": 0}, "LBFGS refuses its arguments"),
        (
            {"optimizer": "torch.optim.NAdam", "options": {"weight_decay": 0.5}},
            r"set model\.optim\.weight_decay instead",
        ),
        (
            {"optimizer": "torch.optim.NAdam", "betas": (0.8, 0.9)},
            r"betas are those of AdamW.*optim\.options",
        ),
    ],
)
def test_optimizers_that_cannot_be_built(values, words):
    with pytest.raises(InputError, match=words):
        build_optimizer(groups(), OptimConfig(**values))
