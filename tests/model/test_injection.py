"""Injection against its formula, and against everything that a decoder does around it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bindllm.errors import DecoderError, InputError
from bindllm.model.injection import InjectConfig, Injection
from bindllm.model.injection.attend import checkpointed
from tiny import FAMILIES, tiny_decoder

KINDS = ("residual", "value", "attend", "cross")
# Kinds that read several bind tokens.
OF_TOKENS = ("attend", "cross")
NUM_TOKENS = 3
MAMBA = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}
# Families that normalize queries and keys: each head, or all heads as one; and those with a scaling of their own.
ATTENDING = {
    **{family: {} for family in FAMILIES},
    "gemma3_text": {"query_pre_attn_scalar": 5},
    "olmo2": {},
    "cohere": {"use_qk_norm": True},
    "granite": {"attention_multiplier": 0.7},
}


def inject(
    family: str = "llama", kind: str = "value", *, queries: bool = True, open_gates: bool = True, **changes
):
    """A tiny decoder with an injection whose gates are open (random), or zero as at the start."""
    decoder = tiny_decoder(family, **changes).requires_grad_(False)
    torch.manual_seed(1)
    injection = Injection(decoder, InjectConfig(kind=kind, queries=queries))
    if open_gates:
        nn.init.normal_(injection.gates)
    if injection.queries is not None:
        nn.init.normal_(injection.queries, std=0.3)
    if injection.reader is not None:
        nn.init.normal_(injection.reader.query, std=0.3)
        with torch.no_grad():
            injection.gates *= 0.03
    return decoder, injection


def batch(kind: str = "value", rows: int = 2, length: int = 7, groups: int = 2, *, width: int = 32):
    """Token ids [B, T], bind vectors [B, M, D] and a media index that uses -1 and every group.

    For kinds attend and cross bind tokens [B, M, N, D], of which the last group has one, and the rest zeros.
    """
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 259, (rows, length), generator=generator)
    bind = torch.randn(
        rows, groups, *((NUM_TOKENS,) if kind in OF_TOKENS else ()), width, generator=generator
    )
    if kind in OF_TOKENS:
        bind[-1, -1, 1:] = 0
    index = torch.arange(rows * length).reshape(rows, length) % (groups + 1) - 1
    return ids, bind, index


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_gates_are_bit_equal_to_the_base_decoder(family, kind):
    ids, bind, index = batch(kind)
    base = tiny_decoder(family)(ids).logits
    decoder, _ = inject(family, kind, open_gates=False)
    assert torch.equal(decoder(ids, bind=bind, media_index=index).logits, base)


@pytest.mark.parametrize("kind", KINDS)
def test_no_media_is_bit_equal_to_the_base_decoder(kind):
    ids, bind, index = batch(kind)
    base = tiny_decoder()(ids).logits
    decoder, _ = inject(kind=kind)
    assert torch.equal(decoder(ids).logits, base)
    assert torch.equal(decoder(ids, bind=bind, media_index=torch.full_like(index, -1)).logits, base)


@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_residual_is_the_formula_at_the_input_of_every_layer(family, queries):
    ids, bind, index = batch()
    decoder, injection = inject(family, "residual", queries=queries)
    found = decoder(ids, bind=bind, media_index=index).logits

    plain = tiny_decoder(family)
    # bind[b, m(t)] + query[l], nothing where the index is -1
    chosen = torch.stack([torch.stack([bind[b, m] for m in index[b].clamp(min=0)]) for b in range(2)])
    for layer, block in enumerate(plain.model.layers):
        vector = chosen + (injection.queries[layer] if queries else 0)
        term = injection.gates[layer] * vector * (index >= 0).unsqueeze(-1)
        block.register_forward_pre_hook(lambda _, args, term=term: (args[0] + term, *args[1:]))
    torch.testing.assert_close(found, plain(ids).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("queries", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_value_is_the_formula_before_the_output_projection(family, queries):
    ids, bind, index = batch()
    decoder, injection = inject(family, "value", queries=queries)
    found = decoder(ids, bind=bind, media_index=index).logits

    plain = tiny_decoder(family)
    heads, kv_heads, size = 4, 2, 8
    for layer, block in enumerate(plain.model.layers):
        attention = block.self_attn
        term = torch.zeros(2, 7, heads, size)
        for b in range(2):
            for t in range(7):
                if index[b, t] >= 0:
                    vector = bind[b, index[b, t]] + (injection.queries[layer] if queries else 0)
                    value = attention.v_proj(vector).view(kv_heads, size)
                    for h in range(heads):
                        # key/value head h // 2 serves the heads of its group
                        term[b, t, h] = (
                            torch.tanh(injection.gates[layer, h]) * value[h // (heads // kv_heads)]
                        )
        term = term.flatten(2).detach()
        attention.o_proj.register_forward_pre_hook(lambda _, args, term=term: (args[0] + term,))
    torch.testing.assert_close(found, plain(ids).logits, atol=2e-5, rtol=1e-5)


def add_attention(plain, injection, bind, index):
    """Give a decoder without injection the formula of kind attend, token by token and head by head."""

    def run(attention, injected, hidden):
        scaling = vars(attention)["scaling"]
        heads, size = 4, 8
        base = [dict(p.named_children()).get("base_layer", p) for p in (attention.k_proj, attention.v_proj)]
        parts = dict(attention.named_children())
        joint = type(attention).__name__.startswith("Olmo2")
        term = torch.zeros(*hidden.shape[:2], heads, size)
        for b, t in (index >= 0).nonzero().tolist():
            own = bind[b, index[b, t]]
            own = own[own.any(-1)] + injection.queries[injected]
            q, k, v = attention.q_proj(hidden[b, t]), base[0](own), base[1](own)
            if joint:
                q, k = attention.q_norm(q), attention.k_norm(k)
            q, k, v = q.view(heads, size), k.view(len(own), 2, size), v.view(len(own), 2, size)
            if "q_norm" in parts and not joint:
                q, k = attention.q_norm(q), attention.k_norm(k)
            for h in range(heads):
                # key/value head h // 2 serves the heads of its group
                shares = (k[:, h // 2] @ q[h] * scaling).exp()
                mixed = (shares / shares.sum()) @ v[:, h // 2]
                term[b, t, h] = torch.tanh(injection.gates[injected, h]) * mixed
        return term.flatten(2)

    layers = plain.get_decoder().layers
    for injected, block in enumerate(layers, len(injection.gates) - len(layers)):
        seen = {}
        block.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.update(x=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        block.self_attn.o_proj.register_forward_pre_hook(
            lambda _, args, block=block, injected=injected, seen=seen: (
                args[0] + run(block.self_attn, injected, seen["x"]),
            )
        )


@pytest.mark.parametrize("family", ATTENDING)
@torch.no_grad()
def test_attend_is_the_formula_before_the_output_projection(family):
    ids, bind, index = batch("attend")
    decoder, injection = inject(family, "attend", **ATTENDING[family])
    base = decoder(ids).logits
    found = decoder(ids, bind=bind, media_index=index).logits
    assert not torch.allclose(found, base, atol=1e-3)
    plain = tiny_decoder(family, **ATTENDING[family])
    add_attention(plain, injection, bind, index)
    torch.testing.assert_close(found, plain(ids).logits, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ATTENDING)
def test_attend_with_one_bind_token_is_value(family):
    ids, bind, index = batch()
    changes = ATTENDING[family]
    expected = inject(family, "value", **changes)[0](ids, bind=bind, media_index=index).logits
    decoder, _ = inject(family, "attend", **changes)
    one = bind.unsqueeze(2)
    assert torch.equal(decoder(ids, bind=bind, media_index=index).logits, expected)
    assert torch.equal(decoder(ids, bind=one, media_index=index).logits, expected)
    # Through the softmax: rows of zeros are not tokens, except the first.
    padded = nn.functional.pad(one, (0, 0, 0, 2))
    close = {"atol": 2e-5, "rtol": 1e-5}
    torch.testing.assert_close(decoder(ids, bind=padded, media_index=index).logits, expected, **close)
    padded[0], one[0] = 0, 0
    expected = decoder(ids, bind=one, media_index=index).logits
    torch.testing.assert_close(decoder(ids, bind=padded, media_index=index).logits, expected, **close)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cross_is_the_formula_at_the_output_of_every_layer(family):
    ids, bind, index = batch("cross")
    decoder, injection = inject(family, "cross")
    found = decoder(ids, bind=bind, media_index=index).logits
    assert not torch.allclose(found, decoder(ids).logits, atol=1e-3)

    plain = tiny_decoder(family)
    for layer, block in enumerate(plain.model.layers):

        def add(_, args, hidden, layer=layer):
            hidden = hidden.clone()
            for b, t in (index >= 0).nonzero().tolist():
                own = bind[b, index[b, t]]
                own = own[own.any(-1)]
                own, h = own / own.square().mean(-1, keepdim=True).sqrt(), hidden[b, t].clone()
                size = h.square().mean().sqrt()
                for head, gate in enumerate(injection.gates[layer]):
                    key = own @ injection.reader.key[layer, head]
                    query = (h / size) @ injection.reader.query[layer, head]
                    shares = (key @ query / query.numel() ** 0.5).softmax(0)
                    hidden[b, t] += 10 * size * gate * (shares @ own)
            return hidden

        block.register_forward_hook(add)
    torch.testing.assert_close(found, plain(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_cross_reads_one_bind_token_as_it_reads_several():
    ids, bind, index = batch()
    decoder, _ = inject(kind="cross")
    expected = decoder(ids, bind=bind, media_index=index).logits
    one = bind.unsqueeze(2)
    assert torch.equal(decoder(ids, bind=one, media_index=index).logits, expected)
    padded = nn.functional.pad(one, (0, 0, 0, 2))
    found = decoder(ids, bind=padded, media_index=index).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_cross_raises_the_logits_of_words_that_bind_tokens_point_to():
    """Untrained queries: an open gate is all that a bind token near a word embedding needs."""
    ids, _, index = batch("cross", groups=1)
    decoder, injection = inject(kind="cross", open_gates=False)
    base = decoder(ids).logits
    injection.gates[-1] += 0.02
    injection.reader.query.zero_()
    words = decoder.get_output_embeddings().weight[[40, 50]].expand(2, 1, 2, 32)
    risen = (decoder(ids, bind=words, media_index=index).logits - base)[index >= 0].mean(0)
    assert set(risen.topk(2).indices.tolist()) == {40, 50}


@pytest.mark.parametrize("kind", OF_TOKENS)
def test_every_token_is_used_and_their_order_does_not_matter(kind):
    ids, bind, index = batch(kind, groups=1)
    bind = torch.randn(2, 1, NUM_TOKENS, 32, generator=torch.Generator().manual_seed(3))
    decoder, _ = inject(kind=kind)
    base = decoder(ids, bind=bind, media_index=index).logits
    torch.testing.assert_close(decoder(ids, bind=bind.flip(2), media_index=index).logits, base)
    for n in range(NUM_TOKENS):
        changed = bind.clone()
        changed[0, 0, n] += 1
        found = decoder(ids, bind=changed, media_index=index).logits
        assert not torch.allclose(found[0], base[0], atol=1e-3)
        assert torch.equal(found[1], base[1])


@pytest.mark.parametrize("kind", OF_TOKENS)
def test_masked_bind_tokens_get_no_gradient_and_no_nan(kind):
    ids, bind, index = batch(kind)
    bind.requires_grad_(True)
    decoder, injection = inject(kind=kind)
    decoder(ids, bind=bind, media_index=index).logits.square().mean().backward()
    assert bind.grad[-1, -1, 1:].abs().max() == 0
    assert bind.grad[0].abs().amax(-1).min() > 0
    for grad in (bind.grad, *(parameter.grad for parameter in injection.parameters())):
        assert grad.isfinite().all()


def test_several_bind_tokens_need_a_kind_that_reads_them():
    ids, bind, index = batch("attend")
    for kind in ("residual", "value"):
        decoder, _ = inject(kind=kind)
        with pytest.raises(InputError, match=r"3 bind tokens per media group.*inject: \{kind: attend\}"):
            decoder(ids, bind=bind, media_index=index)


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_listens_to_its_own_group_only(kind):
    ids, bind, index = batch(kind, rows=1, length=6)
    index[:] = torch.tensor([[-1, -1, 0, 0, 1, 1]])
    decoder, _ = inject(kind=kind)
    before = decoder(ids, bind=bind, media_index=index).logits
    bind[:, 1] += 1
    after = decoder(ids, bind=bind, media_index=index).logits
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_media_give_the_bind_vectors_no_gradient(kind):
    ids, bind, index = batch(kind)
    index[0] = -1
    bind.requires_grad_(True)
    decoder, injection = inject(kind=kind)
    decoder(ids, bind=bind, media_index=index).logits.square().sum().backward()
    assert bind.grad[0].abs().max() == 0
    assert bind.grad[1].abs().max() > 0
    assert injection.gates.grad.abs().min() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_with_a_cache_equals_the_full_forward(family, kind):
    """The prompt in two chunks, then token by token: routes follow the position."""
    ids, bind, index = batch(kind, length=9)
    index[:, 5:] = index[:, 4:5]
    decoder, injection = inject(family, kind)
    pieces, cache = [], None
    with torch.no_grad():
        full = decoder(ids, bind=bind, media_index=index).logits
        with injection.holding(bind, index[:, :5]):
            for chunk in ids.split([3, 2, 1, 1, 1, 1], dim=1):
                step = decoder(chunk, past_key_values=cache, use_cache=True)
                pieces, cache = [*pieces, step.logits], step.past_key_values
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_of_a_padded_batch_equals_one_by_one(kind, options):
    decoder, injection = inject(kind=kind)
    _, bind, _ = batch(kind, rows=2, groups=1)
    rows = [torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10]])]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    alone = []
    with torch.no_grad():
        for row, ids in enumerate(rows):
            with injection.holding(bind[row : row + 1], torch.zeros_like(ids)):
                alone.append(
                    decoder.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]
                )
        ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
        mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
        with injection.holding(bind, mask - 1):
            together = decoder.generate(ids, attention_mask=mask, **options)[:, 4:]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("kind", ["value", *OF_TOKENS])
def test_concurrent_generations_keep_apart(kind):
    from concurrent.futures import ThreadPoolExecutor

    decoder, injection = inject(kind=kind)
    ids = torch.tensor([[5, 6, 7, 8]])
    shape = (6, 1, 1, 3, 32) if kind in OF_TOKENS else (6, 1, 1, 32)
    binds = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def run(bind):
        with injection.holding(bind, torch.zeros_like(ids)):
            return decoder.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
            )

    alone = [run(bind) for bind in binds]
    assert len({tuple(row.flatten().tolist()) for row in alone}) > 1
    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(a, b) for a, b in zip(alone, pool.map(run, binds), strict=True))


def _gradients(kind: str, *, checkpointing: bool, forwards: int) -> list[torch.Tensor]:
    decoder, injection = inject(kind=kind)
    if checkpointing:
        for layer in decoder.model.layers:
            layer.forward = checkpointed(layer.forward)
    loss, bind = 0, []
    for n in range(forwards):
        ids, vectors, index = batch(kind, length=5 + n)
        bind.append((vectors + n).requires_grad_(True))
        loss = loss + decoder(
            ids, bind=bind[-1], media_index=index, use_cache=False
        ).logits.square().mean() * (n + 1)
    loss.backward()
    return [x.grad for x in bind] + [parameter.grad for parameter in injection.parameters()]


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing_gives_the_same_gradients(kind, forwards):
    plain = _gradients(kind, checkpointing=False, forwards=forwards)
    again = _gradients(kind, checkpointing=True, forwards=forwards)
    for a, b in zip(plain, again, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_after_a_forward_that_failed(kind):
    ids, bind, index = batch(kind)
    base = tiny_decoder()(ids).logits
    decoder, injection = inject(kind=kind)
    original = decoder.model.layers[1].mlp.forward

    def fail(*_):
        raise RuntimeError("on purpose")

    decoder.model.layers[1].mlp.forward = fail
    with pytest.raises(RuntimeError, match="on purpose"), torch.no_grad(), injection.holding(bind, index):
        decoder(ids)
    decoder.model.layers[1].mlp.forward = original
    assert torch.equal(decoder(ids).logits, base)


LORA = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 4, "init_lora_weights": False}


@torch.no_grad()
def test_attend_takes_queries_with_their_lora_keys_and_values_without():
    peft = pytest.importorskip("peft")
    ids, bind, index = batch("attend")
    torch.manual_seed(3)
    adapted = peft.get_peft_model(tiny_decoder(), peft.LoraConfig(**LORA))
    injection = Injection(adapted, InjectConfig("attend"))
    nn.init.normal_(injection.gates)
    found = adapted(ids, bind=bind, media_index=index).logits
    plain = peft.get_peft_model(tiny_decoder(), peft.LoraConfig(**LORA))
    plain.load_state_dict(adapted.state_dict())
    add_attention(plain.get_base_model(), injection, bind, index)
    torch.testing.assert_close(found, plain(ids).logits, atol=3e-5, rtol=1e-4)


def test_the_term_passes_through_the_lora_of_the_output_projection():
    peft = pytest.importorskip("peft")
    ids, bind, index = batch()
    torch.manual_seed(3)
    config = peft.LoraConfig(**LORA)
    adapted = peft.get_peft_model(tiny_decoder(), config)
    injection = Injection(adapted, InjectConfig())
    nn.init.normal_(injection.gates)
    found = adapted(ids, bind=bind, media_index=index).logits
    assert not torch.allclose(found, adapted(ids).logits, atol=1e-3)

    plain = peft.get_peft_model(tiny_decoder(), config)
    plain.load_state_dict(adapted.state_dict())
    for layer, block in enumerate(plain.get_base_model().model.layers):
        vector = bind + injection.queries[layer]
        value = block.self_attn.v_proj.base_layer(vector).unflatten(-1, (2, 8)).repeat_interleave(2, dim=-2)
        term = (torch.tanh(injection.gates[layer]).unsqueeze(-1) * value).flatten(-2)
        term = torch.stack([term[b, index[b].clamp(min=0)] for b in range(2)]) * (index >= 0).unsqueeze(-1)
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args, term=term: (args[0] + term,))
    torch.testing.assert_close(found, plain(ids).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_decoder_takes_bind_vectors_in_full_precision(kind):
    ids, bind, index = batch(kind)
    decoder, _ = inject(kind=kind)
    decoder.to(torch.bfloat16)
    assert decoder(ids, bind=bind, media_index=index).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bind": torch.zeros(2, 1, 32)}, "go together"),
        ({"bind": torch.zeros(3, 1, 32), "media_index": torch.zeros(2, 7, dtype=torch.long)}, r"\[B, M, D\]"),
        ({"bind": torch.zeros(2, 32), "media_index": torch.zeros(2, 7, dtype=torch.long)}, r"\[B, M, D\]"),
        ({"bind": torch.zeros(2, 1, 32), "media_index": torch.zeros(2, 6, dtype=torch.long)}, "must agree"),
        (
            {"bind": torch.zeros(2, 1, 32), "media_index": torch.ones(2, 7, dtype=torch.long)},
            "1 media groups",
        ),
        ({"bind": torch.zeros(2, 1, 32), "media_index": torch.full((2, 7), -2)}, "from -2"),
    ],
)
def test_wrong_shapes_are_refused(arguments, words):
    decoder, _ = inject()
    with pytest.raises(InputError, match=words):
        decoder(batch()[0], **arguments)


def test_a_decoder_takes_one_injection():
    decoder, _ = inject()
    with pytest.raises(DecoderError, match="carries an injection already"):
        Injection(decoder, InjectConfig())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_leaves_the_residual_stream_in_full_precision(kind):
    ids, bind, index = batch(kind)
    decoder, _ = inject(kind=kind, open_gates=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(decoder(ids, bind=bind, media_index=index).logits, tiny_decoder()(ids).logits)


def test_holding_is_refused_while_gradients_are_on():
    _, injection = inject()
    _, bind, index = batch()
    with pytest.raises(InputError, match="no_grad"), injection.holding(bind, index):
        pass


def test_a_decoder_without_layers_or_heads_is_refused_by_the_part_it_lacks():
    xlm = {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "n_words": 20, "max_position_embeddings": 16}
    with pytest.raises(DecoderError, match=r"XLM.*no list of layers \(layers, h.*it has: .*attentions"):
        Injection(tiny_decoder("xlm", **xlm), InjectConfig(kind="residual"))
    mamba = tiny_decoder("mamba2", **MAMBA)
    for kind in ("value", "attend"):
        with pytest.raises(
            DecoderError, match=f"Mamba2ForCausalLM: injection kind '{kind}' needs an attention"
        ):
            Injection(mamba, InjectConfig(kind=kind))
    assert not mamba._forward_pre_hooks
    assert Injection(mamba, InjectConfig(kind="residual")).gates.shape == (3,)


@pytest.mark.parametrize(("layers", "served"), [(None, [1, 2]), (1, [2]), ([1], [1])])
def test_layers_without_attention_are_not_served(layers, served):
    """Of a hybrid decoder; the number of layers counts those with attention."""
    decoder = tiny_decoder("lfm2", layer_types=["conv", "full_attention", "full_attention"])
    injection = Injection(decoder, InjectConfig(layers=layers))
    assert injection.gates.shape == (len(served), 4)
    hooked = [bool(layer.self_attn.out_proj._forward_pre_hooks) for layer in decoder.model.layers[1:]]
    assert hooked == [1 in served, 2 in served]
    with pytest.raises(DecoderError, match=r"inject\.layers is \[0\], but Lfm2ForCausalLM has .* 1, 2"):
        Injection(
            tiny_decoder("lfm2", layer_types=["conv", "full_attention", "full_attention"]),
            InjectConfig(layers=[0]),
        )


def test_an_unknown_kind_names_the_closest():
    with pytest.raises(InputError, match="Did you mean 'residual'"):
        InjectConfig(kind="residul")


@pytest.mark.parametrize("kind", KINDS)
def test_terms_are_computed_anew_when_a_generation_grows_by_beams(kind):
    """Prefill of the prompts alone, then more rows than prompts: row ``b * beams + n`` belongs to prompt ``b``."""
    ids, bind, index = batch(kind, rows=2)
    decoder, injection = inject(kind=kind)
    grown = ids.repeat_interleave(3, dim=0)
    with torch.no_grad():
        expected = decoder(ids, bind=bind, media_index=index).logits
        with injection.holding(bind, index):
            first = decoder(ids).logits
            second = decoder(grown).logits
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected.repeat_interleave(3, dim=0))
    assert not torch.allclose(second[0], second[3], atol=1e-3)


def test_a_generation_that_shrinks_is_refused():
    ids, bind, index = batch(rows=2)
    decoder, injection = inject()
    with (
        torch.no_grad(),
        injection.holding(bind, index),
        pytest.raises(InputError, match="runs 1 rows for 2 prompts"),
    ):
        decoder(ids[:1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("layers", "served"), [(2, [1, 2]), ([1, 2], [1, 2]), ([2, 0], [0, 2]), ([1], [1])])
def test_only_the_named_layers_are_served(kind, layers, served):
    """As if the gates of the other layers were closed, which a decoder with all layers served can show."""
    ids, bind, index = batch(kind)
    everything, all_layers = inject(kind=kind)
    others = [n for n in range(3) if n not in served]
    with torch.no_grad():
        all_layers.gates[others] = 0
    decoder = tiny_decoder().requires_grad_(False)
    injection = Injection(decoder, InjectConfig(kind=kind, layers=layers))
    for name, parameter in injection.named_parameters():
        assert len(parameter) == len(served)
        parameter.data.copy_(all_layers.get_parameter(name)[served])
    expected = everything(ids, bind=bind, media_index=index).logits
    assert torch.equal(decoder(ids, bind=bind, media_index=index).logits, expected)
    with torch.no_grad(), injection.holding(bind, index):
        torch.testing.assert_close(decoder(ids).logits, expected)


@pytest.mark.parametrize("layers", [4, [0, 3]])
def test_a_decoder_with_too_few_layers_is_refused(layers):
    with pytest.raises(DecoderError, match=r"inject\.layers is .*, but LlamaForCausalLM has 3 layers"):
        Injection(tiny_decoder(), InjectConfig(layers=layers))


@pytest.mark.parametrize("layers", [0, -1, [], [-1], [1, 1], [True], ["1"], 1.0, "all"])
def test_layers_that_name_none_are_refused(layers):
    with pytest.raises(InputError, match=r"inject\.layers is"):
        InjectConfig(layers=layers)
