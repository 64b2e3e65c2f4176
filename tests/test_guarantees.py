"""The three guarantees of the README, each on a model that was really trained for a few steps."""

import copy

import pytest
import torch

from bindllm import Conversation, Media, Message
from bindllm.model.adapter import AdapterConfig
from bindllm.model.bindllm import BindLLM
from bindllm.model.decoder import DecoderConfig
from bindllm.model.generation import render_prompts
from bindllm.model.injection import InjectConfig
from tiny import ColorEncoder, tiny_decoder, tiny_tokenizer

TEXT = Conversation((Message("user", ["How are you today?"]),))
IMAGE = Conversation((Message("user", [Media.image(b""), "Describe this image."]),))


def same_bytes(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)


PARTS = {
    "value": {"inject": InjectConfig(kind="value")},
    "residual": {"inject": InjectConfig(kind="residual")},
    "adapter for media only": {
        "inject": InjectConfig(kind="cross"),
        "adapter": AdapterConfig(rank=4, media_only=True),
    },
}


@pytest.fixture(params=PARTS.values(), ids=PARTS)
def trained(request) -> tuple[BindLLM, torch.nn.Module]:
    """A model after stage 1, or with an adapter for media only, and an untouched copy of its base decoder."""
    base = tiny_decoder()
    model = BindLLM(
        copy.deepcopy(base),
        tiny_tokenizer(),
        DecoderConfig("tiny"),
        encoders=[ColorEncoder()],
        **request.param,
    )
    model.set_trainable([*model.parameter_groups()])
    ids, mask, index = render_prompts([IMAGE], model.tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(4):
        embedding = torch.nn.functional.normalize(torch.ones(1, 1, model.encoders[0].embedding_size), dim=-1)
        output = model(
            input_ids=ids, attention_mask=mask, media_index=index, embeddings=embedding, labels=ids
        )
        torch.nn.functional.cross_entropy(output.logits, output.targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), base.eval()


@torch.no_grad()
def test_text_alone_gives_the_bits_of_the_base_model(trained):
    model, base = trained
    ids, mask, index = render_prompts([TEXT, IMAGE], model.tokenizer)
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    expected = base(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    embedding = torch.nn.functional.normalize(torch.ones(2, 1, model.encoders[0].embedding_size), dim=-1)
    logits = model(input_ids=ids, attention_mask=mask, media_index=index, embeddings=embedding).logits
    words = mask[0].bool()
    assert torch.equal(logits[0, words], expected[0, words])
    # The media of the other row were not ignored.
    assert not torch.equal(logits[1], expected[1])
    fixed = {"max_new_tokens": 8, "do_sample": False}
    plain = base.generate(ids, attention_mask=mask, pad_token_id=model.tokenizer.pad_token_id, **fixed)
    answers = model.generate_from(ids, mask, index, embedding, **fixed)
    assert torch.equal(answers[0], plain[0, ids.shape[1] :])


def test_an_image_costs_no_token(trained):
    model, _ = trained
    without = Conversation((Message("user", ["Describe this image."]),))
    several = Conversation(
        (Message("user", [*(Media.image(b"") for _ in range(16)), "Describe this image."]),)
    )
    expected = render_prompts([without], model.tokenizer)[0]
    for conversation in (IMAGE, several):
        assert torch.equal(render_prompts([conversation], model.tokenizer)[0], expected)


def test_frozen_weights_keep_their_bytes(trained):
    model, base = trained
    frozen = model.decoder.state_dict()
    # peft moves the frozen tensors that have a tuned part beside them.
    moved = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): value
        for name, value in frozen.items()
    }
    assert same_bytes(base.state_dict(), moved)
