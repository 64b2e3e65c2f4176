import json
import os

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from bindllm.errors import DecoderError, InputError
from bindllm.model.decoder import (
    DecoderConfig,
    check_weights,
    choose_dtype,
    fingerprint_decoder,
    load_decoder,
    load_tokenizer,
)
from tiny import save_tiny_decoder, tiny_decoder, tiny_tokenizer


def test_a_loaded_decoder_is_frozen_and_in_eval_mode(tmp_path):
    decoder = load_decoder(
        DecoderConfig(str(save_tiny_decoder(tmp_path / "d")), dtype="float32"), device="cpu"
    )
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    assert not any(module.training for module in decoder.modules())
    assert load_tokenizer(DecoderConfig(str(tmp_path / "d"))).pad_token_id == 0


def test_tokenizers_that_lack_something_name_the_remedy(tmp_path):
    tokenizer, folder = tiny_tokenizer(), save_tiny_decoder(tmp_path / "d")
    config = DecoderConfig(str(folder))

    def load(**changes):
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        for file in folder.glob("*token*"):
            file.unlink()
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        tokenizer.save_pretrained(folder)
        return load_tokenizer(config)

    # Padding is masked: the end token will do.
    assert load(pad_token=None).pad_token == "<|im_end|>"
    with pytest.raises(DecoderError, match="no chat template.*template: alpaca"):
        load(chat_template=None)
    with pytest.raises(DecoderError, match="neither a padding nor an end token; name .* eos_token"):
        load(eos_token=None)


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"amx_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.float32),
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_cpus_use_bfloat16_only_where_it_is_faster(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_dtype("cpu") == dtype


def test_the_dtype_of_the_recipe_wins(tmp_path):
    folder = str(save_tiny_decoder(tmp_path / "d"))
    assert load_decoder(DecoderConfig(folder, dtype="bfloat16"), device="cpu").dtype == torch.bfloat16
    with pytest.raises(InputError, match="Did you mean 'bfloat16'"):
        DecoderConfig(folder, dtype="bfloat")


def test_the_attention_of_the_recipe_is_used(tmp_path):
    folder = str(save_tiny_decoder(tmp_path / "d"))
    ids = torch.arange(3, 10).unsqueeze(0)
    logits = []
    for attention in ("eager", "sdpa"):
        decoder = load_decoder(DecoderConfig(folder, dtype="float32", attention=attention), device="cpu")
        assert decoder.config._attn_implementation == attention
        logits.append(decoder(ids).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="Did you mean 'eager'"):
        DecoderConfig(folder, attention="eagre")


def test_a_folder_that_is_not_there_or_not_a_decoder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DecoderError, match="does not exist"):
        load_decoder(DecoderConfig(str(tmp_path / "nothing")), device="cpu")
    with pytest.raises(DecoderError, match="bindllm fetch smollm2-135m-instruct"):
        load_decoder(DecoderConfig("checkpoints/smollm2-135m-instruct"), device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DecoderError, match="no usable causal language model here"):
        load_decoder(DecoderConfig(str(tmp_path / "empty")), device="cpu")


def test_pickled_weights_are_refused(tmp_path):
    folder = save_tiny_decoder(tmp_path / "d")
    torch.save(tiny_decoder().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DecoderError, match="safetensors"):
        load_decoder(DecoderConfig(str(folder)), device="cpu")


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_decoder_without_a_tensor_is_refused_not_filled_at_random(tmp_path, name):
    folder = save_tiny_decoder(tmp_path / "d")
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for load in (check_weights, lambda folder: load_decoder(DecoderConfig(str(folder)), device="cpu")):
        with pytest.raises(DecoderError, match=f"no weights for {name}"):
            load(folder)


