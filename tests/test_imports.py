"""Only modules that the user names are imported from the working directory, with the modules that they import."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bindllm import imports
from bindllm.cli.recipes.recipe import name_classes
from cache_parts import save_tiny_model
from tiny_run import tiny_parts, tiny_recipe, write_recipe

TESTS = Path(__file__).parent
# Names that torch, transformers, lightning, jsonargparse and others look for, where they are not installed.
PROBED = (
    "cuda cupy numba pydot deepspeed tensorflow jax flax wandb mlflow comet_ml neptune omegaconf pydantic attrs attr "
    "shtab argcomplete ruyaml typeguard apex fairscale optree hydra onnx onnxscript torch_xla kernels "
    "soxr numexpr bottleneck pyarrow tables fsspec_xrootd opt_einsum rjieba sentencepiece av_missing sitecustomize "
    "usercustomize z3 sympy_missing dill cloudpickle ujson orjson simplejson defusedxml olefile gmpy2 flint mkl"
)
TRAPS = [name for name in PROBED.split() if find_spec(name) is None]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working directory with an encoder, the module that it imports, and traps."""
    (tmp_path / "my_lab.py").write_text("from my_net import Base\n\n\nclass Encoder(Base):\n    pass\n")
    (tmp_path / "my_net.py").write_text("from tiny import ColorEncoder as Base\n")
    for name in TRAPS:
        (tmp_path / f"{name}.py").write_text("open('trapped', 'a').write(__name__ + ' ')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [one for one in sys.meta_path if one is not imports._NAMED])
    imports.find_named_modules()
    yield tmp_path
    imports._NAMED.folders.clear()


def run_commands(*lines: list[str], script: bool = True) -> None:
    """Run commands in a process of their own, by default as the installed script: without this folder on the path."""
    code = f"import sys; from bindllm.cli import main; sys.exit(any([main(line) for line in {lines!r}]))"
    call = ["-P", "-c", code] if script else ["-m", "bindllm.cli", *lines[0]]
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    done = subprocess.run(
        [sys.executable, *call],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PYTHONNOUSERSITE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert not Path("trapped").exists(), Path("trapped").read_text()


def visible() -> set[str]:
    return {file.stem for file in Path().glob("*.py") if find_spec(file.stem) is not None}


def test_a_named_module_and_its_imports_are_visible(here):
    assert visible() == set()
    imports.name_module("my_lab.Encoder")
    assert visible() == {"my_lab", "my_net"}


def test_packages_and_relative_imports(here):
    (here / "lab/parts").mkdir(parents=True)
    (here / "lab/encoder.py").write_text("from .parts import net\nfrom . import words\nimport os, far.away\n")
    (here / "lab/parts/net.py").write_text("def build():\n    import late\n")
    (here / "lab/words.py").write_text("import of_words\nfrom ..above import x\n")
    (here / "far").mkdir()
    (here / "far/away.py").write_text("this is not Python")
    for name in ("late", "of_words", "os", "lab_other"):
        (here / f"{name}.py").touch()
    imports.name_module("lab.encoder.Encoder")
    assert set(imports._NAMED.folders) == {"lab", "late", "of_words", "os", "far"}
    assert find_spec("lab.encoder").origin == str(here / "lab/encoder.py")
    assert find_spec("os").origin != str(here / "os.py")


@pytest.mark.parametrize(
    "path", ["", ".", "..", "my_lab..Encoder", "/my_lab.py", "my-lab.Encoder", "nothing.Encoder"]
)
def test_a_path_to_nothing_names_nothing(here, path):
    imports.name_module(path)
    assert visible() == set()


def test_without_the_command_nothing_is_visible(here, monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [one for one in sys.meta_path if one is not imports._NAMED])
    imports.name_module("my_lab.Encoder")
    assert visible() == set()


@pytest.mark.parametrize(
    "args",
    [
        ["--model.encoders+=my_lab.Encoder"],
        ["--model.encoders", "[{class_path: my_lab.Encoder}]"],
        ["--model.encoders.class_path", "my_lab.Encoder"],
        ["--config", "a.yaml"],
        ["--config=a.yaml"],
        ["--config", "inner.yaml"],
        ["--model", "sub/part.yaml"],
    ],
)
def test_a_recipe_names_a_class_anywhere(here, args):
    (here / "sub").mkdir()
    Path("a.yaml").write_text("model: {objective: {init_args: {rewards: [x, {of: my_lab.Encoder}]}}}\n")
    Path("inner.yaml").write_text("model: sub/part.yaml\nother: sub/missing.yaml\n")
    Path("sub/part.yaml").write_text("a: [part.yaml, my_lab.Encoder]\n")
    name_classes(args)
    assert visible() == {"my_lab", "my_net"}


def test_a_file_of_data_names_no_module(here):
    Path("cuda.jsonl").touch()
    name_classes(["--data.sources", "[{path: cuda.jsonl}]", "--output", "pydot", "--x", "{"])
    assert visible() == set()


def test_the_module_of_the_command_does_not_look_in_this_folder(here):
    # Of the standard library, which this command imports and little else.
    (here / "base64.py").write_text("open('trapped', 'a').write(__name__ + ' ')\n")
    run_commands(["fetch", "--help"], script=False)


@pytest.fixture
def commands(here) -> list[list[str]]:
    """Command lines with a model, an encoder and a recipe of this folder, which has further traps."""
    save_tiny_model(here / "model", here / "decoder")
    manifest = here / "model/bindllm.json"
    manifest.write_text(manifest.read_text().replace("cache_parts.Multimodal", "my_lab.Encoder"))
    # The encoder has the settings of the checkpoint's, and another fingerprint: it was imported to find that out.
    (here / "my_net.py").write_text("from cache_parts import Multimodal as Base\n")
    loads = ["model", "--allow", "my_lab.Encoder"]
    tiny_parts(here)
    for name in ("base64", "selectors"):
        # Of the standard library, which a spawned process could find here first.
        (here / f"{name}.py").write_text("open('trapped', 'a').write(__name__ + ' ')\n")
    model = {"encoders": [{"class_path": "my_lab.Encoder"}]}
    config = ["--config", str(write_recipe(tiny_recipe(here, model=model, trainer={"max_epochs": 1})))]
    return [
        ["encode", "text:a dog", "text:a cat", "--encoder", "my_lab.Encoder"],
        ["check", "--folder", *loads],
        ["generate", *loads, "--max_new_tokens", "2"],
        ["fit", *config],
    ]


def test_commands_import_what_is_named_and_nothing_else(commands):
    run_commands(*commands)


@pytest.mark.slow
def test_processes_of_a_command_import_what_is_named_and_nothing_else(commands):
    run_commands(["embed", *commands[-1][1:], "--trainer.devices", "2"])
