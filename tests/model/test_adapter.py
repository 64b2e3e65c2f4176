"""The adapter: nothing at the start, then exactly its formula; saved as peft's own files."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from bindllm import BindLLM
from bindllm.errors import CheckpointError, DecoderError, InputError, MissingExtraError
from bindllm.model.adapter import TARGETS, Adapter, AdapterConfig
from bindllm.model.export import merge
from bindllm.model.injection import InjectConfig, Injection
from bindllm.model.injection.attend import RUNNING
from tiny import FAMILIES, IDS, save_tiny_decoder, tiny_batch, tiny_decoder, tiny_model, tiny_tokenizer

LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "num_key_value_heads": 4, "qk_nope_head_dim": 8}
LATENT |= {"qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
LATENT |= {"num_experts_per_tok": 2}
KINDS = {
    "lora": {"bias": True},
    "rslora": {"alpha": 8.0, "rslora": True},
    "dora": {"alpha": 8.0, "bias": False, "dora": True, "rslora": True},
    "last layers": {"bias": True, "layers": 2},
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
with_and_without_dora = pytest.mark.parametrize("kind", [KINDS["lora"], KINDS["dora"]], ids=["lora", "dora"])


def build(folder, *, dtype="float32", **adapter) -> BindLLM:
    model = tiny_model(folder, dtype=dtype, adapter=AdapterConfig(**{"rank": 4, **adapter}))
    for name, parameter in model.adapter.parameters().items():
        parameter.data += 0.2 * torch.randn_like(parameter) * (1 if "norm" in name else 2)
    return model


@with_and_without_dora
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_an_untrained_adapter_is_bit_equal_to_the_base(family, dtype, kind):
    decoder = tiny_decoder(family).to(dtype)
    base = decoder(IDS).logits
    adapter = Adapter(decoder, AdapterConfig(rank=4, **kind))
    assert torch.equal(decoder(IDS).logits, base)
    assert {parameter.dtype for parameter in adapter.parameters().values()} == {torch.float32}
    # Two matrices and a bias (or the lengths of the rows) of seven projections in three layers, and every norm.
    norms = sum(type(module).__name__.endswith("Norm") for module in tiny_decoder(family).modules())
    assert len(adapter.parameters()) == 3 * 7 * 3 + norms


@pytest.mark.parametrize(
    ("alpha", "rslora", "scale"), [(None, False, 1.0), (8.0, False, 2.0), (8.0, True, 4.0)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_formula(alpha, rslora, scale, dtype):
    """Folded by hand into a plain decoder that has biases."""
    torch.manual_seed(0)
    decoder = tiny_decoder("llama").to(getattr(torch, dtype))
    plain = tiny_decoder("llama", attention_bias=True, mlp_bias=True)
    config = AdapterConfig(rank=4, alpha=alpha, rslora=rslora)
    assert config.scale == scale
    tensors = Adapter(decoder, config).parameters()
    state = {name: value.float() for name, value in tiny_decoder("llama").state_dict().items()}
    for name, parameter in tensors.items():
        parameter.data = parameter + 0.3 * torch.randn_like(parameter)
        inner = name.removeprefix("adapter.base_model.model.")
        if "norm" in inner:
            state[inner] = parameter.data
        elif inner.endswith("lora_B.bias"):
            state[inner.replace("lora_B.", "")] = scale * parameter.data
    for name, parameter in tensors.items():
        if name.endswith("lora_B.weight"):
            inner = name.removeprefix("adapter.base_model.model.").replace("lora_B.", "")
            state[inner] = (
                state[inner] + scale * parameter.data @ tensors[name.replace("lora_B", "lora_A")].data
            )
    plain.load_state_dict(state)
    found, expected = decoder(IDS).logits.float(), plain(IDS).logits
    if dtype == "float32":
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)
    assert nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, {torch.float32}),
        (torch.bfloat16, {torch.bfloat16}),
        (torch.float16, {torch.float16, torch.float32}),
    ],
)
def test_the_low_rank_term_is_computed_in_the_precision_of_the_decoder_or_in_float32(dtype, expected):
    decoder = tiny_decoder("llama").to(dtype)
    adapter = Adapter(decoder, AdapterConfig(rank=4))
    # A copy, such as the reference model of an objective, computes with its own weights.
    twin = copy.deepcopy(decoder)
    for parameter in adapter.parameters().values():
        parameter.requires_grad_(True).data += 0.2
    with Products() as products:
        loss = decoder(IDS).logits.float().sum()
    loss.backward()
    assert products.dtypes == expected
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in adapter.parameters().values())
    assert torch.equal(twin(IDS).logits, tiny_decoder("llama").to(dtype)(IDS).logits)


class Products(TorchDispatchMode):
    """Collects the dtypes of matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.dtypes.add(output.dtype)
        return output


