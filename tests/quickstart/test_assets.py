import errno
import hashlib
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from threading import Thread
from time import sleep

import pytest
import yaml

from bindllm.errors import ASSET_FOLDERS, AssetError, InputError, fetch_hint, known_asset
from bindllm.quickstart import ASSETS, Asset, assets_of, fetch, fetch_all
from bindllm.quickstart.packages import Downloads, Package

PACKAGE = Package(
    name="toys",
    version="1",
    file="toys-1.whl",
    sha256=hashlib.sha256(b"toys").hexdigest(),
    license="MIT",
    megabytes=1,
)


class Builder:
    """Copies its package into a file, and can be told to fail once or to take its time."""

    def __init__(self, *, failure=None, seconds=0.0):
        self.calls, self.failure, self.seconds = 0, failure, seconds

    def __call__(self, files, folder):
        self.calls += 1
        (folder / "sub").mkdir()
        (folder / "sub" / "toys.txt").write_bytes(files[0].read_bytes())
        sleep(self.seconds)
        if self.failure:
            failure, self.failure = self.failure, None
            raise failure
        return {"toys": 1}


@pytest.fixture
def shelf(tmp_path):
    """Keyword arguments for `fetch`: one asset, its package already downloaded, and a pip that does not exist."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / PACKAGE.file).write_bytes(b"toys")

    def arguments(build, package=PACKAGE, number=1):
        asset = Asset("data/toys", (package,), build, format=number)
        downloads = Downloads(tmp_path / "kept", pip=("no-such-command",))
        return {"root": tmp_path, "assets": {"toys": asset}, "downloads": downloads}

    return arguments


def test_fetch_builds_once_and_records_the_source(shelf, tmp_path):
    build = Builder()
    folder = fetch("toys", **shelf(build))
    assert folder == tmp_path / "data/toys"
    source = json.loads((folder / "SOURCE.json").read_text())
    assert source["asset"] == "toys"
    assert source["format"] == 1
    assert source["toys"] == 1
    assert source["packages"][0]["sha256"] == PACKAGE.sha256
    assert source["packages"][0]["license"] == "MIT"
    (tmp_path / "kept" / PACKAGE.file).unlink()
    assert fetch("toys", **shelf(build)) == folder
    assert build.calls == 1


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="the command sha256sum is missing")
def test_sha256sum_finds_damage(shelf):
    folder = fetch("toys", **shelf(Builder()))
    check = ["sha256sum", "--check", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=folder).returncode == 0
    (folder / "sub" / "toys.txt").write_bytes(b"toyz")
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 1


@pytest.mark.parametrize("failure", [RuntimeError("stop"), KeyboardInterrupt()])
def test_an_interrupted_build_leaves_nothing_and_can_be_repeated(shelf, tmp_path, failure):
    build = Builder(failure=failure)
    with pytest.raises(type(failure)):
        fetch("toys", **shelf(build))
    assert list((tmp_path / "data").iterdir()) == []
    assert (fetch("toys", **shelf(build)) / "sub" / "toys.txt").read_bytes() == b"toys"


def test_leftovers_of_a_killed_build_are_removed(shelf, tmp_path):
    killed = tmp_path / "data" / ".toys.12345678.part"
    killed.mkdir(parents=True)
    (killed / "half").touch()
    fetch("toys", **shelf(Builder()))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["toys"]


def test_a_full_disk_is_reported_and_the_old_folder_stays(shelf, tmp_path):
    folder = fetch("toys", **shelf(Builder()))
    full = Builder(failure=OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(AssetError, match=r"No space left on device.*bindllm fetch toys"):
        fetch("toys", **shelf(full, number=2))
    assert (folder / "sub" / "toys.txt").read_bytes() == b"toys"


def test_another_format_or_pin_makes_it_again(shelf, tmp_path):
    build = Builder()
    fetch("toys", **shelf(build))
    fetch("toys", **shelf(build, number=2))
    assert build.calls == 2
    (tmp_path / "kept" / "toys-2.whl").write_bytes(b"new toys")
    newer = replace(PACKAGE, file="toys-2.whl", sha256=hashlib.sha256(b"new toys").hexdigest())
    folder = fetch("toys", **shelf(build, number=2, package=newer))
    assert (folder / "sub" / "toys.txt").read_bytes() == b"new toys"


def test_a_folder_not_made_by_fetch_is_not_touched(shelf, tmp_path):
    mine = tmp_path / "data/toys/mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(AssetError, match="was not made by bindllm"):
        fetch("toys", **shelf(Builder()))
    assert mine.read_text() == "mine"


def test_two_at_once_build_once(shelf):
    build = Builder(seconds=0.1)
    threads = [Thread(target=fetch, args=["toys"], kwargs=shelf(build)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.calls == 1


def test_an_unknown_name_gets_the_closest():
    with pytest.raises(AssetError, match="Did you mean 'efficientnet-lite0'"):
        fetch("efficientnet")


def test_assets_of_finds_folders_anywhere_in_a_recipe():
    recipe = {
        "model": {
            "decoder": {"name": "./checkpoints/smollm2-135m-instruct/", "dtype": "auto"},
            "init_from": None,
        },
        "data": {
            "sources": [{"path": "data/openmoji/captions-with-skin-tones.jsonl"}, {"path": "data/openmoji"}]
        },
    }
    assert assets_of(recipe) == ["smollm2-135m-instruct", "openmoji"]
    assert assets_of({"path": "data/openmoji-of-mine", "other": "data", "key data/openmoji": 1}) == []


def test_known_asset_takes_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert known_asset(tmp_path / "data/stamps/captions.jsonl") == "stamps"
    assert known_asset("/data/stamps") is None
    assert fetch_hint("checkpoints/efficientnet-lite0").endswith("run: bindllm fetch efficientnet-lite0")
    assert fetch_hint("checkpoints/mine") == ""


def test_the_hint_names_every_asset():
    assert set(ASSET_FOLDERS) == set(ASSETS)
    for name, asset in ASSETS.items():
        assert fetch_hint(asset.folder).endswith(f"run: bindllm fetch {name}")


def test_fetch_all_takes_names_and_recipes(tmp_path, capsys):
    for name in ("openmoji", "stamps"):
        folder = tmp_path / ASSETS[name].folder
        folder.mkdir(parents=True)
        (folder / "SOURCE.json").write_text(json.dumps(ASSETS[name].pins()))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"sources": [{"path": "data/openmoji"}]}}))
    folders = fetch_all(["stamps", str(recipe), "openmoji"], tmp_path)
    assert folders == [tmp_path / "data/stamps", tmp_path / "data/openmoji"]
    assert capsys.readouterr().out.splitlines() == [f"already complete: {folder}" for folder in folders]


def test_fetch_all_reports_a_recipe_that_names_no_asset(tmp_path, capsys):
    (tmp_path / "mine.yml").write_text("data: {sources: [{path: my/pictures}]}")
    assert fetch_all([str(tmp_path / "mine.yml")], tmp_path) == []
    assert capsys.readouterr().out.startswith("nothing to fetch")


@pytest.mark.parametrize("text", [None, "a: [1", "- just\n- a list", b"\xff\xfe\x00"])
def test_fetch_all_names_an_unreadable_recipe(tmp_path, text):
    recipe = Path(tmp_path / "broken.yaml")
    if text is not None:
        recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"broken\.yaml"):
        fetch_all([str(recipe)], tmp_path)
