"""Bag-of-words pretraining: the bind network learns words, and nothing else of the model changes."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from bindllm.conversation import Conversation, Message
from bindllm.data.datamodule import BindData
from bindllm.data.rows import Row, make_sample
from bindllm.data.sources import SourceConfig
from bindllm.errors import InputError
from bindllm.media import Media
from bindllm.model.bind_network import BindConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import DecoderConfig
from bindllm.model.injection import InjectConfig
from bindllm.training import bag_of_words
from bindllm.training.bag_of_words import pretrain_bind, words_of_groups
from bindllm.training.module import BindModule
from bindllm.training.optim import OptimConfig
from tiny import ColorEncoder, TokenEncoder, color_images
from tiny_run import run, run_and_die, tiny_recipe

OPTIM = OptimConfig(lr=0.02)


@pytest.fixture
def build(parts, tmp_path):
    """Return a function that builds an untrained model and the data of colored squares."""

    def make(folder=parts / "pictures", *, tokens=1):
        torch.manual_seed(0)
        inject = InjectConfig({1: "value", 4: "attend", "all": "cross"}[tokens])
        bind = BindConfig(depth=1, tokens=tokens)
        decoder = DecoderConfig(str(parts / "decoder"), dtype="float32")
        model = BindLLM.build(decoder, device="cpu", encoders=[TokenEncoder()], bind=bind, inject=inject)
        data = BindData([SourceConfig(str(folder))], str(tmp_path / "store"))
        data.tokenizer, data.encoders = model.tokenizer, model.encoders
        data.token_modalities = [] if tokens == 1 else ["image"]
        return model, data

    return make


def test_words_belong_to_the_media_that_their_tokens_listen_to(build):
    model, _ = build()
    red, blue = Media.image("red.png"), Media.image("blue.png")
    turns = [("user", [red, "What?"]), ("assistant", "red"), ("user", [blue, "And?"]), ("assistant", "blue")]
    row = Row(Conversation(tuple(Message(*turn) for turn in turns)), ("blue",), name="both")
    again = Row(Conversation((Message(*turns[0]), Message("assistant", "square"))), ("square",), name="again")
    samples = [make_sample(each, model.tokenizer, 128) for each in (row, again)]
    found = words_of_groups(samples, captions_only=False)
    # The tiny tokenizer has a token for each letter.
    letters = {
        key: {model.tokenizer.decode([word]).strip() for word in words} for key, words in found.items()
    }
    end = model.tokenizer.eos_token
    assert letters == {(red,): {*"redsquare", end}, (blue,): {*"blue", end}}


def test_unwanted_answers_and_media_without_a_learned_answer_teach_nothing(build):
    model, _ = build()
    red, blue = Media.image("red.png"), Media.image("blue.png")
    question, shot = Message("user", [red, "What?"]), Message("user", [blue, "What?"])
    rows = [
        Row(Conversation((question, Message("assistant", "a cat"))), (), name="bad", desirable=False),
        Row(
            Conversation((shot, Message("assistant", "blue"), question, Message("assistant", "red"))),
            ("red",),
            name="shots",
            query_only=True,
        ),
    ]
    found = words_of_groups([make_sample(row, model.tokenizer, 128) for row in rows], captions_only=False)
    assert found.keys() == {(red,)}
    assert len(found[(red,)]) == len({*"red"}) + 1


def test_answers_to_questions_may_be_left_out(build):
    model, _ = build()
    red, blue = Media.image("red.png"), Media.image("blue.png")
    caption, question = (
        Row(Conversation((Message("user", [image, "?"]), Message("assistant", text))), (), text, task=task)
        for image, text, task in ((red, "a cat", "caption"), (blue, "yes", "answer"))
    )
    caption, question = (make_sample(row, model.tokenizer, 128) for row in (caption, question))
    assert words_of_groups([caption, question], captions_only=True).keys() == {(red,)}
    assert words_of_groups([caption, question], captions_only=False).keys() == {(red,), (blue,)}


@pytest.mark.parametrize("has_captions", [True, False])
def test_only_captions_are_learned_if_the_training_rows_have_any(has_captions, build, monkeypatch):
    model, data = build()
    given = {
        split: [replace(row, task="answer") for row in data.samples(split)]
        for split in ("train", "validation")
    }
    if has_captions:
        given["train"][1:] = data.samples("train")[1:]
    found = []

    def words(rows, **options):
        found.append((len(rows), options))
        return words_of_groups(rows, **options)

    monkeypatch.setattr(data, "samples", given.__getitem__)
    monkeypatch.setattr(bag_of_words, "words_of_groups", words)
    pretrain_bind(model, data, 1, OPTIM)
    # The held-out rows are treated alike, whatever they are.
    assert found == [(len(rows), {"captions_only": has_captions}) for rows in given.values()]


@pytest.mark.parametrize(("tokens", "passes"), [(1, 12), (4, 12), ("all", 40)])
def test_bind_tokens_name_the_words_and_only_the_bind_network_changes(tokens, passes, build, capsys):
    model, data = build(tokens=tokens)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pretrain_bind(model, data, passes, OPTIM)
    after = model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"bind"}
    # Gates are zero: with an image the answer is still that of the plain decoder.
    image = next(iter(data.samples("train"))).media[0]
    prompt = "Describe this image."
    assert model.generate(prompt, list(image)) == model.generate(prompt)
    named = [int(share) for share in re.findall(r"names (\d+)%", capsys.readouterr().out)]
    assert len(named) == passes
    assert named[-1] == 100


@pytest.mark.parametrize("tokens", [1, "all"])
def test_words_are_those_that_the_kind_of_injection_needs(tokens, build, monkeypatch):
    """Of a decoder whose output embeddings are not those of its input."""
    model, data = build(tokens=tokens)
    assert not torch.equal(model.decoder.lm_head.weight, model.decoder.model.embed_tokens.weight)
    seen = []
    own = bag_of_words.BagOfWords
    monkeypatch.setattr(bag_of_words, "BagOfWords", lambda *args: seen.append(own(*args)) or seen[-1])
    pretrain_bind(model, data, 1, OPTIM)
    source = model.decoder.model.embed_tokens if tokens == 1 else model.decoder.lm_head
    expected = torch.nn.functional.normalize(source.weight[[*seen[0].weights]], dim=-1)
    assert torch.equal(seen[0].table, expected)


def test_it_names_nothing_if_captions_do_not_belong_to_their_images(build, tmp_path, capsys):
    folder = color_images(tmp_path / "shuffled", per_color=7)
    lines = (folder / "captions.jsonl").read_text().splitlines()
    captions = [re.search(r'"caption": "(.*?)"', line)[1] for line in lines]
    shuffled = np.random.default_rng(3).permutation(captions)
    (folder / "captions.jsonl").write_text(
        "\n".join(
            line.replace(own, other) for line, own, other in zip(lines, captions, shuffled, strict=True)
        )
    )
    model, data = build(folder)
    pretrain_bind(model, data, 12, OPTIM)
    assert int(re.findall(r"names (\d+)%", capsys.readouterr().out)[-1]) < 80


def test_rows_with_the_same_words_are_refused(build, tmp_path):
    folder = color_images(tmp_path / "same")
    table = folder / "captions.jsonl"
    table.write_text(re.sub(r"\w+ square", "a square", table.read_text()))
    model, data = build(folder)
    with pytest.raises(InputError, match=r"different answers, and these rows have none.*bag_of_words: 0"):
        pretrain_bind(model, data, 1, OPTIM)


@pytest.mark.parametrize(
    "options", [{"bag_of_words": -1}, {"init_from": "elsewhere"}, {"trainable": ["inject"]}], ids=str
)
def test_settings_that_do_not_fit_are_refused(options, parts):
    with pytest.raises(InputError, match=r"bag_of_words is"):
        BindModule(
            DecoderConfig(str(parts / "decoder")),
            [ColorEncoder()],
            BindConfig(),
            InjectConfig(),
            OptimConfig(),
            **{"bag_of_words": 2, **options},
        )


def test_a_run_pretrains_once_also_if_it_is_interrupted(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = tiny_recipe(parts, model={"bag_of_words": 3})
    run_and_die(recipe, monkeypatch, at=8)
    assert capsys.readouterr().out.count("bag of words  epoch") == 3
    assert run("fit", recipe) == 0
    assert "bag of words" not in capsys.readouterr().out
