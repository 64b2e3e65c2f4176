"""Retrieved context: records become context tokens, read through gates of their own."""

import dataclasses

import pytest
import torch

from bindllm import BindLLM
from bindllm.conversation import Conversation, Message
from bindllm.embeddings.datastore import Datastore, Record
from bindllm.errors import DecoderError, InputError, StoreError
from bindllm.media import Media
from bindllm.model.bind_network import BindConfig
from bindllm.model.context import NO_TOKEN, ContextConfig, ContextPerceivers, ContextWords
from bindllm.model.context.draws import draw_records
from bindllm.model.context.records import RecordReader, find_records
from bindllm.model.injection import InjectConfig
from bindllm.model.injection.attend import BindAttention
from tiny import ColorEncoder, TokenEncoder, color_images, tiny_batch, tiny_model

CONTEXT = ContextConfig(records=3, latents=2, width=16, text_length=6)
WORDS = dataclasses.replace(CONTEXT, latents="all")


def unit(*shape, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def records(batch=2, count=3, length=4, seed=5):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 200, (batch, 1, count, length), generator=generator)
    scores = torch.randn(batch, 1, count, generator=generator)
    return {
        "context_embeddings": unit(batch, 1, count, 16, seed=seed),
        "context_scores": scores,
        "context_ids": ids,
    }


def context_model(decoder, *, context_gates=0.0, context=CONTEXT, **parts):
    model = tiny_model(decoder, context=context, **parts)
    torch.manual_seed(1)
    if context_gates:
        for name, parameter in model.injection.named_parameters():
            # The queries of kind cross start at zero as well.
            if name in ("context_gates", "context_reader.query"):
                torch.nn.init.normal_(parameter, std=context_gates)
        if isinstance(model.context, ContextWords):
            torch.nn.init.normal_(model.context.position)
    return model


KINDS = {
    "value": {"inject": InjectConfig(kind="value")},
    "attend": {"inject": InjectConfig(kind="attend")},
    "tokens": {
        "inject": InjectConfig(kind="attend", layers=2),
        "bind": BindConfig(depth=1, expansion=2, tokens=4),
        "encoders": [TokenEncoder()],
    },
    "cross": {"inject": InjectConfig(kind="cross", layers=2)},
    "words": {
        "inject": InjectConfig(kind="cross"),
        "bind": BindConfig(depth=1, expansion=2, tokens="all"),
        "encoders": [TokenEncoder()],
        "context": WORDS,
    },
    "attended words": {"inject": InjectConfig(kind="attend"), "context": WORDS},
}


@pytest.fixture(params=KINDS)
def parts(request):
    return KINDS[request.param]


def bind_tokens(parts):
    return {"tokens": torch.randn(2, 1, 9, 8)} if "bind" in parts else {}


@torch.no_grad()
def test_closed_gates_equal_the_model_without_context_bit_for_bit(decoder, parts):
    batch = tiny_batch(**bind_tokens(parts))
    model = context_model(decoder, **parts)
    plain = tiny_model(decoder, **parts)
    plain.load_trainable_state({name: model.trainable_state()[name] for name in plain.trainable_state()})
    expected = plain(**batch).logits
    assert torch.equal(model(**batch, **records()).logits, expected)
    assert torch.equal(model(**batch).logits, expected)


@torch.no_grad()
def test_without_records_open_gates_change_nothing(decoder, parts):
    batch = tiny_batch(**bind_tokens(parts))
    model = context_model(decoder, context_gates=2.0, **parts)
    without = model(**batch).logits
    with_records = model(**batch, **records()).logits
    assert not torch.allclose(without, with_records)
    # A group whose records are all absent is a group without records.
    absent = {**records(), "context_embeddings": torch.zeros(2, 1, 3, 16)}
    assert torch.equal(model(**batch, **absent).logits, without)
    model.injection.context_gates.zero_()
    assert torch.equal(model(**batch).logits, without)


