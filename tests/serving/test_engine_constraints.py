"""Penalties, biases and JSON schemas: answers that keep to them, next to others, are those of each request alone."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

from bindllm.errors import InputError, MissingExtraError
from bindllm.model.generation.constraint import Constraint, json_grammar
from bindllm.serving.engine import Engine, Request
from bindllm.serving.sampling import Sampling, choose_tokens
from engine_parts import Listener, answers, build, conversation, draw_conversation, submit

SCHEMAS = [
    {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}, "required": ["a"]},
    {"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "boolean"}}, "additionalProperties": False},
    {"type": "object", "minProperties": 2, "maxProperties": 3, "additionalProperties": {"type": "null"}},
    {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "string", "maxLength": 2}, {"type": "null"}], "items": False},
    {"type": "string", "maxLength": 6},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"type": "string", "format": "date"},
    {"type": "integer", "minimum": 3, "maximum": 300},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "integer", "multipleOf": 7, "maximum": 70, "minimum": 0},
    {"type": "boolean"},
    {"type": ["null", "boolean"]},
    {"enum": ["red", "green", 5, None, {"a": [1]}]},
    {"const": {"answer": 42}},
    {"anyOf": [{"type": "integer", "maximum": 9, "minimum": 0}, {"type": "string", "maxLength": 3}]},
    {"oneOf": [{"type": "boolean"}, {"type": "array", "items": {"const": 1}, "maxItems": 3}]},
    {
        "allOf": [{"type": "object", "properties": {"a": {"const": 1}}}, {"required": ["a"]}],
        "maxProperties": 1,
    },
    {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "color": {"enum": ["red", "blue"]},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["color", "next"],
                "additionalProperties": False,
            }
        },
    },
    {},
]


ANY_OBJECT = json_grammar({"type": "object"})


@pytest.fixture(scope="module")
def model():
    return build("tokens")


@pytest.fixture(scope="module")
def engine(model):
    with Engine(model, slots=9) as engine:
        yield engine


def follows(value, schema, root=None) -> bool:
    """Whether a value follows one of the schemas above."""
    root = root or schema
    if "$ref" in schema:
        return follows(value, root["$defs"]["node"], root)
    types = {
        **{"object": dict, "array": list, "string": str, "null": type(None), "boolean": bool},
        **{"integer": int, "number": (int, float)},
    }
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(isinstance(value, types[kind]) for kind in kinds):
        return False
    if isinstance(value, bool) and not {"boolean", "any"} & {*kinds, *([] if kinds else ["any"])}:
        return False
    checks = [
        value in schema["enum"] if "enum" in schema else True,
        value == schema["const"] if "const" in schema else True,
        *(
            any(follows(value, one, root) for one in schema[key])
            for key in ("anyOf", "oneOf")
            if key in schema
        ),
        *(follows(value, one, root) for one in schema.get("allOf", [])),
    ]
    if isinstance(value, str):
        checks.append(len(value) <= schema.get("maxLength", 10**9))
        checks.append("pattern" not in schema or (set(value) <= set("abc") and 2 <= len(value) <= 4))
        checks.append("format" not in schema or [*map(len, value.split("-"))] == [4, 2, 2])
    if isinstance(value, int | float) and not isinstance(value, bool):
        checks.append(schema.get("minimum", value) <= value <= schema.get("maximum", value))
        checks.append(schema.get("exclusiveMinimum", value - 1) < value)
        checks.append(value % schema.get("multipleOf", 1) == 0 or "multipleOf" not in schema)
    if isinstance(value, list):
        checks.append(schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9))
        heads = schema.get("prefixItems", [])
        checks += [follows(one, head, root) for one, head in zip(value, heads, strict=False)]
        rest = schema.get("items", {})
        checks += [rest is not False and follows(one, rest, root) for one in value[len(heads) :]]
    if isinstance(value, dict):
        checks.append(schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", 10**9))
        checks += [name in value for name in schema.get("required", [])]
        own, more = schema.get("properties", {}), schema.get("additionalProperties", {})
        for name, one in value.items():
            if name in own:
                checks.append(follows(one, own[name], root))
            elif "patternProperties" in schema:
                checks.append(len(name) == 2 and name[0] == "x" and isinstance(one, bool))
            else:
                checks.append(more is not False and follows(one, more, root))
    return all(checks)


def test_answers_follow_their_schema_in_any_company(engine):
    draw = random.Random(0)
    requests = []
    for number, schema in enumerate(SCHEMAS):
        options = {"max_tokens": 60, "seed": number, "temperature": [0.0, 1.0, 2.0][number % 3], "top_p": 0.9}
        requests.append(Request(draw_conversation(draw), grammar=json_grammar(schema), **options))
        # Without a schema, between the others.
        requests.append(replace(requests[-1], grammar=None, max_tokens=draw.choice([3, 30])))
    ends = []
    listeners = [submit(engine, request)[0] for request in requests]
    for request, listener in zip(requests, listeners, strict=True):
        assert listener.last.error is None, (request.grammar, listener.last.error)
        if request.grammar is None:
            continue
        ends.append(listener.last.finish)
        if ends[-1] == "stop":
            schema = json.loads(request.grammar.partition("%json ")[2])
            assert follows(json.loads(listener.text), schema), schema
        else:
            assert (listener.last.finish, listener.tokens) == ("length", 60)
    assert Counter(ends)["stop"] > len(SCHEMAS) * 0.6
    expected = [listener.text for listener in listeners]
    assert [answers(engine, [request])[0] for request in requests] == expected


def test_a_complete_answer_ends_without_an_end_token(engine):
    request = Request(
        conversation("?"), grammar=json_grammar({"const": {"a": 1}}), max_tokens=200, logprobs=0
    )
    listener, _ = submit(engine, request)
    assert listener.last.finish == "stop"
    assert json.loads(listener.text) == {"a": 1}
    assert sum(len(piece.logprobs) for piece in listener.pieces) == listener.tokens
    # It is not cut if it is complete with the last token that it may have.
    same, _ = submit(engine, replace(request, max_tokens=listener.tokens))
    assert (same.last.finish, same.text) == ("stop", listener.text)
    cut, _ = submit(engine, replace(request, max_tokens=listener.tokens - 1))
    assert cut.last.finish == "length"


def test_choices_follow_their_schema_each_on_its_own(engine):
    schema = {"type": "array", "items": {"enum": ["red", "blue", 1]}, "minItems": 4, "maxItems": 4}
    request = Request(
        conversation("?"), grammar=json_grammar(schema), temperature=2.0, seed=5, max_tokens=300
    )
    expected = answers(engine, [replace(request, seed=5 + n) for n in range(3)])
    listeners = [Listener() for _ in range(3)]
    engine.submit_choices(request, listeners)
    assert [listener.last.finish for listener in listeners] == ["stop"] * 3
    assert [listener.text for listener in listeners] == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, '"not"'),
        ({"not": {"type": "string"}, "x-guidance": {"lenient": True}}, '"not"'),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"oneOf": [{}, {}], "x-guidance": {"coerce_one_of": True}}, "oneOf"),
        ({"type": "string", "format": "colour"}, "colour"),
        ({"type": "text"}, "text"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "http://127.0.0.1/schema"}, "not present"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum (3)"),
        ({"$ref": "#"}, "no answer can follow"),
        ({"enum": ["x" * 70_000]}, "at most 65,536 are read"),
    ],
)
def test_a_schema_that_is_not_supported_is_refused_by_name(engine, schema, words):
    listener, _ = submit(engine, Request(conversation("?"), grammar=json_grammar(schema)))
    assert isinstance(listener.last.error, InputError)
    assert words in str(listener.last.error)
    assert len(str(listener.last.error)) < 400


def test_an_answer_that_cannot_be_continued_is_an_error_of_its_request(engine, monkeypatch):
    class Broken(Constraint):
        """Fails after a token, as a schema does that is too complex."""

        def copy(self):
            return Broken(self._matcher.deep_copy())

        def allowed(self, size):
            self.count = getattr(self, "count", 0) + 1
            self.error = "ParserTooComplex" if self.count > 1 else ""
            return super().allowed(size)

    request = Request(conversation("?"), max_tokens=20)
    expected = answers(engine, [request])
    monkeypatch.setattr("bindllm.model.generation.constraint.Constraint", Broken)
    good, bad = (submit(engine, replace(request, grammar=grammar))[0] for grammar in (None, ANY_OBJECT))
    assert "cannot follow its schema any further: ParserTooComplex" in str(bad.last.error)
    assert isinstance(bad.last.error, InputError)
    assert (good.last.error, [good.text]) == (None, expected)


def test_without_its_package_the_error_names_the_extra(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    listener, _ = submit(engine, Request(conversation("?"), grammar=ANY_OBJECT))
    assert isinstance(listener.last.error, MissingExtraError)
    assert "pip install 'bindllm[serve]'" in str(listener.last.error)


def test_tokens_beyond_those_of_the_tokenizer_are_never_allowed(engine):
    allowed = engine._grammars.compile(ANY_OBJECT).allowed(300)
    assert allowed.shape == (300,)
    assert not allowed[259:].any()
    assert engine._grammars.compile(ANY_OBJECT).allowed(20).shape == (20,)


LOGITS = torch.tensor([[2.0, 1.9, 1.0, 0.0]])


def greedy(count: int = 12, **options) -> list[int]:
    row = Sampling.of(0.0, 1.0, None, **options)
    found = []
    for _ in range(count):
        found += choose_tokens(LOGITS, [row])[0]
        row.take(found[-1])
    return found


def test_penalties_follow_the_formula_of_openai():
    assert greedy(4) == [0, 0, 0, 0]
    # Once for a token, however often it came.
    assert greedy(5, presence_penalty=0.5) == [0, 1, 0, 0, 0]
    # For each time: 2.0, 1.9, 1.5, 1.4, 1.0, 1.0, ...
    assert greedy(5, frequency_penalty=0.5) == [0, 1, 0, 1, 0]
    row = Sampling.of(
        0.0, 1.0, None, presence_penalty=0.3, frequency_penalty=0.2, logit_bias={0: 1.0, 3: -5.0}
    )
    for token in (0, 0, 2):
        row.take(token)
    assert row.changes() == pytest.approx({0: 1.0 - 0.3 - 2 * 0.2, 2: -0.3 - 0.2, 3: -5.0})
    assert greedy(3, presence_penalty=-1.0, logit_bias={2: 1.5}) == [2, 2, 2]


def test_a_bias_bans_or_forces_a_token():
    assert greedy(2, logit_bias={0: -100.0}) == [1, 1]
    assert greedy(2, logit_bias={3: 100.0}) == [3, 3]


def test_penalties_and_biases_depend_on_their_own_request_only(engine):
    draw = random.Random(1)
    options = [
        {},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 2.0},
        {"presence_penalty": -2.0, "frequency_penalty": -1.0},
        {"logit_bias": {70: 5.0, 2: -100.0}},
        {
            "frequency_penalty": 1.0,
            "logit_bias": {65 + n: 3.0 for n in range(20)},
            "temperature": 1.0,
            "seed": 3,
        },
    ]
    question = draw_conversation(draw)
    requests = [Request(question, max_tokens=40, **one) for one in options * 2]
    expected = [answers(engine, [request])[0] for request in requests]
    assert answers(engine, requests) == expected
    assert len(set(expected)) >= 5
    # The prompt does not count, and neither does the answer of another choice.
    listeners = [Listener() for _ in range(2)]
    engine.submit_choices(requests[1], listeners)
    assert [listener.last.finish and listener.text for listener in listeners] == [expected[1]] * 2


def test_a_bias_of_a_token_that_does_not_exist_is_refused(engine):
    listener, _ = submit(engine, Request(conversation("?"), logit_bias={259: 1.0}))
    assert "names token 259; the decoder has the tokens 0 to 258" in str(listener.last.error)
    for options in ({"logit_bias": {1: float("nan")}}, {"presence_penalty": float("inf")}):
        with pytest.raises(InputError, match="expected a finite number"):
            Request(conversation("?"), **options)