def test_a_decoder_with_tied_ends_needs_no_second_matrix(tmp_path):
    check_weights(save_tiny_decoder(tmp_path / "d", tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"", "not a readable safetensors file"),
        (None, "not a readable safetensors file"),
    ],
)
def test_a_weights_file_that_is_a_pointer_empty_or_cut_is_named(tmp_path, content, words):
    file = save_tiny_decoder(tmp_path / "d") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(DecoderError, match=rf"model\.safetensors.*{words}"):
        fingerprint_decoder(tmp_path / "d")


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size"])
def test_absurd_sizes_end_in_an_error_not_in_a_hang(tmp_path, key):
    file = save_tiny_decoder(tmp_path / "d") / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: 10**9}))
    with pytest.raises(DecoderError, match="num_hidden_layers 1e.09, expected at most|no usable causal"):
        check_weights(tmp_path / "d")


def test_a_folder_named_like_an_organization_does_not_hide_a_downloaded_model(tmp_path, monkeypatch):
    folder, asked = save_tiny_decoder(tmp_path / "cache"), []

    def download(name, *, local_files_only=False, **options):
        asked.append((name, local_files_only))
        if name == "lab/tiny":
            return str(folder)
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lab").mkdir()
    assert DecoderConfig("lab/tiny").folder() == folder
    with pytest.raises(DecoderError, match="decoder folder 'lab/tinny' does not exist"):
        DecoderConfig("lab/tinny").folder()
    assert asked == [("lab/tiny", True), ("lab/tinny", True)]


def test_weights_that_overflow_are_refused(tmp_path):
    folder = save_tiny_decoder(tmp_path / "d")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DecoderError, match=r"not finite in float16: model\.norm\.weight"):
        load_decoder(DecoderConfig(str(folder), dtype="float16"), device="cpu")
    load_decoder(DecoderConfig(str(folder), dtype="bfloat16"), device="cpu")


def test_a_fifo_in_place_of_a_file_is_not_opened(tmp_path):
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"):
        folder = save_tiny_decoder(tmp_path / name)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(DecoderError, match="not a regular file"):
            fingerprint_decoder(folder)


def test_the_fingerprint_tells_decoders_apart(tmp_path):
    same = [fingerprint_decoder(save_tiny_decoder(tmp_path / name)) for name in ("a", "b")]
    other = [
        fingerprint_decoder(save_tiny_decoder(tmp_path / "c", seed=1)),
        fingerprint_decoder(save_tiny_decoder(tmp_path / "d", "qwen2")),
        fingerprint_decoder(save_tiny_decoder(tmp_path / "e", hidden_size=64)),
    ]
    assert same[0] == same[1]
    assert len({same[0], *other}) == 4
    file = tmp_path / "a" / "config.json"
    file.write_text(file.read_text().replace('"transformers_version": "', '"transformers_version": "9'))
    assert fingerprint_decoder(tmp_path / "a") == same[0]
    (tmp_path / "b" / "model.safetensors").unlink()
    with pytest.raises(DecoderError, match="cannot be identified"):
        fingerprint_decoder(tmp_path / "b")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"rms_norm_eps": 1e-05}),
        ("chat_template.jinja", "{{ messages }}"),
        ("additional_chat_templates/tools.jinja", "{{ messages }}"),
        ("tokenizer_config.json", {"chat_template": "{{ messages }}"}),
        ("tokenizer_config.json", {"eos_token": "<|im_start|>"}),
        ("tokenizer_config.json", {"pad_token": "<|im_end|>"}),
        ("tokenizer.json", {"added_tokens": []}),
        ("added_tokens.json", {"<|new|>": 7}),
        ("special_tokens_map.json", {"eos_token": "<|im_start|>"}),
        ("vocab.json", {"a": 1, "b": 0}),
        ("merges.txt", "b a"),
        ("tokenizer.model", "pieces"),
        ("generation_config.json", {"eos_token_id": 7}),
        ("generation_config.json", {"pad_token_id": [7]}),
    ],
)
def test_the_fingerprint_covers_the_prompt(tmp_path, file, content):
    path = save_tiny_decoder(tmp_path / "d") / file
    before = fingerprint_decoder(tmp_path / "d")
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, dict):
        content = json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content)
    path.write_text(content)
    assert fingerprint_decoder(tmp_path / "d") != before
