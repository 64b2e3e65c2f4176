"""Questions to a tiny model: accuracy by type, and the baselines, each computed by hand."""

from dataclasses import replace

import pytest
import torch

from bindllm.conversation import Conversation, Message
from bindllm.data.rows import tokenize
from bindllm.errors import InputError
from bindllm.evaluation import task
from bindllm.evaluation.answering import default_batch_size, plan_batches
from bindllm.evaluation.answers import answers_task, longest_answer, majority_answers
from bindllm.evaluation.held_out import conversations_task, evaluate_held_out, held_out_rows
from bindllm.evaluation.task import Task, without_media
from bindllm.media import Media
from bindllm.model.bindllm import BindLLM
from tiny import ColorEncoder, tiny_model, tiny_tokenizer

EYE = torch.eye(16)


def lookup(groups):
    """Image n.png has the n-th unit vector."""
    return torch.stack([EYE[int(group[0].name.split(".")[0])] for group in groups]) if groups else EYE[:0]


def asked(question, answer, image=0, *, type="", subset="", references=None, task="answer", options=()):
    parts = question if image is None else (Media.image(f"{image}.png"), question)
    conversation = Conversation((Message("user", parts), Message("assistant", answer)))
    sample = tokenize(conversation, tiny_tokenizer(), 200)
    return replace(
        sample,
        references=references or (answer,),
        type=type,
        subset=subset,
        task=task,
        options=options,
        name=question,
    )


TRAINING = [
    asked("is it red?", "no", 1, type="yes/no"),
    asked("is it red?", "No.", 2, type="yes/no"),
    asked("is it red?", "yes", 3, type="yes/no"),
    asked("is it blue?", "yes", 1, type="yes/no"),
    asked("is it green?", "yes", 2, type="yes/no"),
    asked("is it grey?", "yes", 2, type="yes/no"),
    asked("which color?", "blue", 1, type="color"),
    asked("Describe it.", "red red red", 1, task="caption"),
]


@pytest.fixture(scope="module")
def model(decoder):
    return tiny_model(decoder, gates=1.0)


@pytest.fixture
def scripted(model, monkeypatch):
    """Make the model answer by a function of question and image; return the sizes and options of its batches."""
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


def evaluate(model, samples, *, train_samples=TRAINING, batch_size=128, **options):
    answers = answers_task(samples, train_samples=train_samples, tokenizer=model.tokenizer, **options)
    return task.evaluate(model, [answers], lookup=lookup, batch_size=batch_size)


@pytest.mark.parametrize(
    ("start", "end", "plan"),
    [
        # Two images, a short and a long question about each: the start is read once for each image ...
        ("is it red or blue or green, or is it another color, such as grey? ", "red?", [[0, 1], [2, 3]]),
        # ... or lengths differ by more than that saves.
        (
            "is ",
            "it red or blue or green, or is it another color, such as grey, do you think?",
            [[0, 2], [1, 3]],
        ),
    ],
)
def test_a_batch_has_equal_lengths_or_equal_media(start, end, plan):
    samples = [asked(start + last, "no", image) for image in (1, 2) for last in ("this?", f"{end} {end}")]
    assert plan_batches(samples, 2) == plan
    # Without media all rows share their start, so only lengths count.
    assert plan_batches(without_media(samples), 2) == [[0, 2], [1, 3]]
    assert plan_batches(samples[:1], 2) == [[0]]
    assert plan_batches([], 2) == []


def test_short_prompts_share_a_batch_up_to_a_number_of_tokens():
    (short,) = samples = [asked("is it red?", "no", 1)]
    assert default_batch_size(samples) == 4096 // short.prompt_length > 32
    samples.append(asked("is it red? " * 13, "no", 1))
    assert samples[1].prompt_length * 32 > 4096
    # Not fewer than 32, however long they are, and no more than 256.
    assert default_batch_size(samples) == 32
    assert default_batch_size([]) == 256


