import os
import signal
import subprocess
import sys

import pytest

from bindllm.atomic import atomic_file, atomic_folder, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"é": 1})
    assert (tmp_path / "a" / "b.json").read_text(encoding="utf-8") == '{\n  "é": 1\n}\n'
    write_json(tmp_path / "a" / "b.json", [2])
    assert names(tmp_path / "a") == ["b.json"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(OSError, match="disk full"), atomic_file(tmp_path / "f") as part:
        part.write_text("half")
        raise OSError("disk full")
    assert (tmp_path / "f").read_text() == "old"
    assert names(tmp_path) == ["f"]


def test_a_folder_is_replaced_whole(tmp_path):
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "d") as part:
            (part / text).write_text(text)
    assert names(tmp_path / "d") == ["new"]
    assert names(tmp_path) == ["d"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "link").symlink_to("disk/d")
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "link") as part:
            (part / text).write_text(text)
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "disk" / "d") == ["new"]
    assert names(tmp_path) == ["disk", "link"]
    assert names(tmp_path / "disk") == ["d"]


def test_an_error_leaves_the_old_folder(tmp_path):
    with atomic_folder(tmp_path / "d") as part:
        (part / "old").write_text("old")
    with pytest.raises(OSError, match="disk full"), atomic_folder(tmp_path / "d") as part:
        (part / "new").write_text("new")
        raise OSError("disk full")
    assert names(tmp_path / "d") == ["old"]
    assert names(tmp_path) == ["d"]


def test_a_folder_survives_when_the_last_rename_fails(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "d") as part:
        (part / "old").write_text("old")
    replace = os.replace

    def fail_on_second(source, target, calls=[]):  # noqa: B006
        calls.append(source)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_on_second)
    with pytest.raises(OSError, match="disk full"), atomic_folder(tmp_path / "d") as part:
        (part / "new").write_text("new")
    assert names(tmp_path / "d") == ["old"]


def test_kill_in_the_middle_of_a_save_leaves_the_old_content(tmp_path):
    write_json(tmp_path / "f.json", "old")
    code = (
        "import os, signal; from bindllm.atomic import atomic_file\n"
        f"with atomic_file({str(tmp_path / 'f.json')!r}) as part:\n"
        "    part.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert (tmp_path / "f.json").read_text() == '"old"\n'


def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """In any other order a loss of power could leave a name without its content."""
    calls, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", lambda *paths: (replace(*paths), calls.append("renamed")))
    write_json(tmp_path / "file", 1)
    with atomic_folder(tmp_path / "folder") as part:
        (part / "inside").touch()
    file, folder, inside, home = (
        path.stat().st_ino
        for path in (tmp_path / "file", tmp_path / "folder", tmp_path / "folder/inside", tmp_path)
    )
    assert calls == [file, "renamed", home, inside, folder, "renamed", home]


def test_private_files_of_a_folder_get_the_usual_rights(tmp_path):
    with atomic_folder(tmp_path / "d") as part:
        for name, rights in (("plain", None), ("private", 0o600), ("script", 0o700)):
            (part / name).write_text("whole")
            if rights:
                (part / name).chmod(rights)
    rights = {name: (tmp_path / "d" / name).stat().st_mode & 0o777 for name in names(tmp_path / "d")}
    assert rights["private"] == rights["plain"]
    assert rights["script"] == 0o700


def test_kill_between_the_two_renames_of_a_folder_loses_nothing(tmp_path):
    code = (
        "import os, signal; from pathlib import Path; from bindllm.atomic import atomic_folder\n"
        f"path = Path({str(tmp_path / 'd')!r})\n"
        "with atomic_folder(path) as part: (part / 'old').write_text('whole')\n"
        "replace = os.replace\n"
        "def kill_after(source, target): replace(source, target); os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.replace = kill_after\n"
        "with atomic_folder(path) as part: (part / 'new').write_text('whole')\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not (tmp_path / "d").exists()
    with pytest.raises(OSError, match="disk full"), atomic_folder(tmp_path / "d"):
        raise OSError("disk full")
    assert names(tmp_path / "d") == ["old"]
    with atomic_folder(tmp_path / "d") as part:
        (part / "newer").write_text("whole")
    assert names(tmp_path / "d") == ["newer"]
    assert not (tmp_path / ".d.old").exists()