def test_dora_is_its_formula():
    """Equation 5 of arXiv 2402.09353, with rows as lengths: folded by hand into the plain decoder."""
    torch.manual_seed(0)
    decoder, plain = tiny_decoder("mistral"), tiny_decoder("mistral")
    config = AdapterConfig(rank=4, alpha=8.0, bias=False, norm=False, dora=True)
    tensors = Adapter(decoder, config).parameters()
    state = dict(tiny_decoder("mistral").state_dict())
    for parameter in tensors.values():
        parameter.data = parameter + 0.3 * torch.randn_like(parameter)
    for name in [name for name in tensors if name.endswith("lora_magnitude_vector")]:
        stem = name.removesuffix("lora_magnitude_vector")
        inner = stem.removeprefix("adapter.base_model.model.") + "weight"
        low = tensors[f"{stem}lora_B.weight"].data @ tensors[f"{stem}lora_A.weight"].data
        summed = state[inner] + 2.0 * low
        state[inner] = tensors[name].data[:, None] * summed / summed.norm(dim=1, keepdim=True)
    plain.load_state_dict(state)
    torch.testing.assert_close(decoder(IDS).logits, plain(IDS).logits, atol=2e-4, rtol=1e-3)


MIXED = torch.tensor([[-1] * IDS.shape[1], [-1, *[0] * (IDS.shape[1] - 1)]])
"""A row of text, and one whose tokens after the first listen to media."""


def tuned_decoder(family, **adapter):
    """A decoder with a trained adapter and a zero injection of kind residual; the same tensors at each call."""
    torch.manual_seed(0)
    decoder = tiny_decoder(family)
    for parameter in Adapter(decoder, AdapterConfig(rank=4, **adapter)).parameters().values():
        parameter.data += 0.2 * torch.randn_like(parameter)
    width = decoder.config.get_text_config().hidden_size
    return decoder, Injection(decoder, InjectConfig("residual")), torch.zeros(2, 1, width)


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_media_only_leaves_text_to_the_base_model(family):
    base = tiny_decoder(family)(IDS).logits
    decoder, _, bind = tuned_decoder(family, media_only=True)
    every, _, _ = tuned_decoder(family)
    assert torch.equal(decoder(IDS).logits, base)
    mixed = decoder(IDS, bind=bind, media_index=MIXED).logits
    assert torch.equal(mixed[0], base[0])
    assert torch.equal(mixed[1, 0], base[1, 0])
    assert not torch.allclose(mixed[1, 1:], base[1, 1:])
    # If all tokens listen, it is the ordinary adapter.
    listening = decoder(IDS, bind=bind, media_index=torch.zeros_like(IDS)).logits
    torch.testing.assert_close(listening, every(IDS).logits)
    # Nothing of the last forward is left, neither for the next one nor in memory.
    assert RUNNING.get() is None
    assert torch.equal(decoder(IDS).logits, base)


@torch.no_grad()
@pytest.mark.parametrize(("family", "changes"), [("qwen3", {}), ("olmo2", {}), ("deepseek_v3", LATENT)])
def test_media_only_norms_of_bind_tokens_are_the_tuned_ones(family, changes):
    found = []
    for media_only in (True, False):
        torch.manual_seed(0)
        decoder = tiny_decoder(family, **changes)
        for parameter in (
            Adapter(decoder, AdapterConfig(rank=4, media_only=media_only, targets=["o_proj"]))
            .parameters()
            .values()
        ):
            parameter.data += 0.2 * torch.randn_like(parameter)
        injection = Injection(decoder, InjectConfig("attend"))
        injection.gates.fill_(1)
        bind = torch.randn(2, 1, 3, decoder.config.hidden_size)
        ids = IDS[:, :1].expand(-1, 8)
        found.append(decoder(ids, bind=bind, media_index=torch.zeros_like(ids)).logits)
    torch.testing.assert_close(*found)