def test_accuracy_by_type_and_of_the_baselines(model, scripted):
    samples = [
        asked("is it red?", "no", 4, type="yes/no"),
        asked("is it red?", "yes", 5, type="yes/no"),
        asked("which color?", "red", 5, type="color"),
        asked("which color?", "blue", 6, type="color", references=("blue", "navy", "blue")),
    ]
    colors = {4: "blue", 5: "red", 6: "navy", None: "blue"}

    def answer(question, shown):
        if question == "which color?":
            return f"  {colors[shown].title()}."
        return "yes" if colors[shown] == "red" else "no"

    scripted(answer)
    result = evaluate(model, samples)
    assert result.metrics["answers"]["model"] == {
        "accuracy": 1.0,
        "by_type": {"color": 1.0, "yes/no": 1.0},
        "count": 4,
        "count_by_type": {"color": 2, "yes/no": 2},
    }
    # Most training rows say that it is not red, and the only training color is blue.
    assert result.metrics["answers"]["majority_answer"]["by_type"] == {"color": 0.5, "yes/no": 0.5}
    assert result.metrics["answers"]["no_media"]["by_type"] == {"color": 0.5, "yes/no": 0.5}
    assert result.metrics["answers"]["shuffled_media"]["accuracy"] < 1
    assert [row["model"] for row in result.rows["answers"]] == ["no", "yes", "Red.", "Navy."]
    assert all(row["right"] for row in result.rows["answers"])
    assert [row["majority_answer"] for row in result.rows["answers"]] == ["no", "no", "blue", "blue"]
    assert result.rows["answers"][3]["references"] == ["blue", "navy"]
    assert (result.rows["answers"][0]["media"], result.rows["answers"][0]["question"]) == (
        "4.png",
        "is it red?",
    )
    assert result.problems == {}


def test_subsets_are_measured_separately(model, scripted):
    rows = [("red", 5, "known"), ("blue", 6, "known"), ("red", 4, "new"), ("blue", 4, "")]
    samples = [asked("which color?", true, n, type="color", subset=subset) for true, n, subset in rows]
    scripted(lambda question, shown: "red" if shown == 5 else "blue")
    result = evaluate(model, samples)
    metrics = result.metrics["answers"]["model"]
    assert metrics["accuracy"] == 0.75
    share = {"accuracy": 1.0, "by_type": {"color": 1.0}, "count": 2, "count_by_type": {"color": 2}}
    one = {"count": 1, "count_by_type": {"color": 1}}
    assert metrics["by_subset"] == {
        "known": share,
        "new": one | {"accuracy": 0.0, "by_type": {"color": 0.0}},
        "other": share | one,
    }
    assert result.metrics["answers"]["no_media"]["by_subset"]["known"]["accuracy"] == 0.5
    assert result.metrics["answers"]["majority_answer"]["by_subset"].keys() == {"known", "new", "other"}
    assert [row["subset"] for row in result.rows["answers"]] == ["known", "known", "new", ""]


def test_answers_equal_generate_and_shuffled_media_are_other_media(model):
    samples = [asked("is it red?", "no", n) for n in (4, 5, 6)]
    result = evaluate(model, samples, max_new_tokens=5, batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ColorEncoder, "prepare", lambda self, media: lookup([(media,)])[0])
        patch.setattr(ColorEncoder, "embed", lambda self, modality, inputs: torch.stack(list(inputs)))
        said = {
            n: model.generate("is it red?", media=[Media.image(f"{n}.png")], max_new_tokens=5)
            for n in (4, 5, 6)
        }
        blind = model.generate("is it red?", max_new_tokens=5)
    assert len(set(said.values())) == 3
    assert [row["model"] for row in result.rows["answers"]] == list(said.values())
    assert {row["no_media"] for row in result.rows["answers"]} == {blind}
    assert sorted(row["shuffled_media"] for row in result.rows["answers"]) == sorted(said.values())
    assert all(row["shuffled_media"] != row["model"] for row in result.rows["answers"])


def test_equal_inputs_are_run_once_and_answers_stay_short(model, scripted):
    batches = scripted(lambda question, shown: "no")
    samples = [asked("is it red?", "no", n % 3) for n in range(12)]
    evaluate(model, samples, batch_size=64)
    # Three images, one question without an image, and three exchanged images.
    assert [size for size, _ in batches] == [3, 1, 3]
    # Two letters, the end token and the margin.
    assert {options["max_new_tokens"] for _, options in batches} == {3 + 4}
    assert all("do_sample" not in options for _, options in batches)


