import pytest
import torch

from bindllm.errors import DecoderError, InputError
from bindllm.model.decoder import (
    DecoderConfig,
    choose_dtype,
    fingerprint_decoder,
    has_plain_logits,
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


def test_the_vocabulary_projection_is_one_multiplication_for_a_batch(tmp_path):
    decoder = load_decoder(
        DecoderConfig(str(save_tiny_decoder(tmp_path / "d")), dtype="float32"), device="cpu"
    )
    ids, given = torch.tensor([[5, 6, 7], [8, 9, 10]]), []
    decoder.get_output_embeddings().register_forward_pre_hook(lambda _, args: given.append(args[0]))
    last = decoder(ids, logits_to_keep=1).logits
    assert given[0].shape[:2] == (2, 1)
    assert given[0].is_contiguous()  # the slice that transformers takes is not
    assert torch.allclose(last[:, 0], decoder(ids).logits[:, -1], atol=1e-6)


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


@pytest.mark.parametrize("amx", [True, False])
def test_cpus_use_bfloat16_only_where_they_multiply_it(monkeypatch, amx):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx})
    assert choose_dtype("cpu") == (torch.bfloat16 if amx else torch.float32)


def test_the_dtype_of_the_recipe_wins(tmp_path):
    folder = str(save_tiny_decoder(tmp_path / "d"))
    assert load_decoder(DecoderConfig(folder, dtype="bfloat16"), device="cpu").dtype == torch.bfloat16
    with pytest.raises(InputError, match="Did you mean 'bfloat16'"):
        DecoderConfig(folder, dtype="bfloat")


def test_a_folder_that_is_not_there_or_not_a_decoder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DecoderError, match="does not exist"):
        load_decoder(DecoderConfig(str(tmp_path / "nothing")), device="cpu")
    with pytest.raises(DecoderError, match="bindllm fetch smollm2-135m-instruct"):
        load_decoder(DecoderConfig("checkpoints/smollm2-135m-instruct"), device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DecoderError, match="does not hold a causal language model"):
        load_decoder(DecoderConfig(str(tmp_path / "empty")), device="cpu")


def test_pickled_weights_are_refused(tmp_path):
    folder = save_tiny_decoder(tmp_path / "d")
    torch.save(tiny_decoder().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DecoderError, match="safetensors"):
        load_decoder(DecoderConfig(str(folder)), device="cpu")


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
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    template = tmp_path / "b" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert len({same[0], fingerprint_decoder(tmp_path / "a"), fingerprint_decoder(tmp_path / "b")}) == 3
    (tmp_path / "b" / "model.safetensors").unlink()
    with pytest.raises(DecoderError, match="cannot be identified"):
        fingerprint_decoder(tmp_path / "b")


def test_families_that_change_their_logits_are_known():
    assert has_plain_logits(tiny_decoder("llama"))
    assert not has_plain_logits(tiny_decoder("gemma2"))
    assert not has_plain_logits(tiny_decoder("granite", logits_scaling=8.0))