def test_media_only_with_activation_checkpointing_has_the_same_gradients(tmp_path):
    """Two forwards with other tokens that listen, before one backward pass."""
    folder, found = save_tiny_decoder(tmp_path), []
    for checkpointing in (False, True):
        model = build(folder, media_only=True)
        model.set_trainable(["adapter"])
        if checkpointing:
            model.checkpoint_activations()
        batches = tiny_batch(), tiny_batch(media_index=MIXED)
        sum(model(**batch).logits.square().mean() for batch in batches).backward()
        found.append([parameter.grad for parameter in model.adapter.parameters().values()])
    assert all(gradient.any() for gradient in found[0])
    torch.testing.assert_close(*found)


def test_biases_and_norms_are_left_out_by_name():
    names = Adapter(tiny_decoder(), AdapterConfig(rank=2, bias=False, norm=False)).parameters()
    assert len(names) == 3 * 7 * 2
    assert not any("bias" in name or "norm" in name for name in names)


@pytest.mark.parametrize(("layers", "tuned"), [(2, [1, 2]), ([0], [0])])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_only_the_named_layers_are_tuned(family, layers, tuned):
    names = Adapter(tiny_decoder(family), AdapterConfig(rank=4, layers=layers)).parameters()
    every = Adapter(tiny_decoder(family), AdapterConfig(rank=4)).parameters()
    others = [f".layers.{n}." for n in range(3) if n not in tuned]
    assert [*names] == [name for name in every if not any(other in name for other in others)]
    assert "adapter.base_model.model.model.norm.weight" in names


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "float32") for kind in KINDS), ("dora", "bfloat16")])
def test_saved_and_loaded_it_gives_the_same_logits(decoder, tmp_path, kind, dtype):
    model = build(decoder, dtype=dtype, **KINDS[kind])
    model.save_pretrained(tmp_path / "m")
    files = {str(file.relative_to(tmp_path / "m")) for file in (tmp_path / "m").rglob("*") if file.is_file()}
    assert {"bind.safetensors", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= files
    again = BindLLM.from_pretrained(tmp_path / "m", device="cpu", allow=["tiny.ColorEncoder"])
    assert torch.equal(model(**tiny_batch()).logits, again(**tiny_batch()).logits)
    assert again.adapter.config == model.adapter.config


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
@each_kind
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_peft_loads_the_adapter_onto_the_plain_decoder(tmp_path, family, kind):
    folder = str(save_tiny_decoder(tmp_path / "decoder", family))
    model = build(folder, **kind)
    model.save_pretrained(tmp_path / "m")
    decoder = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = PeftModel.from_pretrained(decoder, str(tmp_path / "m" / "adapter")).eval()
    silent = tiny_batch(media_index=torch.full_like(IDS, -1))
    assert torch.equal(plain(IDS).logits, model(**silent).logits)
    with plain.disable_adapter():
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert torch.equal(plain(IDS).logits, base(IDS).logits)


def test_an_adapter_that_is_damaged_or_gone_is_refused(decoder, tmp_path):
    build(decoder).save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="damaged or exchanged"):
        BindLLM.from_pretrained(tmp_path / "m", allow=["tiny.ColorEncoder"])
    file.unlink()
    with pytest.raises(CheckpointError, match="adapter has no adapter_model"):
        BindLLM.from_pretrained(tmp_path / "m", allow=["tiny.ColorEncoder"])
    file.write_bytes(whole)
    manifest = tmp_path / "m" / "bindllm.json"
    entries = json.loads(manifest.read_text())
    for entry, words in (
        (None, r"unexpected adapter\.base_model"),
        ({**entries["adapter"], "rank": 10**9}, r"bindllm\.json: an entry is .*rank must be 1 to 65536"),
    ):
        manifest.write_text(json.dumps({**entries, "adapter": entry}))
        with pytest.raises(CheckpointError, match=words):
            BindLLM.from_pretrained(tmp_path / "m", device="cpu", allow=["tiny.ColorEncoder"])


@with_and_without_dora
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_a_group_of_its_own_and_learns(decoder, dtype, kind):
    model = build(decoder, dtype=dtype, **kind)
    model.set_trainable(["adapter"])
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"decoder.{name}" for name, _ in model.decoder.named_parameters() if ".default." in name
    }
    model.train()
    labels = IDS.clone()
    labels[:, :4] = -100
    out = model(**tiny_batch(labels=labels))
    nn.functional.cross_entropy(out.logits.float(), out.targets).backward()
    for name, parameter in model.adapter.parameters().items():
        assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in model.bind.parameters())


