import multiprocessing
import os
import sys
from pathlib import Path

import pytest

from bindllm.errors import InputError
from bindllm.training.run import lock_output, open_run, run_folder

OUTPUT = Path("nothing")
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
    assert run_folder("photos").name.startswith("photos-")
    (tmp_path / "photos" / "a.png").write_text("")
    with pytest.raises(InputError, match="not a bindllm checkpoint"):
        run_folder("photos")


def test_an_output_does_not_contain_what_the_run_fills(tmp_path, monkeypatch):
    """At the end of the run it would be refused as a folder of something else, or replaced with its embeddings."""
    monkeypatch.chdir(tmp_path)
    for output, store in (
        ("data", tmp_path / "data/store"),
        ("data/store", "data/store"),
        ("runs", "data/store"),
    ):
        with pytest.raises(InputError, match=f"output {output} contains "):
            run_folder(output, store=store)
    assert run_folder("data/model", store="data/store").parent == Path("runs")


def test_a_run_does_not_replace_what_it_starts_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder("checkpoints/second", init_from="checkpoints/first") == Path("runs/second")
    with pytest.raises(InputError, match=r"output checkpoints/first is model\.init_from too"):
        run_folder("checkpoints/first", init_from=tmp_path / "checkpoints/first/")


def test_the_same_recipe_goes_on_and_leftovers_of_a_kill_are_removed(tmp_path, capsys):
    folder = interrupted(tmp_path / "run")
    (folder / ".last.ckpt.0123.part").write_text("half")
    open_run(folder, RECIPE, OUTPUT)
    assert "resuming" in capsys.readouterr().out
    assert sorted(file.name for file in folder.iterdir()) == ["last.ckpt", "recipe.yaml"]


def test_another_recipe_starts_afresh_keeps_the_old_run_and_names_the_change(tmp_path, capsys):
    folder = interrupted(tmp_path / "run")
    open_run(folder, RECIPE.replace("1", "2"), OUTPUT)
    told = capsys.readouterr().out
    assert "model.lr: 1 -> 2" in told
    assert "model.name" not in told
    assert (tmp_path / "run.previous" / "last.ckpt").read_text() == RECIPE
    assert [file.name for file in folder.iterdir()] == ["recipe.yaml"]


def test_asked_to_start_afresh_it_does(tmp_path):
    folder = interrupted(tmp_path / "run")
    open_run(folder, RECIPE, OUTPUT, resume=False)
    assert not (folder / "last.ckpt").exists()
    assert (tmp_path / "run.previous" / "last.ckpt").exists()


def test_interrupted_runs_are_never_deleted_and_their_own_commands_resume_them(tmp_path):
    folder = interrupted(tmp_path / "run")
    others = ["model: 1\n", "model: 2\n", "model: 3\n"]
    for other in others:
        open_run(folder, other, OUTPUT)
        (folder / "last.ckpt").write_text(other)
    for recipe in (RECIPE, *others):
        open_run(folder, recipe, OUTPUT)
        assert (folder / "last.ckpt").read_text() == recipe
    assert len([*tmp_path.glob("run*/last.ckpt")]) == 4


def test_outputs_of_one_name_have_runs_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len({run_folder(f"{parent}/stage1") for parent in ("a", "b", "checkpoints", ".")}) == 4
    assert run_folder("a/stage1") == run_folder("./a/stage1/") == run_folder(tmp_path / "a/stage1")


def test_keys_that_do_not_change_the_result_may_differ(tmp_path, capsys):
    folder = interrupted(tmp_path / "run", "output: a/x\nsave_every_seconds: 60.0\n")
    open_run(folder, "output: ./a/x/\nsave_every_seconds: 5.0\n", OUTPUT)
    assert "resuming" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"a: [", b"- 1", b"\xff", b"[" * 10_000])
def test_a_state_without_its_recipe_is_set_aside(tmp_path, content):
    folder = interrupted(tmp_path / "run")
    (folder / "recipe.yaml").unlink()
    if content is not None:
        (folder / "recipe.yaml").write_bytes(content)
    open_run(folder, RECIPE, OUTPUT)
    assert not (folder / "last.ckpt").exists()


def test_a_second_run_is_kept_out_while_the_first_goes_on(tmp_path, monkeypatch):
    """The same output by a relative path, by an absolute one from another directory, and through a link."""
    for name in ("project", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("project", target_is_directory=True)
    monkeypatch.chdir(tmp_path / "project")

    def second(output: Path) -> int:
        process = multiprocessing.get_context("fork").Process(target=enter, args=(output,))
        process.start()
        process.join(60)
        return process.exitcode

    def enter(output: Path) -> None:
        os.chdir(tmp_path / "elsewhere")
        try:
            with lock_output(output):
                sys.exit(0)
        except InputError as error:
            sys.exit(7 if "another run is writing" in str(error) else 8)

    outputs = [tmp_path / parent / "checkpoints/x" for parent in ("project", "link")]
    with lock_output(Path("checkpoints/x")):
        assert [second(output) for output in outputs] == [7, 7]
        assert second(tmp_path / "project/checkpoints/y") == 0
    assert second(outputs[0]) == 0
    assert not list(Path("checkpoints").iterdir())


@pytest.mark.parametrize("key", ["devices", "num_nodes"])
def test_another_number_of_processes_alone_is_no_reason_to_start_afresh(key, tmp_path):
    folder = interrupted(tmp_path / "run", f"trainer:\n  {key}: 2\n")
    with pytest.raises(InputError, match=rf"trainer\.{key}: 2 -> 4.*--output"):
        open_run(folder, f"trainer:\n  {key}: 4\n", OUTPUT)
    assert (folder / "last.ckpt").exists()
    with pytest.raises(InputError, match="another number of processes"):
        open_run(folder, f"trainer:\n  {key}: 4\n  strategy: ddp\n", OUTPUT)
    open_run(folder, f"trainer:\n  {key}: 4\n", OUTPUT, resume=False)
    assert (tmp_path / "run.previous" / "last.ckpt").exists()


def test_another_strategy_alone_starts_afresh(tmp_path):
    folder = interrupted(tmp_path / "run", "trainer:\n  devices: 2\n  strategy: ddp\n")
    open_run(folder, "trainer:\n  devices: 2\n  strategy: other\n", OUTPUT)
    assert (tmp_path / "run.previous" / "last.ckpt").exists()