@torch.no_grad()
def test_a_token_without_media_reads_no_context(decoder, parts):
    model = context_model(decoder, context_gates=2.0, **parts)
    batch = tiny_batch(**bind_tokens(parts))
    batch["media_index"] = -torch.ones_like(batch["media_index"])
    assert torch.equal(model(**batch, **records()).logits, model(**batch).logits)


@torch.no_grad()
def test_padding_of_records_and_texts_is_masked(decoder, parts):
    model = context_model(decoder, context_gates=2.0, **parts)
    batch = tiny_batch(**bind_tokens(parts))
    given = records(count=2, length=3)
    padded = {
        "context_embeddings": torch.cat([given["context_embeddings"], torch.zeros(2, 1, 2, 16)], 2),
        "context_scores": torch.cat([given["context_scores"], torch.ones(2, 1, 2)], 2),
        "context_ids": torch.full((2, 1, 4, 7), 9),
    }
    padded["context_ids"][:, :, :2] = NO_TOKEN
    padded["context_ids"][:, :, :2, :3] = given["context_ids"]
    torch.testing.assert_close(model(**batch, **padded).logits, model(**batch, **given).logits)


@torch.no_grad()
def test_rows_of_a_batch_equal_single_rows(decoder, parts):
    model = context_model(decoder, context_gates=2.0, **parts)
    batch, given = tiny_batch(**bind_tokens(parts)), records()
    # Row 0 has one record, row 1 has none.
    given["context_embeddings"][0, 0, 1:] = 0
    given["context_embeddings"][1] = 0
    together = model(**batch, **given).logits
    for row in range(2):
        one = {name: value[row : row + 1] for name, value in {**batch, **given}.items()}
        torch.testing.assert_close(model(**one).logits, together[row : row + 1])
    alone = {name: value[1:] for name, value in batch.items()}
    torch.testing.assert_close(model(**alone).logits, together[1:])


@torch.no_grad()
def test_answers_with_a_cache_are_those_of_whole_forwards(decoder, parts):
    """A step sees one token only, and context tokens must be read as if it saw all of them."""
    model = context_model(decoder, context_gates=2.0, **parts)
    batch, given = tiny_batch(**bind_tokens(parts)), records()
    answers = model.generate_from(**batch, **given, max_new_tokens=6, do_sample=False)
    prompt = batch["input_ids"].shape[1]
    for _ in range(answers.shape[1]):
        chosen = model(**batch, **given).logits[:, -1].argmax(-1, keepdim=True)
        same = {"media_index": batch["media_index"][:, -1:], "attention_mask": torch.ones_like(chosen)}
        for name, more in {"input_ids": chosen, **same}.items():
            batch[name] = torch.cat([batch[name], more], 1)
    for answer, expected in zip(answers.tolist(), batch["input_ids"][:, prompt:].tolist(), strict=True):
        ends = [n for n, token in enumerate(answer) if token != expected[n]]
        # Padding after the end of an answer is the only difference.
        assert not ends or answer[ends[0] - 1] == model.tokenizer.eos_token_id


