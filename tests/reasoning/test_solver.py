"""The solver with scripted brains: rounds, budgets, repairs and failures; and its trace, written, read and replayed."""

import json
import threading
import time
from typing import Annotated

import numpy as np
import pytest

from bindllm import Media
from bindllm.errors import InputError
from bindllm.reasoning.brain import Reply
from bindllm.reasoning.measure import calculate, crop
from bindllm.reasoning.solver import Budget, ScriptedBrain, Solver, name_media
from bindllm.reasoning.tools import tool
from bindllm.reasoning.trace import Trace

GRAY = np.full((40, 80, 3), 128, np.uint8)
MEDIA = [Media.image(GRAY), Media.image(np.zeros((8, 8, 3), np.uint8))]


@tool
def count(image: Annotated[Media, "image"], thing: str) -> int:
    """Count things.

    Args:
        image: to look at
        thing: their name
    """
    return int(image.source.mean()) if isinstance(image.source, np.ndarray) else -1


TOOLS = [count, calculate, crop]
LOOK = ("count", {"image": "image1", "thing": "cats"})
PLAN = Reply("", (LOOK, ("count", {"image": "image2", "thing": "dogs"}),
                  ("calculate", {"operation": "subtract", "a": "result1", "b": "result2"})), tokens=9)  # fmt: skip


class Recorder(ScriptedBrain):
    """A scripted brain that keeps what it was asked."""

    def __init__(self, *replies):
        super().__init__(replies)
        self.asked = []

    def reply(self, messages, tools, **limits):
        self.asked.append((messages, [tool["function"]["name"] for tool in tools], limits))
        return super().reply(messages, tools)


def solve(*replies, tools=TOOLS, media=MEDIA, **budget):
    brain = Recorder(*replies)
    return Solver(brain, tools, budget=Budget(**budget)).run("How many more cats?", media), brain


def test_a_single_round_is_a_plan_and_a_decision():
    found, brain = solve(PLAN, Reply("128 more.", tokens=3), rounds=1)
    assert (found.answer, found.failure, found.calls, found.tokens) == ("128 more.", None, 3, 12)
    # The brain sees handles and results, and no path, array or tool in the decision.
    (first, offered, limits), (last, none, _) = brain.asked
    assert "image1: image\nimage2: image\nQuestion: How many more cats?" in first[1]["content"]
    assert (offered, none, limits["required"]) == (["count", "calculate", "crop"], [], True)
    assert 'calculate(operation="subtract", a="result1", b="result2"): 128' in last[0]["content"]


def test_with_many_rounds_the_brain_decides_when_the_results_suffice():
    second = Reply("Now the dogs.", (("count", {"image": "image2", "thing": "dogs"}),))
    found, brain = solve(Reply("", (LOOK,)), second, Reply("More cats."))
    assert (found.answer, found.calls) == ("More cats.", 2)
    messages, _, limits = brain.asked[-1]
    assert limits["required"] is False
    assert [message["role"] for message in messages] == ["system", "user", *["assistant", "tool"] * 2]
    assert messages[-1] == {"role": "tool", "content": "result2: 0", "tool_call_id": "call_2"}
    assert messages[-2]["tool_calls"][0]["function"]["name"] == "count"
    assert json.loads(messages[-2]["tool_calls"][0]["function"]["arguments"])["image"] == "image2"


def test_results_that_are_images_can_be_looked_at():
    part = ("crop", {"image": "image1", "left": 0, "top": 0, "right": 50, "bottom": 50})
    found, _ = solve(Reply("", (part, ("count", {"image": "result1", "thing": "cats"}))), Reply("None."))
    (shown,) = [event for event in found.trace.events if event["kind"] == "result" and event["thumbnail"]]
    assert (shown["number"], shown["text"]) == (1, "image <image 40x20 RGB>")