@with_and_without_dora
def test_checkpointed_gradients_are_the_same(decoder, kind):
    gradients = []
    for checkpointing in (False, True):
        model = build(decoder, **kind)
        model.set_trainable(["adapter"])
        if checkpointing:
            model.checkpoint_activations()
        model.train()
        model(**tiny_batch()).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in model.adapter.parameters().values()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_order_of_construction_is_kept():
    decoder = tiny_decoder()
    Injection(decoder, InjectConfig())
    with pytest.raises(DecoderError, match="must come before"):
        Adapter(decoder, AdapterConfig())
    decoder = tiny_decoder()
    Adapter(decoder, AdapterConfig())
    with pytest.raises(DecoderError, match="an adapter already"):
        Adapter(decoder, AdapterConfig())


def test_decoders_and_settings_that_do_not_fit():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(DecoderError, match=f"GPT2LMHeadModel has no {TARGETS[0]}, "):
        Adapter(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)), AdapterConfig())
    for values in ({"rank": 0}, {"rank": 10**9}, {"alpha": 0.0}, {"alpha": math.inf}):
        with pytest.raises(InputError, match="rank must be 1 to 65536"):
            AdapterConfig(**values)
    with pytest.raises(InputError, match=r"adapter\.layers is 0, expected"):
        AdapterConfig(layers=0)
    with pytest.raises(DecoderError, match=r"adapter\.layers is 4, but LlamaForCausalLM has 3 layers"):
        Adapter(tiny_decoder(), AdapterConfig(layers=4))
    with pytest.raises(InputError, match=r"no new biases for DoRA; set adapter\.bias: false"):
        AdapterConfig(dora=True, bias=True)
    with pytest.raises(InputError, match=r"dora and media_only: .* set one of them to false"):
        AdapterConfig(dora=True, media_only=True)
    with pytest.raises(
        InputError, match=r"does nothing without one; give adapter\.alpha \(16 with rank 16: scale 4\)"
    ):
        AdapterConfig(rslora=True)


@pytest.mark.parametrize(
    ("family", "values", "expected"),
    [
        ("llama", {}, True),
        ("llama", {"dora": True}, False),
        ("llama", {"bias": False}, False),
        ("qwen3", {}, False),
        ("qwen3", {"bias": True}, True),
        ("gemma2", {}, False),
        ("olmo2", {}, False),
        ("cohere2", {}, False),
    ],
)
def test_biases_are_made_if_the_family_can_store_them(family, values, expected, caplog):
    adapter = Adapter(tiny_decoder(family), AdapterConfig(rank=2, **values))
    assert adapter.config.bias is expected
    assert any("lora_B.bias" in name for name in adapter.parameters()) is expected
    assert ("export will not be able to merge" in caplog.text) is (family == "qwen3" and bool(values))


def test_an_image_tower_gets_no_adapter():
    sizes = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=sizes, vision_config=tower | {"image_size": 28, "patch_size": 14})
    decoder = Gemma3ForConditionalGeneration(config)
    names = Adapter(decoder, AdapterConfig(rank=2)).parameters()
    assert len([name for name in names if "lora_A" in name]) == 2 * 7
    assert "adapter.base_model.model.model.language_model.norm.weight" in names
    assert not [name for name in names if ".language_model." not in name]


def test_without_peft_the_message_says_how_to_get_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"bindllm\[adapter\]"):
        Adapter(tiny_decoder(), AdapterConfig())


