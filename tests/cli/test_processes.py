"""Processes that work together: how they are found, how they talk, and how they end."""

import multiprocessing
import os
import signal
import socket
from datetime import timedelta

import pytest
import torch
from torch import distributed

from bindllm.cli.recipes.fit import _Gather, graceful_stop, launch
from bindllm.errors import InputError, StoreError

SECONDS = 60


def unused(*_):
    raise AssertionError("nothing else is started")


def test_one_device_is_worked_on_in_this_process():
    seen = []
    options = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "plugins": None}
    assert launch(options, seen.append, again=unused)
    (context,) = seen
    processes = context.processes
    assert context.device == torch.device("cpu")
    assert (processes.rank, processes.world_size, processes.threads) == (0, 1, os.cpu_count())
    assert processes.gather("alone") == ["alone"]
    assert not distributed.is_initialized()


def test_an_error_of_the_work_is_passed_on_as_it_is():
    def broken(context):
        raise ValueError("of an encoder")

    with pytest.raises(ValueError, match="^of an encoder$"):
        launch({"accelerator": "cpu"}, broken, again=unused)


@pytest.mark.parametrize(
    ("options", "variables", "message"),
    [
        ({"accelerator": "cpu", "devices": -3}, {}, "trainer: "),
        ({"accelerator": "tpu"}, {}, "trainer: "),
        (
            {"accelerator": "cpu"},
            {"WORLD_SIZE": "2"},
            r"2 processes were started \(WORLD_SIZE\).*--trainer.devices",
        ),
        ({"accelerator": "cpu"}, {"SLURM_STEP_NUM_TASKS": "8"}, "8 processes were started"),
    ],
)
def test_options_that_cannot_be_are_explained(options, variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        launch(options, unused, again=unused)


def test_devices_that_differ_from_what_was_started_are_an_error(monkeypatch):
    """As torchrun with three processes leaves it, for a recipe that asks for two."""
    started = {
        "TORCHELASTIC_RUN_ID": "1",
        "WORLD_SIZE": "3",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "GROUP_RANK": "0",
    }
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="cannot work together.*does not match the world size"):
        launch({"accelerator": "cpu", "devices": 2}, unused, again=unused)


def in_processes(count, part):
    """Run ``part(gather, number)`` in forked processes that are connected as Fabric connects them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def one(number):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        distributed.init_process_group(
            "gloo", init_method=address, rank=number, world_size=count, timeout=timedelta(seconds=SECONDS)
        )
        answers.put((number, part(_Gather(count), number)))

    started = [context.Process(target=one, args=(number,)) for number in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(SECONDS)
        process.kill()
    return dict(answers.get(timeout=1) for _ in range(answers.qsize()))


def test_every_process_is_told_the_values_of_all():
    def part(gather, number):
        value = {"failed": [["\udcff.png", "x" * 1000 * number]], "count": number, "none": None}
        return gather(value) + gather(number)

    found = in_processes(2, part)
    assert found[0] == found[1]
    assert [value["count"] for value in found[0][:2]] == found[0][2:] == [0, 1]
    assert found[0][1]["failed"] == [["\udcff.png", "x" * 1000]]


def test_a_process_that_waits_learns_that_another_one_is_gone():
    def part(gather, number):
        gather(None)
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return gather(None)
        except StoreError as error:
            return str(error)

    found = in_processes(2, part)
    assert list(found) == [0]
    assert found[0].startswith("another process of this run has ended. ")
    assert "run the same command again" in found[0]


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_the_first_request_to_stop_is_heard_and_a_scheduler_cannot_disturb_the_end(asked):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    finished = False
    with pytest.raises(KeyboardInterrupt), graceful_stop():
        try:
            signal.raise_signal(asked)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGTERM)
            finished = True
            raise
    assert finished
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