def test_a_fixed_sample_of_questions_is_asked_with_shuffled_media(model, scripted):
    scripted(lambda question, shown: "yes" if shown == 4 else "no")
    samples = [asked(f"is it {n}?", "yes" if n % 2 else "no", 4 + n % 2, type="yes/no") for n in range(10)]
    result = evaluate(model, samples, shuffled_limit=5)
    again = evaluate(model, samples, shuffled_limit=5)
    assert result.rows == again.rows
    drawn = [n for n, row in enumerate(result.rows["answers"]) if row["shuffled_media"] is not None]
    assert len(drawn) == 5 != drawn[-1] + 1
    assert result.metrics["answers"]["shuffled_media"]["count"] == 5
    # The model is always wrong, and exchanged images make it right: 4 for 5 and 5 for 4.
    assert result.metrics["answers"]["model"]["accuracy"] == 0
    assert result.metrics["answers"]["shuffled_media"]["accuracy"] == 1
    assert result.metrics["answers"]["shuffled_media"]["model_accuracy"] == 0
    assert evaluate(model, samples, shuffled_limit=50).metrics["answers"]["shuffled_media"]["count"] == 10


def test_questions_without_media_are_measured_only_for_the_model(model, scripted):
    scripted(lambda question, shown: "yes" if shown == 4 else "no")
    samples = [
        asked("is it red?", "yes", 4),
        asked("is it red?", "no", 5),
        asked("two and two?", "four", None),
    ]
    result = evaluate(model, samples)
    assert result.metrics["answers"]["model"]["count"] == 3
    assert result.metrics["answers"]["model"]["by_type"] == {}
    assert result.metrics["answers"]["model"]["accuracy"] == pytest.approx(2 / 3)
    for name in ("shuffled_media", "no_media"):
        assert result.metrics["answers"][name]["count"] == 2
        assert result.metrics["answers"][name]["model_accuracy"] == 1
    assert result.rows["answers"][2]["media"] is None
    assert result.rows["answers"][2]["no_media"] is None
    alone = evaluate(model, samples[2:])
    assert alone.metrics["answers"]["shuffled_media"] == {
        "accuracy": None,
        "by_type": {},
        "count": 0,
        "count_by_type": {},
    }
    assert alone.problems == {}


def test_multiple_choice_counts_the_letter(model, scripted):
    scripted(lambda question, shown: "I think that the answer is B" if shown == 4 else "(A)")
    options, true = ("a rose", "the sea"), "The answer is (B)."
    samples = [asked("which?", true, n, options=options) for n in (4, 5)]
    result = evaluate(model, samples)
    assert [row["right"] for row in result.rows["answers"]] == [True, False]


def test_the_most_frequent_answer_falls_back_to_the_type_and_then_to_all():
    samples = [
        asked("IS IT RED?", "x"),
        asked("is it black?", "x", type="yes/no"),
        asked("what is it?", "x", type="shape"),
    ]
    assert [answer.text for answer in majority_answers(samples, TRAINING)] == ["no", "yes", "yes"]


def test_wanted_answers_of_preferences_are_training_answers():
    rows = [asked("is it red?", answer, 1, task="chat") for answer in ("no", "yes", "yes")]
    wanted = [
        replace(rows[0], rejected=rows[1]),
        replace(rows[1], desirable=False),
        replace(rows[2], desirable=False),
    ]
    assert [answer.text for answer in majority_answers(rows[:1], wanted)] == ["no"]
    with pytest.raises(InputError, match="no training answers"):
        majority_answers(rows[:1], rows)


def test_missing_training_answers_are_reported_as_a_problem(model, scripted):
    scripted(lambda question, shown: "no")
    result = evaluate(model, [asked("is it red?", "no", 4), asked("is it red?", "yes", 5)], train_samples=[])
    assert "no training answers" in result.problems["answers: majority_answer"]
    assert result.metrics["answers"]["majority_answer"]["accuracy"] is None
    assert result.metrics["answers"]["model"]["accuracy"] == 0.5


def test_one_image_cannot_be_exchanged(model, scripted):
    scripted(lambda question, shown: "no")
    result = evaluate(model, [asked("is it red?", "no", 4), asked("is it blue?", "no", 4)])
    assert "all held-out media are the same" in result.problems["answers: shuffled_media"]
    assert result.metrics["answers"]["shuffled_media"]["accuracy"] is None
    assert result.metrics["answers"]["no_media"]["accuracy"] == 1


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