UNUSABLE = [
    (Reply("", problem="not JSON"), "not JSON"),
    (Reply("  "), "the reply is empty"),
    (Reply("Three."), "no tool has looked at the media yet"),
    (Reply('{"name": "count", "arguments": {}}'), "the text of a call"),
    (Reply('```json\n[{"name": "count"}]\n```'), "the text of a call"),
    (Reply('Call: {"name": "count"'), "the text of a call"),
    (Reply('I look.\n<tool_call>{"name": "count"}</tool_call>'), "the text of a call"),
    (Reply('count(image="image1", thing="cats")'), "the text of a call"),
    (Reply("result1 = count(image1)"), "the text of a call"),
    (Reply('[{"tool": "count"}]'), "the text of a call"),
    (Reply("<function=count>{}</function>"), "the text of a call"),
    (Reply("<|python_tag|>count.call()"), "the text of a call"),
    (Reply("Action: count"), "the text of a call"),
    (Reply("", (("calculate", {"operation": "add", "a": 1}),)), "'b' is a required property"),
    (Reply("", (("shell", {"command": "ls"}),)), "unknown tool 'shell'"),
    (Reply("", (("count", {"image": "image7", "thing": "cats"}),)), "expected a handle of image"),
    (Reply("", (("count", {"image": "image1", "many": 1}),)), "'thing' is a required property"),
]


@pytest.mark.parametrize(("bad", "problem"), UNUSABLE)
def test_an_unusable_reply_gets_one_repair_and_is_then_a_typed_failure(bad, problem):
    repaired, brain = solve(bad, Reply("", (LOOK,)), Reply("Three."))
    assert repaired.answer == "Three."
    assert problem in brain.asked[1][0][-1]["content"]
    failed, _ = solve(bad, bad, Reply("Three."))
    assert (failed.answer, failed.failure) == (None, "unusable")
    assert problem in failed.message
    assert [event["kind"] for event in failed.trace.events] == ["question", "reply", "reply", "failure"]


def test_of_a_partly_invalid_plan_the_rest_runs():
    found, brain = solve(
        Reply("", (LOOK, ("shell", {}), ("calculate", {"operation": "add", "a": "result2", "b": 1}))),
        Reply("Some."),
    )
    assert found.answer == "Some."
    results = [message["content"] for message in brain.asked[1][0] if message["role"] == "tool"]
    assert results[0] == "result1: 128"
    assert results[1].startswith("result2: error: unknown tool 'shell'")
    assert results[2] == "result3: error: not run: result2 is an error"


def test_a_brain_that_loops_or_never_stops_ends_within_its_budget():
    again = [Reply("", (LOOK,), tokens=5)] * 99
    found, brain = solve(*again, rounds=3)
    # The decision has no tools, so its calls are unknown ones.
    assert (found.failure, found.calls, len(brain.asked)) == ("rounds", 4 - 1, 4)
    assert "the same call as result1" in brain.asked[2][0][-1]["content"]
    assert (solve(*again, rounds=99, calls=4)[0].calls, solve(*again, rounds=99, calls=4)[0].failure) == (
        4,
        "rounds",
    )
    found, _ = solve(*again, rounds=99, calls=99, tokens=12)
    assert (found.failure, found.tokens) == ("tokens", 15)


def test_calls_beyond_the_budget_are_errors_of_the_plan():
    found, brain = solve(PLAN, Reply("?"), calls=2, rounds=1)
    assert found.answer == "?"
    assert "not run: the budget of 2 calls is used up" in brain.asked[1][0][0]["content"]


def test_a_call_that_looks_at_no_media_is_no_look():
    add = Reply("", (("calculate", {"operation": "add", "a": 1, "b": 2}),))
    assert solve(add, Reply("Three."), Reply("Three."))[0].failure == "unusable"
    assert solve(add, Reply("", (LOOK,)), Reply("Three."))[0].answer == "Three."

    # Of a part of an image the brain sees its name only, and a tool may be called without its media.
    @tool
    def note(text: str, image: Annotated[Media, "image"] | None = None) -> str:
        """Note."""
        return text

    part = ("crop", {"image": "image1", "left": 0, "top": 0, "right": 50, "bottom": 50})
    for call in (part, ("note", {"text": "a"})):
        looked = ("count", {"image": "image1", "thing": "cats"})
        tools = [*TOOLS, note]
        assert solve(Reply("", (call,)), *[Reply("Three.")] * 2, tools=tools)[0].failure == "unusable"
        assert solve(Reply("", (call, looked)), Reply("Three."), tools=tools)[0].answer == "Three."


