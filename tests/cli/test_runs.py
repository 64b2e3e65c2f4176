import subprocess
import sys
from pathlib import Path

import pytest

from bindllm.errors import InputError
from bindllm.training.run import lock_run, open_run, run_folder

RECIPE = "model:\n  lr: 1\n  name: a\n"


def interrupted(folder: Path, recipe: str = RECIPE) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "last.ckpt").write_text(recipe)
    return folder


def test_the_folder_is_named_after_the_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder("checkpoints/mine/") == Path("runs/mine")
    (tmp_path / "photos").mkdir()
    assert run_folder("photos") == Path("runs/photos")
    (tmp_path / "photos" / "a.png").write_text("")
    with pytest.raises(InputError, match="other content"):
        run_folder("photos")


def test_a_run_does_not_replace_what_it_starts_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder("checkpoints/second", init_from="checkpoints/first") == Path("runs/second")
    with pytest.raises(InputError, match=r"output checkpoints/first is model\.init_from too"):
        run_folder("checkpoints/first", init_from=tmp_path / "checkpoints/first/")


def test_the_same_recipe_goes_on_and_leftovers_of_a_kill_are_removed(tmp_path, capsys):
    folder = interrupted(tmp_path / "run")
    (folder / ".last.ckpt.0123.part").write_text("half")
    open_run(folder, RECIPE)
    assert "resuming" in capsys.readouterr().out
    assert sorted(file.name for file in folder.iterdir()) == ["last.ckpt", "recipe.yaml"]


def test_another_recipe_starts_afresh_keeps_the_old_run_and_names_the_change(tmp_path, capsys):
    folder = interrupted(tmp_path / "run")
    open_run(folder, RECIPE.replace("1", "2"))
    told = capsys.readouterr().out
    assert "model.lr: 1 -> 2" in told
    assert "model.name" not in told
    assert (tmp_path / "run.previous" / "last.ckpt").read_text() == RECIPE
    assert [file.name for file in folder.iterdir()] == ["recipe.yaml"]


def test_asked_to_start_afresh_it_does(tmp_path):
    folder = interrupted(tmp_path / "run")
    open_run(folder, RECIPE, resume=False)
    assert not (folder / "last.ckpt").exists()
    assert (tmp_path / "run.previous" / "last.ckpt").exists()


def test_a_run_without_a_state_never_takes_the_place_of_one_with_it(tmp_path):
    interrupted(tmp_path / "run")
    open_run(tmp_path / "run", "other: 1\n")
    open_run(tmp_path / "run", "other: 2\n")
    assert (tmp_path / "run.previous" / "last.ckpt").read_text() == RECIPE


def test_a_state_without_its_recipe_is_set_aside(tmp_path):
    folder = interrupted(tmp_path / "run")
    (folder / "recipe.yaml").unlink()
    open_run(folder, RECIPE)
    assert not (folder / "last.ckpt").exists()


def test_a_second_run_is_kept_out_while_the_first_goes_on(tmp_path):
    folder = tmp_path / "runs" / "x"
    code = (
        "import sys; from pathlib import Path; from bindllm.training.run import lock_run\n"
        f"with lock_run(Path({str(folder)!r})): print('in')"
    )

    def second() -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    with lock_run(folder):
        assert "another run is using" in second().stderr
    assert second().stdout == "in\n"


@pytest.mark.parametrize("key", ["devices", "num_nodes"])
def test_another_number_of_processes_alone_is_no_reason_to_start_afresh(key, tmp_path):
    folder = interrupted(tmp_path / "run", f"trainer:\n  {key}: 2\n")
    with pytest.raises(InputError, match=rf"trainer\.{key}: 2 -> 4.*--resume false"):
        open_run(folder, f"trainer:\n  {key}: 4\n")
    assert (folder / "last.ckpt").exists()
    with pytest.raises(InputError, match="another number of processes"):
        open_run(folder, f"trainer:\n  {key}: 4\n  strategy: ddp\n")
    open_run(folder, f"trainer:\n  {key}: 4\n", resume=False)
    assert (tmp_path / "run.previous" / "last.ckpt").exists()


def test_another_strategy_alone_starts_afresh(tmp_path):
    folder = interrupted(tmp_path / "run", "trainer:\n  devices: 2\n  strategy: ddp\n")
    open_run(folder, "trainer:\n  devices: 2\n  strategy: other\n")
    assert (tmp_path / "run.previous" / "last.ckpt").exists()
