"""The folder of a pipeline: other kinds, missing and exchanged parts, pickles, code, and weights that do not fit."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bindllm.errors import CheckpointError
from bindllm.unclip.folder import load_part, load_pipeline, read_pipeline
from bindllm.unclip.images import PipelineImages


@pytest.fixture
def copied(pipeline, tmp_path) -> Path:
    return shutil.copytree(pipeline, tmp_path / "copied")


def change(file: Path, **entries) -> None:
    content = {**json.loads(file.read_text()), **entries}
    file.write_text(json.dumps(content))


def load(folder: Path):
    images = PipelineImages(str(folder))
    return load_pipeline(images.spec, images.model, device="cpu", dtype=torch.float32)


def test_the_facts_are_those_of_the_files(pipeline):
    spec = read_pipeline(str(pipeline))
    assert (spec.name, spec.width, spec.license) == ("tiny", 32, "openrail++")


def test_a_folder_that_is_missing_never_becomes_a_download(tmp_path):
    with pytest.raises(CheckpointError, match="pipeline folder .* does not exist"):
        read_pipeline(str(tmp_path / "nowhere"))


def test_an_id_is_downloaded_without_pickles_and_copies(pipeline, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(pipeline)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert read_pipeline("lab/unclip", "abc").name == "lab/unclip"
    assert (asked["name"], asked["revision"]) == ("lab/unclip", "abc")

    def is_taken(file: str) -> bool:
        return any(fnmatch(file, pattern) for pattern in asked["allow_patterns"])

    needed = [str(file.relative_to(pipeline)) for file in pipeline.rglob("*") if file.is_file()]
    assert all(map(is_taken, needed))
    copies = ("unclip.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/model.bin", "a.py")
    assert not any(map(is_taken, copies))


def test_another_kind_of_pipeline_is_refused(copied):
    change(copied / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(CheckpointError, match="StableDiffusionPipeline .it takes no image embedding"):
        read_pipeline(str(copied))
    # Text to image: it has a prior that makes the embedding.
    change(
        copied / "model_index.json",
        _class_name="StableUnCLIPPipeline",
        prior=["diffusers", "PriorTransformer"],
    )
    with pytest.raises(CheckpointError, match="its own embedding of a text, through a prior"):
        read_pipeline(str(copied))
    (copied / "model_index.json").unlink()
    with pytest.raises(CheckpointError, match="give the folder of a StableUnCLIPImg2ImgPipeline"):
        read_pipeline(str(copied))


@pytest.mark.parametrize(
    "part", ["image_encoder", "image_normalizer", "tokenizer", "image_noising_scheduler"]
)
def test_a_missing_part_is_named(copied, part):
    shutil.move(copied / part, copied / "elsewhere")
    with pytest.raises(CheckpointError, match=f"has no {part}"):
        read_pipeline(str(copied))
    shutil.move(copied / "elsewhere", copied / part)
    change(copied / "model_index.json", **{part: [None, None]})
    with pytest.raises(CheckpointError, match=f"has no {part}"):
        read_pipeline(str(copied))


def test_code_of_the_folder_does_not_run(copied):
    (copied / "unet/my_unet.py").write_text("raise SystemExit('code of the folder ran')")
    change(copied / "model_index.json", unet=["my_unet", "MyUNet"])
    with pytest.raises(CheckpointError, match="its unet is a MyUNet, expected a UNet2DConditionModel"):
        read_pipeline(str(copied))
    # The library is not asked for a class, and a custom pipeline in the folder is not looked for.
    change(copied / "model_index.json", unet=["my_unet", "UNet2DConditionModel"])
    (copied / "pipeline.py").write_text("raise SystemExit('code of the folder ran')")
    (copied / "StableUnCLIPImg2ImgPipeline.py").write_text("raise SystemExit('code of the folder ran')")
    assert load(copied).unet.config.sample_size == 32


@pytest.mark.parametrize("kind", ["DiffusionPipeline", "os", "NoScheduler", 7])
def test_a_scheduler_is_a_class_of_diffusers(copied, kind):
    change(copied / "scheduler/scheduler_config.json", _class_name=kind)
    with pytest.raises(CheckpointError, match="is not a scheduler of diffusers"):
        load(copied)


def test_pickles_are_not_read(copied):
    file = copied / "unet/diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), copied / "unet/diffusion_pytorch_model.bin")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"unet holds no \*.safetensors"):
        read_pipeline(str(copied))
    # A file of safetensors under another name does not let the pickle in.
    save_file({"a": torch.ones(1)}, copied / "unet/other.safetensors")
    with pytest.raises(CheckpointError, match="no usable model here"):
        load(copied)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "image_encoder", "image_normalizer"])
def test_weights_that_would_be_random_are_refused(copied, part):
    [file] = (copied / part).glob("*.safetensors")
    tensors = load_file(file)
    first, *others = tensors
    save_file({name: tensors[name] for name in others}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="they would be random") as refused:
        load_part(copied, part, dtype=torch.float32)
    assert first in str(refused.value)


def test_weights_that_are_not_finite_are_refused(copied):
    [file] = (copied / "vae").glob("*.safetensors")
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"][0] = 1e30
    save_file(tensors, file, metadata={"format": "pt"})
    load_part(copied, "vae", dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match="not finite in float16: decoder.conv_out.bias"):
        load_part(copied, "vae", dtype=torch.float16)


def test_a_normalizer_that_divides_by_zero_is_refused(copied):
    [file] = (copied / "image_normalizer").glob("*.safetensors")
    save_file({"mean": torch.zeros(1, 32), "std": torch.zeros(1, 32)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="deviations that are not above 0"):
        load(copied)


@pytest.mark.parametrize(
    ("part", "entries"),
    [
        ("image_normalizer", {"embedding_dim": 16}),
        ("unet", {"projection_class_embeddings_input_dim": 32}),
        ("unet", {"cross_attention_dim": 16}),
    ],
)
def test_parts_of_different_widths_are_refused(copied, part, entries):
    change(copied / part / "config.json", **entries)
    with pytest.raises(CheckpointError, match=f"its {part} has {next(iter(entries))}"):
        read_pipeline(str(copied))
