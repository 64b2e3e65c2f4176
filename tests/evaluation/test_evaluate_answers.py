"""Held-out questions of a tiny model: right answers by type, and what needs no looking, each worked out by hand."""

from dataclasses import replace

import pytest
import torch

from bindllm.conversation import Conversation, Message
from bindllm.data.rows import tokenize
from bindllm.errors import InputError
from bindllm.evaluation.answers import evaluate_answers, frequent_answers, longest_answer
from bindllm.evaluation.chat import evaluate_chat
from bindllm.evaluation.tasks import evaluate_held_out, held_out_rows
from bindllm.media import Media
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import DecoderConfig
from tiny import ColourEncoder, tiny_decoder, tiny_tokenizer

EYE = torch.eye(16)


def lookup(groups):
    """Picture n.png has the n-th unit vector."""
    return torch.stack([EYE[int(group[0].name.split(".")[0])] for group in groups]) if groups else EYE[:0]


def asked(question, answer, picture=0, *, type="", references=None, task="answer", options=()):
    parts = question if picture is None else (Media.image(f"{picture}.png"), question)
    conversation = Conversation((Message("user", parts), Message("assistant", answer)))
    sample = tokenize(conversation, tiny_tokenizer(), 200)
    return replace(
        sample, references=references or (answer,), type=type, task=task, options=options, name=question
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built = BindLLM(tiny_decoder(), tiny_tokenizer(), DecoderConfig("tiny"), encoders=[ColourEncoder()])
    with torch.no_grad():
        built.injection.gates.normal_(0, 1)
    return built


TRAINING = [
    asked("is it red?", "no", 1, type="yes/no"),
    asked("is it red?", "No.", 2, type="yes/no"),
    asked("is it red?", "yes", 3, type="yes/no"),
    asked("is it blue?", "yes", 1, type="yes/no"),
    asked("is it green?", "yes", 2, type="yes/no"),
    asked("is it grey?", "yes", 2, type="yes/no"),
    asked("which colour?", "blue", 1, type="colour"),
    asked("Describe it.", "red red red", 1, task="caption"),
]


@pytest.fixture
def scripted(model, monkeypatch):
    """Make the model say what a function of the pictures that a batch shows says; return the prompts it was asked."""
    batches = []

    def script(answer):
        def generate_from(self, input_ids, attention_mask, media_index, embeddings, **options):
            batches.append((len(input_ids), options))
            texts = []
            for row, index, vectors in zip(input_ids, media_index, embeddings, strict=True):
                prompt = self.tokenizer.decode(row, skip_special_tokens=True)
                shown = int(vectors[0].argmax()) if index[-1] >= 0 else None
                texts.append(answer(prompt.split("\n")[1], shown))
            return self.tokenizer(texts, padding=True, return_tensors="pt").input_ids

        monkeypatch.setattr(BindLLM, "generate_from", generate_from)
        return batches

    return script


def evaluate(model, samples, **changes):
    return evaluate_answers(model, samples, **{"train_samples": TRAINING, "lookup": lookup, **changes})


def test_accuracy_by_type_beside_what_needs_no_looking(model, scripted):
    samples = [
        asked("is it red?", "no", 4, type="yes/no"),
        asked("is it red?", "yes", 5, type="yes/no"),
        asked("which colour?", "red", 5, type="colour"),
        asked("which colour?", "blue", 6, type="colour", references=("blue", "navy", "blue")),
    ]
    colours = {4: "blue", 5: "red", 6: "navy", None: "blue"}

    def answer(question, shown):
        if question == "which colour?":
            return f"  {colours[shown].title()}."
        return "yes" if colours[shown] == "red" else "no"

    scripted(answer)
    result = evaluate(model, samples)
    assert result.metrics["test"] == {
        "accuracy": 1.0,
        "by_type": {"colour": 1.0, "yes/no": 1.0},
        "count": 4,
        "count_by_type": {"colour": 2, "yes/no": 2},
    }
    # Most training rows say that it is not red, and the only training colour is blue.
    assert result.metrics["question_only"]["by_type"] == {"colour": 0.5, "yes/no": 0.5}
    assert result.metrics["blind"]["by_type"] == {"colour": 0.5, "yes/no": 0.5}
    assert result.metrics["shuffled"]["accuracy"] < 1
    assert [row.generated for row in result.rows] == ["no", "yes", "Red.", "Navy."]
    assert all(row.right for row in result.rows)
    assert [row.question_only for row in result.rows] == ["no", "no", "blue", "blue"]
    assert result.rows[3].references == ["blue", "navy"]
    assert (result.rows[0].picture, result.rows[0].question) == ("4.png", "is it red?")
    assert result.problems == {}


def test_answers_are_those_of_generate_and_a_wrong_picture_is_another_one(model):
    samples = [asked("is it red?", "no", n) for n in (4, 5, 6)]
    result = evaluate(model, samples, max_new_tokens=5, batch_size=2)
    encode = {Media.image(f"{n}.png"): EYE[n] for n in range(16)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            BindLLM, "encode", lambda self, groups, **_: torch.stack([encode[g[0]] for g in groups])
        )
        said = {
            n: model.generate("is it red?", media=[Media.image(f"{n}.png")], max_new_tokens=5)
            for n in (4, 5, 6)
        }
        blind = model.generate("is it red?", max_new_tokens=5)
    assert len(set(said.values())) == 3
    assert [row.generated for row in result.rows] == list(said.values())
    assert {row.blind for row in result.rows} == {blind}
    assert sorted(row.shuffled for row in result.rows) == sorted(said.values())
    assert all(row.shuffled != row.generated for row in result.rows)


def test_equal_inputs_are_run_once_and_answers_stay_short(model, scripted):
    batches = scripted(lambda question, shown: "no")
    samples = [asked("is it red?", "no", n % 3) for n in range(12)]
    evaluate(model, samples, batch_size=64)
    # Three pictures, three exchanged ones, and one question without a picture.
    assert [size for size, _ in batches] == [3, 3, 1]
    # Two letters, the end token and the margin.
    assert {options["max_new_tokens"] for _, options in batches} == {3 + 4}
    assert all(options["do_sample"] is False for _, options in batches)


def test_a_fixed_sample_of_questions_is_asked_about_wrong_pictures(model, scripted):
    scripted(lambda question, shown: "yes" if shown == 4 else "no")
    samples = [asked(f"is it {n}?", "yes" if n % 2 else "no", 4 + n % 2, type="yes/no") for n in range(10)]
    result = evaluate(model, samples, shuffled_limit=5)
    again = evaluate(model, samples, shuffled_limit=5)
    assert result.answers() == again.answers()
    drawn = [n for n, row in enumerate(result.rows) if row.shuffled is not None]
    assert len(drawn) == 5 != drawn[-1] + 1
    assert result.metrics["shuffled"]["count"] == 5
    # It is always wrong, and wrong pictures make it right: 4 for 5 and 5 for 4.
    assert result.metrics["test"]["accuracy"] == 0
    assert result.metrics["shuffled"]["accuracy"] == 1
    assert result.metrics["shuffled"]["model_accuracy"] == 0
    assert evaluate(model, samples, shuffled_limit=50).metrics["shuffled"]["count"] == 10


def test_questions_without_pictures_count_in_the_test_alone(model, scripted):
    scripted(lambda question, shown: "yes" if shown == 4 else "no")
    samples = [
        asked("is it red?", "yes", 4),
        asked("is it red?", "no", 5),
        asked("two and two?", "four", None),
    ]
    result = evaluate(model, samples)
    assert result.metrics["test"]["count"] == 3
    assert result.metrics["test"]["by_type"] == {}
    assert result.metrics["test"]["accuracy"] == pytest.approx(2 / 3)
    for name in ("shuffled", "blind"):
        assert result.metrics[name]["count"] == 2
        assert result.metrics[name]["model_accuracy"] == 1
    assert result.rows[2].picture is None
    assert result.rows[2].blind is None
    alone = evaluate(model, samples[2:])
    assert alone.metrics["shuffled"] == {"accuracy": None, "by_type": {}, "count": 0, "count_by_type": {}}
    assert alone.problems == {}


def test_multiple_choice_counts_the_letter(model, scripted):
    scripted(lambda question, shown: "I think that the answer is B" if shown == 4 else "(A)")
    options, true = ("a rose", "the sea"), "The answer is (B)."
    samples = [asked("which?", true, n, options=options) for n in (4, 5)]
    result = evaluate(model, samples)
    assert [row.right for row in result.rows] == [True, False]


def test_the_most_frequent_answer_falls_back_to_the_type_and_then_to_all():
    samples = [
        asked("IS IT RED?", "x"),
        asked("is it black?", "x", type="yes/no"),
        asked("what is it?", "x", type="shape"),
    ]
    assert frequent_answers(samples, TRAINING) == ["no", "yes", "yes"]


def test_wanted_answers_of_preferences_are_training_answers():
    rows = [asked("is it red?", answer, 1, task="chat") for answer in ("no", "yes", "yes")]
    wanted = [
        replace(rows[0], rejected=rows[1]),
        replace(rows[1], desirable=False),
        replace(rows[2], desirable=False),
    ]
    assert frequent_answers(rows[:1], wanted) == ["no"]
    with pytest.raises(InputError, match="no training answers"):
        frequent_answers(rows[:1], rows)


def test_answers_that_no_training_row_has_are_a_problem_and_not_the_end(model, scripted):
    scripted(lambda question, shown: "no")
    result = evaluate(model, [asked("is it red?", "no", 4), asked("is it red?", "yes", 5)], train_samples=[])
    assert "no training answers" in result.problems["question_only answers"]
    assert result.metrics["question_only"]["accuracy"] is None
    assert result.metrics["test"]["accuracy"] == 0.5


def test_one_picture_cannot_be_exchanged(model, scripted):
    scripted(lambda question, shown: "no")
    result = evaluate(model, [asked("is it red?", "no", 4), asked("is it blue?", "no", 4)])
    assert "all held-out pictures are the same" in result.problems["shuffled answers"]
    assert result.metrics["shuffled"]["accuracy"] is None
    assert result.metrics["blind"]["accuracy"] == 1


def test_rows_without_a_true_answer_are_refused(model):
    with pytest.raises(InputError, match="no held-out questions"):
        evaluate(model, [])
    with pytest.raises(InputError, match="1 held-out questions have no true answer: which"):
        evaluate(model, [replace(asked("which?", "a", 1), references=())])


def test_the_longest_answer_leaves_room_for_a_lettered_one():
    tokenizer = tiny_tokenizer()
    assert (
        longest_answer([asked("a?", "yes"), asked("b?", "no", references=("no", "indeed"))], tokenizer) == 11
    )
    assert longest_answer([asked("a?", "B", options=("x", "y"))], tokenizer) == 20
    assert longest_answer([asked("a?", "word " * 10, references=("B",))], tokenizer) == 55


def test_conversations_are_measured_by_their_loss(model):
    samples = [asked("hello", "good day", None, task="chat"), asked("look", "a cat", 4, task="chat")]
    result = evaluate_chat(model, [*samples, asked("look", "a dog", 5, task="chat")], lookup=lookup)
    assert result.metrics["heldout"]["count"] == 3
    assert result.metrics["heldout"]["with_media"] == 2
    losses = [result.metrics[name]["loss"] for name in ("heldout", "zero_gates", "shuffled")]
    assert len(set(losses)) == 3
    text = evaluate_chat(model, samples[:1], lookup=lookup)
    assert text.metrics["heldout"]["loss"] > 0
    assert text.metrics["zero_gates"] == {"loss": None, "perplexity": None}
    assert text.problems == {}


def test_unwanted_answers_are_counted_and_their_loss_is_not(model):
    wanted = [asked("look", "a cat", n, task="chat") for n in (4, 5)]
    unwanted = replace(asked("look", "a dog", 6, task="chat"), desirable=False)
    both = evaluate_chat(model, [*wanted, unwanted], lookup=lookup).metrics
    alone = evaluate_chat(model, wanted, lookup=lookup).metrics
    assert both["heldout"].pop("unwanted") == 1
    assert both == alone
    with pytest.raises(InputError, match="all 1 held-out answers are unwanted"):
        evaluate_chat(model, [unwanted], lookup=lookup)


def test_each_kind_is_measured_on_its_own_rows(model):
    rows = [asked("is it red?", answer, n) for n, answer in ((4, "no"), (5, "yes"))]
    rows += [asked("Say.", "a cat", n, task="chat") for n in (6, 7)]
    held_out = held_out_rows({"test": rows, "validation": rows[:1]}.__getitem__)
    assert held_out == {"answers": rows[:2], "chat": rows[2:]}
    assert held_out_rows({"test": [], "validation": rows[:1]}.__getitem__) == {"answers": rows[:1]}
    assert held_out_rows({"test": [], "validation": []}.__getitem__) == {}
    both = evaluate_held_out(model, held_out, train_samples=[], lookup=lookup)
    assert both.metrics.keys() == {"answers", "chat"}
    assert both.metrics["answers"]["test"]["count"] == 2
    assert both.metrics["chat"]["heldout"]["count"] == 2
    assert list(both.problems) == ["answers: question_only answers"]
    assert len(both.answers) == 2
    one = evaluate_held_out(model, {"chat": held_out["chat"]}, train_samples=[], lookup=lookup)
    assert one.metrics == both.metrics["chat"]
    held_out["captions"] = [asked("Say.", "a cat", None, task="caption")]
    several = evaluate_held_out(model, held_out, train_samples=[], lookup=lookup)
    assert "captions" not in several.metrics
    assert "has media" in several.problems["captions"]
    with pytest.raises(InputError, match="has media"):
        evaluate_held_out(model, {"captions": held_out["captions"]}, train_samples=[], lookup=lookup)