def test_a_plan_without_any_result_is_no_base_for_an_answer():
    @tool
    def broken(image: Annotated[Media, "image"]) -> str:
        """Fail."""
        raise OSError("no camera")

    found, _ = solve(
        *[Reply("", (("broken", {"image": "image1"}),))] * 2, Reply("A cat."), tools=[broken], rounds=2
    )
    assert (found.answer, found.failure) == (None, "rounds")
    assert "OSError: no camera" in "\n".join(found.trace.lines())


def test_a_brain_that_raises_or_hangs_is_a_typed_failure():
    class Broken(ScriptedBrain):
        def reply(self, *_, **__):
            raise KeyError("oops")

    class Hanging(ScriptedBrain):
        def reply(self, *_, **__):
            threading.Event().wait(30)

    assert Solver(Broken([]), TOOLS).run("?").message == "KeyError: 'oops'"
    assert solve()[0].failure == "brain"
    started = time.monotonic()
    found = Solver(Hanging([]), TOOLS, budget=Budget(seconds=0.2)).run("?")
    assert (found.failure, time.monotonic() - started < 10) == ("seconds", True)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (lambda: None, "the brain returned NoneType, expected a Reply"),
        (lambda: Reply(None), "expected text, a count and text"),
        (lambda: Reply("", tokens=-1), "expected text, a count and text"),
        (lambda: Reply("", ("count",)), "expected a name and a dictionary"),
        (lambda: Reply("", (("count", None),)), "expected a name and a dictionary"),
    ],
)
def test_a_brain_that_returns_no_reply_is_a_typed_failure(reply, message):
    class Wrong(ScriptedBrain):
        def reply(self, *_, **__):
            return reply()

    found = Solver(Wrong([]), TOOLS).run("?", MEDIA)
    assert (found.failure, message in found.message) == ("brain", True)


def test_no_half_of_a_surrogate_pair_reaches_the_brain():
    calls = (("count", {"image": "image1", "thing": "\ud800"}), ("\ud800", {}))
    _, brain = solve(Reply("\ud800", calls), Reply("Three."))
    json.dumps(brain.asked[1][0], ensure_ascii=False).encode()


@pytest.mark.parametrize("kind", ["no result in", "longer than 20,000 characters", "OSError: no camera"])
def test_a_bad_tool_is_reported_to_the_brain_and_in_the_trace(kind):
    @tool
    def bad(image: Annotated[Media, "image"]) -> str:
        """Look."""
        if "no result" in kind:
            threading.Event().wait(30)
        if "camera" in kind:
            raise OSError("no camera")
        return "x" * 10**6

    plan = Reply("", (("bad", {"image": "image1"}), LOOK))
    found, brain = solve(plan, Reply("128."), tools=[bad, count], call_seconds=1.0)
    assert (found.answer, found.seconds < 10) == ("128.", True)
    for text in (brain.asked[1][0][-2]["content"], "\n".join(found.trace.lines())):
        assert f"result1: error: {kind}" in text.replace("the result is ", "")


def test_a_tool_that_hangs_ends_with_the_run():
    @tool
    def wait(image: Annotated[Media, "image"]) -> str:
        """Wait."""
        threading.Event().wait(30)
        return ""

    found, _ = solve(Reply("", (("wait", {"image": "image1"}),)), Reply("?"), tools=[wait], seconds=0.3)
    assert (found.failure, found.seconds < 10) == ("seconds", True)


