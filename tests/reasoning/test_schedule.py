"""The scheduler: order and parallelism of a graph, and calls that fail, hang, or return too much."""

import threading
import time

import pytest

from bindllm import Media
from bindllm.reasoning.measure import MEDIA_TOOLS
from bindllm.reasoning.schedule import MOST_CHARACTERS, Outcome, Scheduler, TimeOut, run_within
from bindllm.reasoning.tools import check_tools, tool

HANDLES = {"image1": Media.image("missing.png")}
released = threading.Event()


@tool
def join(left: str, right: str) -> str:
    """Join."""
    return left + right


@tool
def fail(kind: str) -> str:
    """Fail."""
    if kind == "exit":
        raise SystemExit(3)
    raise RuntimeError("x" * 9999)


@tool
def hang() -> str:
    """Hang."""
    released.wait(60)
    return "late"


def endless() -> list:
    loop: list = []
    loop.append(loop)
    return loop


RESULTS = {
    "gigabyte": lambda: "x" * 10**9,
    "numbers": lambda: [0] * MOST_CHARACTERS,
    "loop": endless,
    "nan": lambda: float("nan"),
    "bytes": lambda: b"x",
    "object": object,
    "keys": lambda: {1: 2},
    "large number": lambda: 10**MOST_CHARACTERS,
    "video": lambda: Media.video(bytes(1 << 29)),
    "good": lambda: {"a": [1, None, True, 0.5]},
}


@tool
def give(what: str) -> str:
    """Return something."""
    return RESULTS[what]()


def run(*planned, seconds=60.0, deadline=60.0):
    """The outcomes of calls by number, and the order in which they ended."""
    order = []
    tools = check_tools([join, fail, hang, give, *MEDIA_TOOLS])
    scheduler = Scheduler(
        tools, HANDLES, seconds=seconds, report=lambda call, outcome: order.append(call.number)
    )
    scheduler.run(scheduler.check(planned), time.monotonic() + deadline)
    return [scheduler.outcomes[number].text for number in range(1, len(planned) + 1)], order


def test_dependencies_are_those_of_the_arguments():
    found, order = run(
        ("join", {"left": "result2", "right": "{result3}!"}),
        ("join", {"left": "a", "right": "b"}),
        ("join", {"left": "result2", "right": "c"}),
    )
    assert found == ["ababc!", "ab", "abc"]
    assert order == [2, 3, 1]


def test_independent_calls_run_at_the_same_time():
    barrier = threading.Barrier(3, timeout=30)

    @tool
    def meet(name: str) -> int:
        """Wait for the others."""
        return barrier.wait()

    scheduler = Scheduler(check_tools([meet]), {}, seconds=60, report=lambda *_: None)
    scheduler.run(scheduler.check([("meet", {"name": name}) for name in "abc"]), time.monotonic() + 60)
    assert {outcome.value for outcome in scheduler.outcomes.values()} == {0, 1, 2}


def test_calls_that_cannot_run_are_errors_and_the_others_run():
    found, _ = run(
        ("delete_everything", {}),
        ("join", {"left": "result1", "right": ""}),
        ("join", {"left": "result3", "right": ""}),
        ("join", {"left": "result5", "right": ""}),
        ("join", {"left": "result4", "right": ""}),
        ("join", {"left": "result99", "right": ""}),
        ("join", {"left": "a"}),
        ("join", {"left": "a", "right": ""}),
        ("crop", {"image": "image9", "left": 0, "top": 0, "right": 1, "bottom": 1}),
        ("crop", {"image": "image1", "left": 0, "top": 0, "right": 1, "bottom": 1}),
    )
    assert found[0].startswith("error: unknown tool 'delete_everything'")
    assert found[1] == "error: not run: result1 is an error"
    assert "wait for each other" in found[2]
    assert "wait for each other" in found[3]
    assert found[5].startswith("error: result99 does not exist")
    assert found[6] == "error: 'right' is a required property"
    assert found[7] == "a"
    assert "expected a handle of image" in found[8]
    assert "missing.png" in found[9]
    assert found[9].startswith("error: ")


def test_an_equal_call_is_not_run_again():
    found, _ = run(*[("join", {"left": "a", "right": "b"})] * 2, ("join", {"right": "b", "left": "result2"}))
    assert found == ["ab", "ab (the same call as result1)", "abb"]


def test_a_tool_that_raises_is_an_error():
    found, _ = run(("fail", {"kind": "exit"}), ("fail", {"kind": ""}))
    assert found[0] == "error: SystemExit: 3"
    assert found[1].startswith("error: RuntimeError: xxx")
    assert len(found[1]) < 600


def test_a_tool_that_hangs_is_given_up_and_its_late_result_dropped():
    for limits in ({"seconds": 0.2}, {"deadline": 0.2}):
        released.clear()
        started = time.monotonic()
        found, _ = run(
            ("hang", {}),
            ("join", {"left": "a", "right": "b"}),
            ("join", {"left": "result1", "right": ""}),
            **limits,
        )
        assert time.monotonic() - started < 10
        released.set()
        assert found[0].startswith("error: no result in 0.")
        assert found[1] == "ab"
        assert found[2] == "error: not run: result1 is an error"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("gigabyte", "longer than 20,000 characters"),
        ("numbers", "longer than"),
        ("loop", "RecursionError"),
        ("large number", "longer than"),
        ("video", "at most 268,435,456 are kept"),
        ("nan", "the tool returned nan"),
        ("bytes", "the tool returned bytes"),
        ("object", "the tool returned object"),
        ("keys", "the tool returned dict"),
    ],
)
def test_results_that_no_planner_can_read_are_errors(what, message):
    ((found,), _) = run(("give", {"what": what}))
    assert found.startswith("error: ")
    assert message in found
    assert len(found) < 700


def test_good_results_are_json():
    assert run(("give", {"what": "good"}))[0] == ['{"a": [1, null, true, 0.5]}']
    assert Outcome(Media.image("a.png")).text == "image a.png"


def test_work_within_a_time():
    assert run_within(30, lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        run_within(30, lambda: 1 / 0)
    released.clear()
    with pytest.raises(TimeOut):
        run_within(0.1, hang)
    released.set()
