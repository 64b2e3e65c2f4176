"""lmms-eval in an environment of its own runs tasks over a local file, without a network."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from bindllm import BindLLM, Media
from lmms_eval_task import write_tasks
from tiny import color_images, tiny_model

ROOT = Path(__file__).parents[2]
# Large, and not needed: the parent environment has torch, and models of others need the rest.
LEFT_OUT = ("torch", "torchvision", "timm")
REQUIREMENTS = f"""
from importlib.metadata import requires
from packaging.requirements import Requirement
found = map(Requirement, requires("lmms-eval"))
needed = [r for r in found if r.name not in {LEFT_OUT} and (r.marker is None or r.marker.evaluate(dict(extra="")))]
print("\\n".join(map(str, needed)))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python with lmms-eval and this source tree, which sees the packages of this one after its own."""
    folder = tmp_path_factory.mktemp("lmms_eval")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(packages, "parent.pth").write_text(sysconfig.get_path("purelib"))
    # A copy, as building writes into the tree.
    source = folder / "source"
    run("git", "clone", "-q", ROOT, source)
    # Compiling all modules takes longer than the tests, which import few.
    install = python, "-m", "pip", "install", "-q", "--no-compile"
    try:
        run(*install, "--no-deps", "lmms-eval", source)
        (folder / "needed.txt").write_text(run(python, "-c", REQUIREMENTS))
        run(*install, "-r", folder / "needed.txt")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"lmms-eval cannot be installed here: {error.stderr[-500:]}")
    return python


@pytest.fixture(scope="module")
def setting(decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("colors")
    tiny_model(decoder).save_pretrained(folder / "checkpoint")
    images = sorted((color_images(folder / "images") / "images").glob("*.png"))[::3]
    write_tasks(folder / "tasks", images)
    return folder, images


def test_answers_are_those_of_the_model(python, setting):
    folder, images = setting
    _, answers = evaluate(python, folder, "generate_until")
    model = BindLLM.from_pretrained(folder / "checkpoint", allow=["tiny.ColorEncoder"])
    expected = [model.generate("Which color?", [Media.image(image)], max_new_tokens=3) for image in images]
    assert [answer[0] for answer in answers] == [text.split(".")[0] for text in expected]


def test_the_most_likely_option_is_chosen(python, setting):
    folder, _ = setting
    results, answers = evaluate(python, folder, "multiple_choice")
    chosen = [min((0, 1), key=lambda n: options[n][0]) for options in answers]
    right = [choice == n % 2 for n, choice in enumerate(chosen)]
    assert results["acc,none"] == pytest.approx(sum(right) / len(right))


def evaluate(python, folder, kind):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "PYTHONPATH": str(ROOT / "tests"),
    }
    script = ROOT / "tests" / "lmms_eval_task.py"
    out = run(python, script, folder / "checkpoint", folder / "tasks", kind, env=environment, cwd=folder)
    return json.loads(out.rpartition("RESULT ")[2])


def run(*command, **options):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
        done.check_returncode()
    return done.stdout