def test_only_tools_that_fit_the_media_are_offered():
    _, brain = solve(Reply("Four."), media=[])
    assert brain.asked[0][1] == ["calculate"]
    assert [*name_media([*MEDIA, Media.audio("a.wav")])] == ["image1", "image2", "audio1"]


def test_input_is_checked_once():
    for wrong in ({"calls": 0}, {"seconds": float("inf")}, {"call_seconds": float("nan")}, {"seconds": "9"}):
        with pytest.raises(InputError, match="expected more than 0 and at most"):
            Budget(**wrong)
    with pytest.raises(InputError, match=", a whole number"):
        Budget(rounds=1.5)
    with pytest.raises(InputError, match="media takes lists"):
        Solver(ScriptedBrain([]), TOOLS).run("?", MEDIA[0])
    with pytest.raises(InputError, match="has no tools of its own"):
        Solver(ScriptedBrain([]))
    with pytest.raises(InputError, match="the question is empty"):
        Solver(ScriptedBrain([]), TOOLS).run(" ")
    with pytest.raises(InputError, match="no tool takes audio: add one, or leave a.wav out"):
        Solver(ScriptedBrain([]), TOOLS).run("?", [Media.audio("a.wav")])
    with pytest.raises(InputError, match="two tools have the name"):
        Solver(ScriptedBrain([]), [count, count])


@pytest.fixture
def trace():
    found, _ = solve(
        Reply("<script>alert(1)</script>", problem="bad"), PLAN, Reply("<b>128</b>\x1b[31m"), rounds=1
    )
    return found.trace


def test_a_trace_is_replayed_without_the_brain(trace, tmp_path):
    trace.save(tmp_path / "trace.jsonl")
    again = Trace.read(tmp_path / "trace.jsonl")
    assert again.events == trace.events
    replayed = Solver(ScriptedBrain(again.replies), TOOLS, budget=Budget(rounds=1)).run(
        "How many more cats?", MEDIA
    )
    untimed = [
        [
            {key: value for key, value in event.items() if key not in ("at", "seconds", "brain")}
            for event in one.events
        ]
        for one in (trace, replayed.trace)
    ]
    assert untimed[0] == untimed[1]


def test_a_trace_is_text_and_a_page_that_escapes_everything(trace, tmp_path):
    lines = "\n".join(trace.lines())
    assert (
        'result3 = calculate(operation="subtract", a="result1", b="result2")  after result1, result2' in lines
    )
    assert "unusable: bad" in lines
    assert "\x1b" not in lines
    trace.save(tmp_path / "trace.html")
    page = (tmp_path / "trace.html").read_text()
    assert "<script" not in page
    assert "&lt;b&gt;128&lt;/b&gt;" in page
    assert page.count("data:image/webp;base64,") == 2
    trace.save(tmp_path / "trace.txt")
    with pytest.raises(InputError, match="the ending names the form"):
        trace.save(tmp_path / "trace.pdf")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[]",
        '{"kind": "shell"}',
        '{"kind": "answer", "at": 0, "text": 5}',
        "\xff",
        '{"kind": [], "at": 0}',
        '{"kind": "answer", "at": null, "text": "x"}',
        '{"kind": "result", "at": 0, "number": [], "name": "", "ok": true, "text": "", "seconds": 0, "thumbnail": ""}',
    ],
)
def test_a_file_that_is_no_trace_is_refused(line, tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text(f'{{"kind": "answer", "at": 0, "text": "x"}}\n{line}\n', encoding="latin-1")
    with pytest.raises(InputError, match=r"trace.jsonl.*(line 2|cannot be read)"):
        Trace.read(file)


def test_an_empty_file_is_no_trace(tmp_path):
    (tmp_path / "trace.jsonl").write_text("")
    with pytest.raises(InputError, match="is empty"):
        Trace.read(tmp_path / "trace.jsonl")


def test_images_of_a_trace_are_thumbnails_only(trace, tmp_path):
    trace.events[0]["media"][0]["thumbnail"] = "https://example.org/pixel.png"
    assert "example.org" not in trace.page()