@torch.no_grad()
def test_the_order_of_records_does_not_matter_but_that_of_words_does(decoder, parts):
    model = context_model(decoder, context_gates=2.0, **parts)
    batch, given = tiny_batch(**bind_tokens(parts)), records()
    expected = model(**batch, **given).logits
    turned = {name: value.flip(2) for name, value in given.items()}
    torch.testing.assert_close(model(**batch, **turned).logits, expected, rtol=1e-4, atol=1e-4)
    words = {**given, "context_ids": given["context_ids"].flip(3)}
    assert not torch.allclose(model(**batch, **words).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("network", [ContextPerceivers(16, 32, CONTEXT), ContextWords(32, WORDS)])
def test_the_score_of_a_record_is_read(network):
    network.eval()
    torch.nn.init.normal_(network.score)
    given, words = unit(1, 1, 3, 16), torch.randn(1, 1, 3, 4, 32)
    present = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    found = [network(given, torch.full((1, 1, 3), score), present, words) for score in (0.0, 4.0)]
    assert found[0].shape == (1, 1, 4 if isinstance(network, ContextPerceivers) else 12, 32)
    assert not torch.allclose(*found)


@torch.no_grad()
def test_a_record_without_text_has_media_tokens_only():
    ids = torch.full((1, 1, 2, 1), NO_TOKEN)
    inputs = unit(1, 1, 16), unit(1, 1, 2, 16), torch.ones(1, 1, 2), ids, torch.nn.Embedding(9, 32)
    found = ContextPerceivers(16, 32, CONTEXT).eval().read(*inputs)
    assert found.any(-1).tolist() == [[[True, True, False, False]]]
    assert not ContextWords(32, WORDS).eval().read(*inputs).any()


@torch.no_grad()
def test_a_context_token_of_kind_cross_makes_its_word_more_likely(decoder):
    """An untrained model with an open gate copies: a token that attends to a word adds its output embedding."""
    model = context_model(decoder, context=WORDS, inject=InjectConfig(kind="cross"))
    batch, given = tiny_batch(), records(count=1, length=1)
    before = model(**batch, **given).logits
    model.injection.context_gates[-1] = 0.05
    gained = (model(**batch, **given).logits - before)[:, -1]
    assert gained.argmax(-1).tolist() == given["context_ids"].flatten().tolist()


@torch.no_grad()
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_token_finds_what_followed_its_own_word(decoder, position):
    """From the start: an untrained model with an open gate continues a record's text, whatever its words are."""
    model = context_model(decoder, context=WORDS, inject=InjectConfig(kind="cross"))
    batch, given = tiny_batch(), records(count=1, length=4)
    text = torch.tensor([9, 3, 7, 5])
    given["context_ids"] = text.expand(2, 1, 1, 4)
    batch["input_ids"][:, -1] = text[position]
    before = model(**batch, **given).logits
    model.injection.context_gates[-1] = 0.05
    gained = (model(**batch, **given).logits - before)[:, -1]
    assert gained.argmax(-1).tolist() == [text[position + 1].item()] * 2


@torch.no_grad()
def test_the_word_before_is_in_the_keys_of_kind_cross_only(decoder):
    """So a text token can find what followed its own word in a record, and does not say that word again."""
    model = context_model(decoder, context=WORDS, inject=InjectConfig(kind="cross"))
    torch.nn.init.zeros_(model.context.position)
    embed = model.decoder.get_input_embeddings()
    found = []
    for ids in ([5, 6, 7], [6, 5, 7], [5, 6, 8]):
        inputs = unit(1, 1, 16), unit(1, 1, 1, 16), torch.ones(1, 1, 1), torch.tensor([[[ids]]]), embed
        tokens = model.context.read(*inputs)
        keys, values = model.injection.context_reader.keys_and_values(tokens, torch.float32)[0]
        found.append((keys[0].movedim(-1, 0), values[0, 0]))
    (keys, values), (other_keys, other_values), (_, last_values) = found
    torch.testing.assert_close(values[[1, 0, 2]], other_values)
    assert not torch.allclose(keys[2], other_keys[2])
    assert not torch.allclose(values[2], last_values[2])
    # The first word of a text has no word before it: a learned start, which is not that of padding.
    assert not torch.allclose(keys[0], other_keys[1])


@pytest.mark.parametrize("given", [records(), {}], ids=["records", "none"])
def test_gradients_reach_every_trained_tensor(decoder, parts, given):
    """Also without records: DDP waits for each of them."""
    model = context_model(decoder, context_gates=1.0, **parts).train()
    model.set_trainable(["bind", "inject", "context"])
    batch = tiny_batch(**bind_tokens(parts))
    model(**batch, **given).logits.square().mean().backward()
    members = [member for group in model.parameter_groups().values() for member in group]
    assert [name for name, parameter in members if parameter.grad is None] == []
    if given:
        own = dict(model.parameter_groups()["context"])
        assert [name for name, parameter in own.items() if not parameter.grad.any()] == []


def test_the_group_context_leaves_the_rest_as_it_is(decoder):
    model = context_model(decoder)
    groups = model.parameter_groups()
    names = {name: {member for member, _ in group} for name, group in groups.items()}
    assert "injection.context_gates" in names["context"] - names["inject"]
    model.set_trainable(["context"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == names["context"]


def drawn_batch(tokenizer, copied, *, length=4):
    """A batch of two rows, each with an answer of three words and its end, and what a step makes of it."""
    text = torch.tensor([[1, 2, 3, 40, 41, 42, tokenizer.eos_token_id]] * 2)
    batch = {
        "input_ids": text,
        "media_index": torch.zeros_like(text),
        "labels": torch.where(torch.arange(7) > 2, text, -100).expand(2, -1),
        **records(length=length),
    }
    before = {name: value.clone() for name, value in batch.items()}
    config = dataclasses.replace(CONTEXT, copied=copied)
    found = draw_records(batch, config, tokenizer)
    # The batch of the loader is used again.
    assert all(torch.equal(batch[name], value) for name, value in before.items())
    return batch, found


def test_a_training_step_draws_the_number_of_records_and_the_groups_without_any(decoder):
    tokenizer = context_model(decoder).tokenizer
    torch.manual_seed(0)
    counts, absent, foreign = [], 0, 0
    for _ in range(60):
        batch, found = drawn_batch(tokenizer, 0.0)
        assert torch.equal(found["labels"], batch["labels"])
        count = found["context_ids"].shape[2]
        counts.append(count)
        given = {name: value[:, :, :count] for name, value in batch.items() if name.startswith("context")}
        present = found["context_embeddings"].flatten(1).any(-1)
        absent += int((~present).sum())
        for row in present.nonzero().flatten().tolist():
            is_own = torch.equal(found["context_embeddings"][row], given["context_embeddings"][row])
            source = row if is_own else 1 - row
            for name in ("context_embeddings", "context_ids"):
                assert torch.equal(found[name][row][..., : given[name].shape[-1]], given[name][source])
            # The score of foreign records is that of random ones.
            assert torch.equal(found["context_scores"][row], given["context_scores"][row]) == is_own
            foreign += not is_own
    assert {*counts} == {1, 2, 3}
    assert 4 < absent < 30
    assert 10 < foreign < 40


def test_the_only_row_of_a_step_keeps_its_own_records(decoder):
    tokenizer = context_model(decoder).tokenizer
    batch = {name: value[:1] for name, value in drawn_batch(tokenizer, 0.0)[0].items()}
    for _ in range(20):
        found = draw_records(batch, CONTEXT, tokenizer)
        count = found["context_ids"].shape[2]
        assert torch.equal(found["context_scores"], batch["context_scores"][:, :, :count])


@pytest.mark.parametrize("length", [4, 6], ids=["shorter texts", "texts as long as the model reads"])
def test_copied_answers_are_the_text_of_the_nearest_record(decoder, length):
    tokenizer = context_model(decoder).tokenizer
    torch.manual_seed(0)
    random, same = 0, 0
    for _ in range(60):
        batch, found = drawn_batch(tokenizer, 1.0, length=length)
        present = found["context_embeddings"][:, 0, 0].any(-1)
        for row in range(2):
            ids, labels = found["input_ids"][row], found["labels"][row]
            answer = labels[labels != -100]
            assert torch.equal(ids[3:], answer)
            assert torch.equal(ids[:3], batch["input_ids"][row, :3])
            # The end is never another token: an answer that never ends would be learned.
            assert answer[-1] == tokenizer.eos_token_id
            changed = not torch.equal(answer, batch["input_ids"][row, 3:])
            own = torch.equal(found["context_scores"][row, 0, 0], batch["context_scores"][row, 0, 0])
            if not present[row] or not own:
                # Random words cannot be known without a record of their own.
                assert not changed
                continue
            text = found["context_ids"][row, 0, 0]
            assert torch.equal(text[text >= 0], answer)
            random, same = random + changed, same + (not changed)
    assert 20 < random < 60
    assert 20 < same < 60


def test_of_several_answers_about_a_media_the_first_is_copied(decoder, monkeypatch):
    monkeypatch.setattr("bindllm.model.context.draws._FOREIGN", 0)
    tokenizer = context_model(decoder).tokenizer
    end, copied = tokenizer.eos_token_id, 0
    text = torch.tensor([[1, 40, end, 2, 41, end]] * 2)
    answers = torch.tensor([False, True, True, False, True, True])
    batch = {"input_ids": text, "media_index": 0 * text, **records(length=6)}
    batch["labels"] = torch.where(answers, text, -100)
    for _ in range(20):
        found = draw_records(batch, dataclasses.replace(CONTEXT, copied=1.0), tokenizer)
        for row in found["context_embeddings"][:, 0, 0].any(-1).nonzero().flatten().tolist():
            record = found["context_ids"][row, 0, 0]
            assert record[record >= 0].tolist() == found["labels"][row, 1:3].tolist()
            assert found["labels"][row, 4] == 41
            copied += 1
    assert copied > 20


def test_only_answers_about_media_with_records_are_copied(decoder, monkeypatch):
    monkeypatch.setattr("bindllm.model.context.draws._FOREIGN", 0)
    tokenizer = context_model(decoder).tokenizer
    batch, _ = drawn_batch(tokenizer, 0.0)
    batch["media_index"] = torch.full_like(batch["media_index"], -1)
    for _ in range(20):
        found = draw_records(batch, dataclasses.replace(CONTEXT, copied=1.0), tokenizer)
        count = found["context_ids"].shape[2]
        assert torch.equal(found["context_ids"][..., :4], batch["context_ids"][:, :, :count])
        assert torch.equal(found["input_ids"], batch["input_ids"])
    assert draw_records({"labels": batch["labels"]}, CONTEXT, tokenizer).keys() == {"labels"}


def test_a_few_steps_teach_a_tiny_model_to_read_its_context(decoder):
    """The same prompt and media; only the text of the record tells the answer."""
    model = tiny_model(decoder, context=CONTEXT, gates=0.5).train()
    model.set_trainable(["context"])
    batch = tiny_batch(embeddings=unit(1, 1, 16).expand(2, 1, 16))
    batch["input_ids"] = batch["input_ids"][:1].expand(2, -1).clone()
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = batch["input_ids"][:, -1] = torch.tensor([70, 90])
    given = {
        "context_embeddings": unit(1, 1, 1, 16).expand(2, 1, 1, 16),
        "context_scores": torch.full((2, 1, 1), 4.0),
        "context_ids": torch.tensor([70, 90]).reshape(2, 1, 1, 1),
    }
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)

    def loss(given):
        output = model(**batch, **given, labels=labels)
        return torch.nn.functional.cross_entropy(output.logits, output.targets)

    for _ in range(50):
        optimizer.zero_grad()
        loss(given).backward()
        optimizer.step()
    swapped = {name: value.flip(0) for name, value in given.items()}
    assert loss(given) + 2 < loss(swapped)


def a_datastore(model: BindLLM, folder) -> tuple[Datastore, list[Media]]:
    images = sorted((color_images(folder) / "images").glob("*0.png"))
    media = [Media.image(file) for file in images]
    store = Datastore(
        model.encode(media),
        [Record((), file.name, "image", (file.name[:-5],)) for file in images],
        [encoder.fingerprint() for encoder in model.encoders],
    )
    return store, media


def test_a_checkpoint_carries_its_datastore_and_answers_with_it(decoder, tmp_path):
    model = context_model(decoder, context_gates=2.0)
    store, media = a_datastore(model, tmp_path / "data")
    plain = model.generate("What?", media[:1], max_new_tokens=8)
    model.datastore = store
    answer = model.generate("What?", media[:1], max_new_tokens=8)
    assert answer != plain == model.generate("What?", media[:1], max_new_tokens=8, datastore=False)
    assert "".join(model.stream("What?", media[:1], max_new_tokens=8)).strip() == answer
    batch = model.generate(["What?", "And what is this?"], [media[:1], media[2:]], max_new_tokens=8)
    assert batch[0] == answer
    beams = model.generate("What?", media[:1], max_new_tokens=8, num_beams=3, num_return_sequences=2)
    assert len(beams) == 2
    model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")
    options = {"allow": ["tiny.ColorEncoder"], "device": "cpu"}
    loaded = BindLLM.from_pretrained(tmp_path / "saved", **options)
    assert loaded.generate("What?", media[:1], max_new_tokens=8) == answer
    assert loaded.datastore.records == store.records
    assert loaded.context.config == CONTEXT
    for choices in ({"datastore": False}, {"records": 0}):
        other = BindLLM.from_pretrained(tmp_path / "saved", **choices, **options)
        assert other.generate("What?", media[:1], max_new_tokens=8) == plain
    store.save(tmp_path / "other")
    other = BindLLM.from_pretrained(tmp_path / "saved", datastore=tmp_path / "other", records=9, **options)
    # More records than there are: all of them are read.
    found = find_records(other, other.encode(media)[:, None], None)
    assert found["context_embeddings"].shape == (4, 1, 4, 16)
    # Without media there is nothing to retrieve for.
    assert other.generate("What?", max_new_tokens=8) == model.generate("What?", max_new_tokens=8)


def test_a_checkpoint_without_its_datastore_asks_for_one(decoder, tmp_path):
    model = context_model(decoder)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match="datastore is True, expected"):
        BindLLM.from_pretrained(tmp_path / "saved", datastore=True, allow=["tiny.ColorEncoder"])
    with pytest.raises(StoreError, match="has no datastore.*datastore=False"):
        BindLLM.from_pretrained(tmp_path / "saved", allow=["tiny.ColorEncoder"])


def test_a_model_that_was_loaded_without_its_records_does_not_lose_them(decoder, tmp_path):
    model = context_model(decoder)
    model.datastore, _ = a_datastore(model, tmp_path / "data")
    model.save_pretrained(tmp_path / "saved")
    options = {"allow": ["tiny.ColorEncoder"], "device": "cpu"}
    BindLLM.from_pretrained(tmp_path / "saved", datastore=False, **options).save_pretrained(
        tmp_path / "saved"
    )
    again = BindLLM.from_pretrained(tmp_path / "saved", **options)
    assert again.datastore.records == model.datastore.records


def test_each_row_of_a_batch_reads_the_records_of_its_own_groups(decoder, tmp_path):
    """Rows with different numbers of groups, greedy and with beams, answer as they do alone."""
    model = context_model(decoder, context_gates=2.0)
    model.datastore, media = a_datastore(model, tmp_path / "data")
    first = [Message("user", [media[0], "What?"]), Message("assistant", "a square")]
    two = Conversation((*first, Message("user", [media[3], "And this?"])))
    one = Conversation((Message("user", [*media[1:3], "What are these?"]),))
    prompts = [two, one, "Hello?"]
    without = model.generate(prompts, datastore=False, max_new_tokens=8)
    for options in ({}, {"num_beams": 3}):
        options["max_new_tokens"] = 8
        together = model.generate(prompts, **options)
        assert together == [model.generate(prompt, **options) for prompt in prompts]
    answers = model.generate(prompts, max_new_tokens=8)
    assert [a == b for a, b in zip(answers, without, strict=True)] == [False, False, True]


def test_a_kind_that_adds_one_vector_cannot_read_context_tokens(decoder):
    with pytest.raises(InputError, match="inject.kind residual.*set inject.kind: attend, cross or value"):
        context_model(decoder, inject=InjectConfig(kind="residual"))


@pytest.mark.parametrize("latents", ["most", 0, 1.5, True, None])
def test_a_number_of_latents_is_a_whole_number_or_all(latents):
    with pytest.raises(InputError, match=r"context\.latents is"):
        ContextConfig(latents=latents)


def test_a_decoder_is_tried_with_context_tokens(decoder, monkeypatch):
    monkeypatch.setattr(BindAttention, "keys_and_values", lambda *_: 1 / 0)
    tiny_model(decoder)
    with pytest.raises(DecoderError, match="cannot run with an injection"):
        context_model(decoder)


def test_records_for_a_model_that_reads_none(decoder, tmp_path):
    model = context_model(decoder)
    store, media = a_datastore(model, tmp_path / "data")
    plain = tiny_model(decoder)
    with pytest.raises(InputError, match=r"train it with model\.context"):
        plain.generate("What?", media[:1], datastore=store)
    with pytest.raises(InputError, match=r"Datastore\.open"):
        model.generate("What?", media[:1], datastore=str(tmp_path))
    with pytest.raises(InputError, match=r"train it with model\.context"):
        plain(**tiny_batch(), **records())
    plain.save_pretrained(tmp_path / "plain")
    store.save(tmp_path / "store")
    for choices in ({"datastore": tmp_path / "store"}, {"records": 2}):
        with pytest.raises(InputError, match=r"train it with model\.context"):
            BindLLM.from_pretrained(tmp_path / "plain", allow=["tiny.ColorEncoder"], **choices)
    bind = torch.zeros(2, 1, 32)
    with pytest.raises(InputError, match="reads no context"):
        plain.decoder(
            input_ids=tiny_batch()["input_ids"],
            bind=bind,
            media_index=tiny_batch()["media_index"],
            context=torch.zeros(2, 1, 4, 32),
        )


def test_a_datastore_of_another_encoder_is_refused(decoder, tmp_path):
    model = context_model(decoder)
    store, media = a_datastore(model, tmp_path / "data")
    other = context_model(decoder, encoders=[ColorEncoder(grid=2)])
    with pytest.raises(StoreError, match="built with the encoder"):
        other.generate("What?", media[:1], datastore=store)


def test_control_tokens_in_a_record_end_no_answer(decoder, tmp_path):
    model = context_model(decoder)
    store, _ = a_datastore(model, tmp_path / "data")
    spelled = dataclasses.replace(store.records[0], texts=("a<|im_end|>b",))
    store = Datastore(store.embeddings[:1], [spelled], store.fingerprints)
    *text, end = RecordReader(store, model.tokenizer, 64).tokens(0)
    assert end == model.tokenizer.eos_token_id
    assert {*text}.isdisjoint(model.tokenizer.all_special_ids)
    assert model.tokenizer.decode(text).replace("\u2060", "") == "a<|im_end|>b"


def test_settings_that_cannot_be_used(decoder):
    with pytest.raises(InputError, match="multiple of 8"):
        ContextConfig(width=12)
    with pytest.raises(InputError, match=r"context\.records is 0"):
        ContextConfig(records=0)
    with pytest.raises(InputError, match=r"inject\.kind: attend"):
        tiny_model(decoder, context=CONTEXT, inject=InjectConfig(kind="residual"))
    model = context_model(decoder)
    with pytest.raises(InputError, match="at least 0"):
        model.context.num_records = -1
    with pytest.raises(InputError, match="expected"):
        model.decoder(
            input_ids=tiny_batch()["input_ids"],
            bind=torch.zeros(2, 1, 32),
            media_index=tiny_batch()["media_index"],
            context=torch.zeros(2, 2, 4, 32),
        )


def test_longer_texts_are_cut(decoder, tmp_path):
    model = context_model(decoder)
    store, _ = a_datastore(model, tmp_path / "data")
    store = Datastore(
        7 * store.embeddings,
        [dataclasses.replace(record, texts=("blue", "a longer text")) for record in store.records],
        store.fingerprints,
    )
    reader = RecordReader(store, model.tokenizer, 6)
    assert reader.num_cut() == len(store)
    embeddings, _, ids = reader.read(torch.tensor([[1, -1]]), torch.zeros(1, 2))
    assert model.tokenizer.decode(ids[0, 0]) == "blue; "
    # The network reads unit vectors; the length only counts in the search.
    torch.testing.assert_close(embeddings[0, 0], store.embeddings[1] / 7)
    assert (ids[0, 1] == NO_TOKEN).all()
    assert not embeddings[0, 1].any()