@pytest.mark.parametrize(
    ("family", "targets", "names"),
    [
        ("phi3", "all-linear", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("gpt2", "all-linear", {"c_attn", "c_proj", "c_fc"}),
        ("gpt_neox", ["query_key_value"], {"query_key_value"}),
    ],
)
@pytest.mark.parametrize("dora", [False, True])
def test_other_projections_are_tuned_and_merged(family, targets, names, dora):
    base = tiny_decoder(family)(IDS).logits
    decoder, config = tiny_decoder(family), AdapterConfig(rank=4, targets=targets, dora=dora)
    adapter = Adapter(decoder, config)
    assert adapter.config.bias is False
    torch.testing.assert_close(decoder(IDS).logits, base)
    assert {name.split(".")[-3] for name in adapter.parameters() if "lora_A" in name} == names
    for name, parameter in adapter.parameters().items():
        parameter.data += 0.2 * torch.randn_like(parameter) * ("magnitude" not in name)
    tuned = decoder(IDS).logits
    assert not torch.allclose(tuned, base, atol=1e-3)
    plain = tiny_decoder(family)
    tensors = {name: parameter.detach() for name, parameter in adapter.parameters().items()}
    merge(plain, config, tensors, torch.float32, source="x")
    torch.testing.assert_close(plain(IDS).logits, tuned, atol=1e-3, rtol=1e-3)


MIXTURES = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts", "gpt_oss": "num_local_experts"}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def mixture(family: str, **changes):
    sizes = {MIXTURES[family]: 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **changes}
    return tiny_decoder(family, **sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_that_are_one_tensor_are_tuned_by_name(family, dtype):
    decoder = mixture(family).to(dtype)
    base = decoder(IDS).logits
    adapter = Adapter(decoder, AdapterConfig(rank=4, targets=["q_proj", *EXPERTS], layers=2))
    assert torch.equal(decoder(IDS).logits, base)
    # Two matrices of a projection and of two tensors of experts, in two of three layers.
    assert sum("lora_" in name for name in adapter.parameters()) == 2 * 3 * 2
    assert {parameter.dtype for parameter in adapter.parameters().values()} == {torch.float32}


@pytest.mark.parametrize("family", MIXTURES)
def test_tuned_experts_learn_and_are_merged(family):
    decoder, config = mixture(family), AdapterConfig(rank=4, targets=[*EXPERTS, "o_proj"])
    base, adapter = decoder(IDS).logits, Adapter(decoder, config)
    for parameter in adapter.parameters().values():
        parameter.data += 0.2 * torch.randn_like(parameter)
        parameter.requires_grad_(True)
    tuned = decoder(IDS).logits
    tuned[..., :9].sum().backward()
    assert all(parameter.grad.any() for parameter in adapter.parameters().values())
    assert not torch.allclose(tuned, base, atol=1e-2)
    plain = mixture(family)
    tensors = {name: parameter.detach() for name, parameter in adapter.parameters().items()}
    merge(plain, config, tensors, torch.float32, source="x")
    torch.testing.assert_close(plain(IDS).logits, tuned, atol=1e-3, rtol=1e-3)
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in mixture(family).named_parameters()]


def test_experts_are_in_the_files_of_peft(tmp_path):
    mixture("mixtral").save_pretrained(tmp_path / "decoder")
    tiny_tokenizer().save_pretrained(tmp_path / "decoder")
    model = build(tmp_path / "decoder", targets=["q_proj", *EXPERTS])
    model.save_pretrained(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "model/adapter")
    assert torch.equal(theirs(IDS).logits, model.decoder(IDS).logits)


def test_experts_that_stay_frozen_are_reported(caplog):
    Adapter(mixture("mixtral"), AdapterConfig(rank=4, targets="all-linear"))
    (record,) = caplog.records
    assert "not tuned" in record.getMessage()
    assert "[k_proj, o_proj, q_proj, v_proj, experts.down_proj, experts.gate_up_proj]" in record.getMessage()
    with pytest.raises(
        DecoderError, match=r"has no gate_proj, .* its experts experts\.down_proj, experts\.gate_up"
    ):
        Adapter(mixture("mixtral"), AdapterConfig(rank=4))


@pytest.mark.parametrize("setting", [{"bias": True}, {"dora": True}, {"media_only": True}])
def test_settings_that_exclude_experts_are_named(setting):
    (name,) = setting
    with pytest.raises(InputError, match=rf"adapter with {name} and targets experts\.down_proj: peft adds"):
        AdapterConfig(targets=["q_proj", "experts.down_proj"], **setting)


def test_a_decoder_without_the_targets_names_its_projections():
    with pytest.raises(
        DecoderError, match=r"Phi3ForCausalLM has no q_proj.*are down_proj, gate_up_proj, o_proj, qkv_proj"
    ):
        Adapter(tiny_decoder("phi3"), AdapterConfig())
    for targets in ("all_linear", []):
        with pytest.raises(InputError, match=r"adapter\.targets is .*all-linear"):
            AdapterConfig(targets=targets)
