"""The adapter for lmms-eval, with a stand-in for the few names of lmms-eval that it uses."""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import bindllm.lmms_eval as adapter
from bindllm import Media
from bindllm.conversation import Conversation, Message
from bindllm.errors import InputError
from bindllm.media.audio import cut_audio
from tiny import COLORS, tiny_model

ONE = {"max_new_tokens": 4}


@dataclass
class Manifest:
    model_id: str
    simple_class_path: str
    chat_class_path: str


@dataclass
class Result:
    text: object


class Base:
    is_simple = True

    def __init__(self):
        self.task_dict = {}


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    found = {
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.api.instance": {"GenerationResult": Result},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
    }
    for name, members in found.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))


@pytest.fixture(scope="module")
def model(decoder):
    return tiny_model(decoder)


@pytest.fixture
def build(model, monkeypatch):
    def make(name="ChatModel", batch_size=2, **options):
        monkeypatch.setattr(adapter.BindLLM, "from_pretrained", lambda *_, **__: model)
        made = getattr(adapter, name)("somewhere", batch_size=batch_size, **options)
        images = [Image.new("RGB", (24, 24), color) for color in COLORS.values()]
        made.task_dict = {"colors": {"test": [{"image": image} for image in images]}}
        return made

    return make


def chat(number, given=ONE, question="Which color?"):
    def messages(doc):
        parts = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": question}]
        return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]

    return SimpleNamespace(args=("", messages, given, number, "colors", "test"))


def simple(number, target=None):
    place = (lambda doc: [doc["image"]], number, "colors", "test")
    return SimpleNamespace(args=("Which color?", ONE if target is None else target, *place))


def test_the_registry_gets_both_forms():
    found = adapter.manifest()
    assert found.model_id == "bindllm"
    for path, is_simple in ((found.simple_class_path, True), (found.chat_class_path, False)):
        module, _, name = path.rpartition(".")
        kind = getattr(sys.modules[module], name)
        assert issubclass(kind, Base)
        assert kind.is_simple is is_simple
    with pytest.raises(AttributeError):
        adapter.Nothing  # noqa: B018


def test_answers_are_those_of_the_model(build, model):
    images = [doc["image"] for doc in build().task_dict["colors"]["test"]]
    expected = [
        model.generate(
            Conversation(
                (Message("system", "Be brief."), Message("user", [Media.image(image), "Which color?"]))
            ),
            **ONE,
        )
        for image in images
    ]
    assert build().generate_until([chat(n) for n in range(4)]) == expected
    plain = [model.generate("Which color?", [Media.image(image)], **ONE) for image in images]
    assert build("SimpleModel").generate_until([simple(n) for n in range(4)]) == plain
    assert len(set(plain)) > 1


def test_settings_of_the_task(build, caplog):
    made = build()
    (whole,) = made.generate_until([chat(0, {"max_new_tokens": 8})])
    stopped = {
        "max_new_tokens": 8,
        "until": [whole[3], ""],
        "temperature": 0,
        "top_p": None,
        "do_sample": False,
    }
    # Requests with other settings between them keep their order.
    answers = made.generate_until([chat(0, stopped), chat(0, {"max_new_tokens": 8}), chat(0, stopped)])
    assert answers == [whole.split(whole[3])[0], whole, whole.split(whole[3])[0]]
    made.generate_until([chat(0, {**ONE, "image_aspect_ratio": "pad"})])
    assert "ignored settings of the task: image_aspect_ratio" in caplog.text


def test_likelihoods_choose_the_greedy_answer(build, model):
    made = build("SimpleModel")
    image = made.task_dict["colors"]["test"][2]["image"]
    greedy = model.generate("Which color?", [Media.image(image)], max_new_tokens=3)
    pairs = [
        found.text for found in made.loglikelihood([simple(2, f" {greedy}"), simple(2, lambda doc: "violet")])
    ]
    assert [is_greedy for _, is_greedy in pairs] == [True, False]
    assert 0 < pairs[0][0] < pairs[1][0]
    # The image is embedded once for all options.
    assert (made.recent.misses, made.recent.hits) == (1, 1)
    # Without a document: the probability of a choice by itself.
    ((alone, _),) = (found.text for found in made.loglikelihood([SimpleNamespace(args=("", greedy))]))
    assert alone != pairs[0][0]
    with pytest.raises(InputError, match="empty continuation"):
        made.loglikelihood([simple(2, " ")])


def test_likelihoods_are_those_of_all_answers_of_a_letter(build):
    made = build("SimpleModel")
    letters = [chr(code) for code in range(33, 127)]
    values = [found.text[0] for found in made.loglikelihood([simple(1, letter) for letter in letters])]
    # A part of all tokens, so their probabilities sum to less than 1.
    assert 0 < np.exp(-np.array(values)).sum() < 1


def test_rounds_end_when_the_task_says_so(build):
    seen = []

    def messages(doc, *, round_idx=None, previous_output=None, previous_round_info=None):
        seen.append((round_idx, previous_output, previous_round_info))
        turn = [{"role": "user", "content": "Go."}]
        return turn if round_idx is None else (turn, round_idx == 2, previous_output, "info")

    request = SimpleNamespace(args=("", messages, ONE, 0, "colors", "test"))
    ((first, second),) = build().generate_until_multi_round([request])
    assert seen == [(None, None, None), (1, [first], None), (2, [first, second], "info")]
    once = SimpleNamespace(
        args=("", lambda doc, **_: [{"role": "user", "content": "Go."}], ONE, 0, "colors", "test")
    )
    assert build().generate_until_multi_round([once]) == [[first]]
    with pytest.raises(InputError, match="--force_simple"):
        build("SimpleModel").generate_until_multi_round([request])


def test_media_in_every_form():
    assert adapter._media("a/b.WAV") == Media.audio("a/b.WAV")
    assert adapter._media("clip.xyz1") == Media.video("clip.xyz1")
    assert adapter._media({"type": "audio", "url": "a.webm"}) == Media.audio("a.webm")
    with pytest.raises(InputError, match="array and sampling_rate"):
        adapter._media(3)


@pytest.mark.parametrize("samples", [np.linspace(-1, 1, 80), np.stack([np.linspace(-1, 1, 80)] * 2)])
def test_decoded_audio_keeps_its_rate_and_samples(samples):
    media = adapter._media({"array": samples, "sampling_rate": 8000})
    (found,) = cut_audio(media.source, rate=8000, cut=lambda length: [(0, length)])
    np.testing.assert_allclose(found, np.atleast_2d(samples), atol=1e-6)


def test_batch_sizes_in_every_form(build):
    found = [build(batch_size=size).batch_size for size in (3, "4", "auto", "auto:2", None)]
    assert found == [3, 4, 8, 8, 8]


def test_unknown_arguments_are_refused(build):
    with pytest.raises(InputError, match="unknown model_args size"):
        build(size=3)
