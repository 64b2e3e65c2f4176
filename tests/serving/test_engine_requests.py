"""Limits, ends and failures of requests in the serving engine."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from bindllm import Conversation, Media, Message
from bindllm.errors import DecoderError, EngineBusy, EngineClosed, InputError, MediaError
from bindllm.media.limits import MediaLimits
from bindllm.serving import batch
from bindllm.serving.engine import Engine, Request
from bindllm.serving.request import make_input
from engine_parts import SECONDS, Listener, answers, conversation, draw_request, stripes, submit
from tiny import ColorEncoder, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def model(decoder):
    return tiny_model(decoder)


@pytest.fixture
def engine(model):
    with Engine(model, slots=4) as engine:
        yield engine
        engine.close(drain=0)


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def says(model):
    """Let the decoder say a text token by token, then end the answer."""
    handles = []

    def script(answer: str | list[int], *, pause: float = 0.0) -> None:
        answer = [*ids(answer), 2] if isinstance(answer, str) else answer
        following = dict(zip([*ids("\n"), *answer[:-1]], answer, strict=True))

        def hook(_, __, kwargs, output):
            time.sleep(pause)
            output.logits[...] = 0
            for row, token in enumerate(kwargs["input_ids"][:, -1].tolist()):
                place = output.logits[row] if output.logits.ndim == 2 else output.logits[row, -1]
                place[following.get(token, answer[-1])] = 10.0
            return output

        handles.append(model.decoder.register_forward_hook(hook, with_kwargs=True))

    yield script
    for handle in handles:
        handle.remove()


def endless(says, *, pause: float = 0.01) -> None:
    """Answers that end at their limit only, slowly."""
    says(ids("y"), pause=pause)


def wait_until(condition) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def test_sampled_answers_depend_on_their_seed_only(engine):
    draw = random.Random(3)
    options = {"temperature": 1.5, "top_p": 0.9}
    requests = [draw_request(draw, seed=n % 3, **options) for n in range(6)]
    alone = [answers(engine, [request])[0] for request in requests]
    assert answers(engine, requests) == alone
    assert answers(engine, requests[::-1]) == alone[::-1]
    other = [replace(request, seed=99) for request in requests]
    assert answers(engine, other) != alone
    free = replace(requests[0], seed=None, max_tokens=20)
    assert len({answers(engine, [free])[0] for _ in range(3)}) == 3


def test_a_stop_string_ends_an_answer_and_is_no_part_of_it(engine, says):
    # Each character once: the script follows from the last token.
    says("\tab, cd;ef")
    request = Request(conversation("?"))
    assert answers(engine, [request]) == ["ab, cd;ef"]
    expected = {
        (",",): "ab",
        ("cd;",): "ab,",
        (" c", "d"): "ab,",
        ("zz", "b,"): "a",
        ("\t",): "",
        ("f z",): "ab, cd;ef",
    }
    found = [replace(request, stop=stop) for stop in expected]
    assert answers(engine, found) == list(expected.values())
    listener, ticket = submit(engine, replace(request, stop=(",",)))
    assert (listener.last.finish, listener.tokens) == ("stop", len(ids("\tab,")))
    assert ticket.prompt_tokens == engine.model.prepare(request.conversation, None)[0].shape[1]


@pytest.mark.parametrize("limit", range(1, 8))
def test_no_piece_cuts_a_character(engine, model, says, limit):
    says("a日é b")
    request = Request(conversation("?"), max_tokens=limit)
    listener, _ = submit(engine, request)
    assert listener.last.finish == "length"
    assert listener.tokens == limit
    assert not any("\ufffd" in piece.text for piece in listener.pieces)
    assert listener.text == model.generate(request.conversation, max_new_tokens=limit)


def test_bytes_that_the_model_ends_itself_stay_visible(engine, model, says):
    says([*ids("a日")[:3], 2])
    listener, _ = submit(engine, Request(conversation("?")))
    assert (listener.last.finish, listener.text, listener.tokens) == ("stop", "a\ufffd", 4)
    assert model.generate(conversation("?")) == "a\ufffd"


def test_log_probabilities_are_those_of_the_model(engine, model):
    request = Request(conversation(stripes("red"), "?"), max_tokens=6, logprobs=3)
    listener, _ = submit(engine, request)
    assert listener.last.error is None
    found = [entry for piece in listener.pieces for entry in piece.logprobs]
    prompt, mask, index, embeddings, _ = model.prepare(request.conversation, None)
    answer = model.generate_from(prompt, mask, index, embeddings, max_new_tokens=6)
    whole = torch.cat([prompt, answer], 1)
    index = torch.cat([index, index[:, -1:].expand(-1, answer.shape[1])], 1)
    with torch.no_grad():
        logits = model(whole, torch.ones_like(whole), index, embeddings).logits
    expected = logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
    assert [entry.logprob for entry in found] == pytest.approx(
        expected.gather(1, answer[0][:, None]).flatten().tolist(), abs=1e-4
    )
    assert all([len(entry.top) == 3 and entry.top[0].logprob == entry.logprob for entry in found])


def test_a_bad_file_is_an_error_of_its_request_only(engine, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no image")
    bad = Request(conversation(Media.image(tmp_path / "bad.png"), "?"))
    good = Request(conversation(stripes("red"), "?"), max_tokens=3)
    listeners = [submit(engine, request)[0] for request in (good, bad, good)]
    assert [type(listener.last.error) for listener in listeners] == [type(None), MediaError, type(None)]
    assert "bad.png" in str(listeners[1].last.error)
    long = Request(conversation("word " * 200))
    question = Request(Conversation((Message("assistant", "Hi"),)))
    for request, words in ((long, "512 positions"), (question, "starts with an answer")):
        assert words in str(submit(engine, request)[0].last.error)
    assert engine.counters.finished["error"] == 3


def test_media_of_a_request_are_limited_in_every_thread(model):
    with Engine(model, limits=MediaLimits(pixels=99)) as engine:
        large, small = (
            submit(
                engine, Request(conversation(Media.image(np.zeros((size, 10, 3), np.uint8))), max_tokens=1)
            )[0]
            for size in (10, 9)
        )
        assert "10 x 10 pixels; at most 99" in str(large.last.error)
        assert small.last.error is None


def test_a_file_that_comes_again_is_not_encoded_again(model):
    calls = []

    class Counting(ColorEncoder):
        def embed(self, modality, inputs):
            calls.append(len(inputs))
            return super().embed(modality, inputs)

    own = tiny_model(model.config.name, encoders=[Counting()])
    requests = [Request(conversation(stripes(color), "?"), max_tokens=2) for color in ("red", "blue", "red")]
    with Engine(own) as engine:
        found = [answers(engine, [request])[0] for request in requests * 2]
        assert (engine.recent.hits, engine.recent.misses) == (4, 2)
    assert calls == [1, 1]
    assert found[:3] == found[3:]
    assert found[0] != found[1]


def test_the_queue_is_bounded_and_a_closed_engine_takes_nothing(model, says):
    endless(says)
    with Engine(model, slots=1, queue=2) as engine:
        request = Request(conversation("?"), max_tokens=30)
        first, _ = submit(engine, request)
        wait_until(lambda: engine.running == 1)
        others = [submit(engine, request) for _ in range(2)]
        assert (engine.waiting, engine.running) == (2, 1)
        with pytest.raises(EngineBusy, match="2 requests are waiting"):
            submit(engine, request)
        closing = threading.Thread(target=engine.close, kwargs={"drain": SECONDS})
        closing.start()
        wait_until(lambda: engine._is_closing)
        with pytest.raises(EngineClosed):
            submit(engine, request)
        # Those that were accepted are finished.
        assert first.last.finish == "length"
        assert [listener.last.finish for listener, _ in others] == ["length", "length"]
        closing.join()


def test_requests_that_are_not_finished_in_time_end_with_an_error(model, says):
    endless(says)
    engine = Engine(model, slots=1)
    found = [submit(engine, Request(conversation("?"), max_tokens=400))[0] for _ in range(2)]
    wait_until(lambda: engine.running == 1)
    engine.close(drain=0.05)
    assert all(isinstance(listener.last.error, EngineClosed) for listener in found)
    assert not engine._thread.is_alive()


def test_a_cancelled_request_frees_its_slot_at_once(model, says):
    endless(says)
    with Engine(model, slots=1) as engine:
        request = Request(conversation("?"), max_tokens=400)
        first, running = submit(engine, request)
        wait_until(lambda: first.pieces)
        second, waiting = submit(engine, request)
        steps = engine.counters.steps
        waiting.cancel()
        running.cancel()
        third, _ = submit(engine, replace(request, max_tokens=2))
        assert third.last.finish == "length"
        assert engine.counters.steps - steps < 6
        assert not second.pieces
        assert not first.ended.is_set()
        assert engine.counters.finished == {"cancelled": 2, "length": 1}


def test_the_media_of_cancelled_requests_are_not_kept(model, says, monkeypatch):
    endless(says)
    busy = threading.Event()
    prepare = make_input
    monkeypatch.setattr("bindllm.serving.engine.PREPARE_THREADS", 1)

    def slow(model, request, *args):
        if request.stop:
            busy.wait(SECONDS)
        return prepare(model, request, *args)

    with Engine(model) as engine:
        running, ticket = submit(engine, Request(conversation("?"), max_tokens=10_000))
        wait_until(lambda: running.pieces)
        monkeypatch.setattr("bindllm.serving.engine.make_input", slow)
        slow_one = engine.submit(Request(conversation("?"), stop=("x",), max_tokens=1), Listener())
        request = Request(conversation("?", stripes("red")))
        gone, kept = engine.submit(request, Listener()), weakref.ref(request)
        gone.cancel()
        wait_until(lambda: engine.waiting == 1)
        del gone, request
        gc.collect()
        assert kept() is None
        busy.set()
        wait_until(lambda: slow_one.prompt_tokens)
        ticket.cancel()


def test_a_request_has_a_deadline(model, says):
    endless(says)
    with Engine(model, slots=1) as engine:
        request = Request(conversation("?"), max_tokens=400, timeout=1.0)
        found = [submit(engine, request)[0]]
        wait_until(lambda: found[0].pieces)
        found.append(submit(engine, replace(request, timeout=0.1))[0])
        assert [listener.last.finish for listener in found] == ["timeout", "timeout"]
        # The first had a slot; the second never had one.
        assert set(found[0].text) == {"y"}
        assert found[1].text == ""
        wait_until(lambda: engine.running == engine.waiting == 0)


def test_a_failed_step_ends_its_requests_and_not_the_engine(engine, model):
    request = Request(conversation("?"), max_tokens=30)
    expected = answers(engine, [request])
    failing = []

    def fail(*_):
        if failing:
            raise RuntimeError("on purpose")

    handle = model.decoder.register_forward_pre_hook(fail)
    listener, _ = submit(engine, replace(request, max_tokens=400))
    wait_until(lambda: engine.counters.steps > 3)
    failing.append(True)
    assert str(listener.last.error) == "on purpose"
    failing.clear()
    assert answers(engine, [request]) == expected
    handle.remove()


def test_a_prompt_that_fails_costs_only_its_own_request(engine, model):
    good, bad = (Request(conversation(text), max_tokens=3) for text in ("?", "~"))

    def fail(_, args, kwargs):
        if (kwargs["input_ids"] == ids("~")[0]).any():
            raise RuntimeError("on purpose")

    expected = answers(engine, [good])[0]
    handle = model.decoder.register_forward_pre_hook(fail, with_kwargs=True)
    with engine._changed:
        listeners = [submit(engine, request)[0] for request in (good, bad, good)]
        time.sleep(0.1)
    assert [str(listener.last.error or "") for listener in listeners] == ["", "on purpose", ""]
    assert [listener.text for listener in listeners] == [expected, "", expected]
    handle.remove()


def test_a_failure_between_prompt_and_cache_ends_all_rows(engine, monkeypatch):
    """The cache may be half moved then: no row may continue with it."""
    request = Request(conversation("?"), max_tokens=400)
    expected = answers(engine, [replace(request, max_tokens=3)])
    running, _ = submit(engine, request)
    wait_until(lambda: running.pieces)
    put = batch.SlotCache._buffer

    def fail(self, like):
        monkeypatch.setattr(batch.SlotCache, "_buffer", put)
        raise RuntimeError("on purpose")

    monkeypatch.setattr(batch.SlotCache, "_buffer", fail)
    with engine._changed:
        newcomers = [submit(engine, replace(request, max_tokens=3))[0] for _ in range(2)]
        time.sleep(0.1)
    ends = [str(listener.last.error or "") for listener in (running, *newcomers)]
    assert ends[0] == "on purpose"
    assert "on purpose" in ends[1:]
    assert answers(engine, [replace(request, max_tokens=3)]) == expected


def test_logits_that_are_not_finite_are_an_error(engine, model):
    def spoil(_, __, kwargs, output):
        bad = (kwargs["input_ids"] == ids("~")[0]).any(1)
        output.logits[bad] = float("nan")
        return output

    handle = model.decoder.register_forward_hook(spoil, with_kwargs=True)
    good, bad = (Request(conversation(text), max_tokens=3) for text in ("?", "~"))
    listeners = [submit(engine, request)[0] for request in (good, bad, good)]
    assert [type(listener.last.error) for listener in listeners] == [type(None), DecoderError, type(None)]
    handle.remove()


def test_a_listener_that_raises_ends_its_request(engine):
    request = Request(conversation("?"), max_tokens=5)

    def listener(_):
        raise RuntimeError("on purpose")

    engine.submit(request, listener)
    assert answers(engine, [request])
    assert engine.counters.finished == {"cancelled": 1, "length": 1}


def test_the_cache_stays_within_its_bound(model, says, monkeypatch):
    endless(says, pause=0)
    largest = []
    move = batch.SlotCache._move

    def record(self, *args):
        move(self, *args)
        largest.append(self._num_rows * self._num_columns)

    monkeypatch.setattr(batch.SlotCache, "_move", record)
    draw = random.Random(2)
    requests = [
        Request(conversation("? " * draw.choice([1, 20, 40])), max_tokens=draw.choice([3, 30]))
        for _ in range(20)
    ]
    with Engine(model, slots=16, tokens=240) as engine:
        assert all(set(text) == {"y"} for text in answers(engine, requests))
        assert max(largest) <= 240
        # Prompt and answer of one request fit, too.
        cut, _ = submit(engine, Request(conversation("?"), max_tokens=10_000))
        assert cut.last.finish == "length"
        assert cut.tokens < 240
    assert engine._batch._slots.layers[0].keys is None
    with Engine(model, tokens=60) as engine:
        error = submit(engine, Request(conversation("word " * 20)))[0].last.error
        assert "the engine holds 60" in str(error)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"seed": 2**64}, "seed is"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"timeout": 0.0}, "timeout is 0"),
        ({"stop": ("a", "")}, "stop string is empty"),
    ],
)
def test_settings_out_of_range_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        Request(conversation("?"), **options)


@pytest.mark.parametrize("name", ["slots", "queue", "tokens"])
def test_an_engine_needs_room(model, name):
    with pytest.raises(InputError, match=f"{name} is 0"):
        Engine(model, **{name: 0})


def test_the_engine_can_be_used_from_a_listener(engine):
    """A listener may submit and cancel without a deadlock."""
    second = Listener()
    tickets = []

    class First(Listener):
        def __call__(self, piece):
            super().__call__(piece)
            if piece.is_last:
                tickets.append(engine.submit(Request(conversation("?"), max_tokens=2), second))

    first = First()
    engine.submit(Request(conversation("!"), max_tokens=2), first)
    assert first.last.finish == second.last.finish == "length"