def conversations(model, samples):
    result = task.evaluate(model, [conversations_task(samples)], lookup=lookup)
    assert (result.problems, result.rows) == ({}, {})
    return result.metrics["conversations"]


def test_conversations_are_measured_by_their_loss(model):
    samples = [asked("hello", "good day", None, task="chat"), asked("look", "a cat", 4, task="chat")]
    metrics = conversations(model, [*samples, asked("look", "a dog", 5, task="chat")])
    assert metrics["model"]["count"] == 3
    assert metrics["model"]["with_media"] == 2
    losses = [metrics[name]["loss"] for name in ("model", "no_media", "shuffled_media")]
    assert len(set(losses)) == 3
    text = conversations(model, samples[:1])
    assert text["model"]["loss"] > 0
    assert text["no_media"] == text["shuffled_media"] == {"loss": None, "perplexity": None}


def test_unwanted_answers_are_counted_and_their_loss_is_not(model):
    wanted = [asked("look", "a cat", n, task="chat") for n in (4, 5)]
    unwanted = replace(asked("look", "a dog", 6, task="chat"), desirable=False)
    both, alone = conversations(model, [*wanted, unwanted]), conversations(model, wanted)
    assert both["model"].pop("unwanted") == 1
    assert both == alone
    with pytest.raises(InputError, match="all 1 held-out answers are unwanted"):
        conversations_task([unwanted])
    with pytest.raises(InputError, match="no held-out conversations"):
        conversations_task([])


def test_each_task_is_measured_on_its_own_rows(model):
    rows = [asked("is it red?", answer, n) for n, answer in ((4, "no"), (5, "yes"))]
    rows += [asked("Say.", "a cat", n, task="chat") for n in (6, 7)]
    held_out = held_out_rows({"test": rows, "validation": rows[:1]}.__getitem__)
    assert held_out == {"answers": rows[:2], "conversations": rows[2:]}
    assert held_out_rows({"test": [], "validation": rows[:1]}.__getitem__) == {"answers": rows[:1]}
    assert held_out_rows({"test": [], "validation": []}.__getitem__) == {}
    both = evaluate_held_out(model, held_out, train_samples=[], lookup=lookup)
    assert both.metrics.keys() == {"answers", "conversations"}
    assert both.metrics["answers"]["model"]["count"] == 2
    assert both.metrics["conversations"]["model"]["count"] == 2
    assert list(both.problems) == ["answers: majority_answer"]
    assert {name: len(rows) for name, rows in both.rows.items()} == {"answers": 2}
    one = {"conversations": held_out["conversations"]}
    one = evaluate_held_out(model, one, train_samples=[], lookup=lookup)
    assert one.metrics == {"conversations": both.metrics["conversations"]}
    held_out["captions"] = [asked("Say.", "a cat", None, task="caption")]
    several = evaluate_held_out(model, held_out, train_samples=[], lookup=lookup)
    assert "captions" not in several.metrics
    assert "has media" in several.problems["captions"]
    with pytest.raises(InputError, match="has media"):
        evaluate_held_out(model, {"captions": held_out["captions"]}, train_samples=[], lookup=lookup)


def test_a_custom_task_needs_items_and_a_metric(model, scripted):
    scripted(lambda question, shown: "four" if question == "two and two?" else "no")

    def shortness(items, answers):
        return {"letters": sum(map(len, answers)) / len(answers) if items else None}

    items = [asked("two and two?", "four", None), asked("is it red?", "no", 4), asked("is it red?", "no", 5)]
    result = task.evaluate(model, [Task("shortness", items, shortness)], lookup=lookup)
    assert result.metrics["shortness"] == {
        "model": {"letters": 8 / 3},
        "no_media": {"letters": 2},
        "shuffled_media": {"letters": 2},
    }
    failing = Task("failing", items, lambda items, answers: {"x": None} if not items else 1 / 0)
    result = task.evaluate(model, [failing], lookup=lookup)
    assert result.metrics["failing"] == {name: {"x": None} for name in failing.variants}
    assert "division by zero" in result.problems["failing: model metrics"]
