import sys
import zipfile
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from bindllm.errors import AssetError, MissingExtraError
from bindllm.quickstart import wheels as models

FOLDER = Path("checkpoints/smollm2-135m-instruct")
NAMES = {name: key for key, name in {**models._LAYER_NAMES, **models._OUTER_NAMES}.items()}


def write_gguf(path, decoder, *, extra=()):
    """Write a Llama and the tiny tokenizer as llama.cpp's converter does: other names, rotated query and key."""
    config, tokenizer = decoder.config, tiny.tiny_tokenizer()
    words = [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "ab"]
    writer = GGUFWriter(path, "llama")
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(tiny.TEMPLATE)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in decoder.state_dict().items():
        stem, leaf = name.rsplit(".", 1)
        prefix, layer = "", stem.removeprefix("model.layers.")
        if layer != stem:
            prefix, stem = f"blk.{layer.split('.')[0]}.", layer.split(".", 1)[1]
        if (kind := NAMES[stem]) in heads:
            tensor = tensor.unflatten(0, (heads[kind], 2, -1)).transpose(1, 2).flatten(0, 2)
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            writer.add_tensor(f"{prefix}{kind}.{leaf}", tensor.numpy().copy())
    for name in extra:
        writer.add_tensor(name, torch.zeros(1).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def wheel_of(folder, decoder, **changes):
    """Return a wheel that holds ``decoder``, with an empty folder to convert it into."""
    write_gguf(folder / "tiny.gguf", decoder, **changes)
    with zipfile.ZipFile(folder / "tiny.whl", "w") as wheel:
        wheel.write(folder / "tiny.gguf", "llm_tiny/tiny.gguf")
        wheel.writestr("llm_tiny-1.dist-info/LICENSE", "Apache")
    (folder / "made").mkdir()
    return [folder / "tiny.whl"], folder / "made"


@pytest.mark.parametrize("tied", [True, False])
def test_the_converted_decoder_is_the_decoder_in_bfloat16(tmp_path, tied):
    decoder = tiny.tiny_decoder(vocab_size=260, tie_word_embeddings=tied)
    decoder.load_state_dict({name: value.bfloat16() for name, value in decoder.state_dict().items()})
    wheels, folder = wheel_of(tmp_path, decoder)
    models.build_smollm2(wheels, folder)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(40).reshape(2, 20)
    assert torch.equal(made(ids).logits, decoder(ids).logits)
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == tied
    assert (made.generation_config.eos_token_id, made.generation_config.pad_token_id) == (2, 2)
    assert not list(folder.rglob("*.gguf"))
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set()


def test_the_tokenizer_splits_digits_before_words(tmp_path):
    wheels, folder = wheel_of(tmp_path, tiny.tiny_decoder(vocab_size=260))
    models.build_smollm2(wheels, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # "a" and "b" are the one merge; digits are split from their neighbors, and special tokens stay whole.
    assert tokenizer.tokenize("ab 12<|im_end|>") == ["ab", "Ġ", "1", "2", "<|im_end|>"]
    text = "naïve 你好\n\n 3.14 \x00\t🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == (
        "<|im_end|>",
        "<|im_end|>",
        512,
    )
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n"


def test_an_unknown_tensor_is_refused(tmp_path):
    wheels, folder = wheel_of(tmp_path, tiny.tiny_decoder(vocab_size=260), extra=["blk.0.attn_q_norm.weight"])
    with pytest.raises(AssetError, match=r"blk\.0\.attn_q_norm\.weight"):
        models.build_smollm2(wheels, folder)


def test_without_gguf_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"bindllm\[quickstart\]"):
        models.build_smollm2([tmp_path / "any.whl"], tmp_path)


@pytest.mark.slow
def test_the_real_decoder_answers():
    tokenizer, decoder = AutoTokenizer.from_pretrained(FOLDER), AutoModelForCausalLM.from_pretrained(FOLDER)
    assert tokenizer.tokenize("a  3\n\n12") == ["a", "ĠĠ", "3", "ĊĊ", "1", "2"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = decoder.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer, skip_special_tokens=True)
