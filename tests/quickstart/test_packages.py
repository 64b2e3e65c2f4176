import hashlib
import sys

import pytest

from bindllm.errors import AssetError
from bindllm.quickstart.packages import Downloads, Package

CONTENT = b"content of the package"
WHEEL = Package(
    name="some-model",
    version="1.2",
    file="some_model-1.2-py3-none-any.whl",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    license="MIT",
    megabytes=1,
)
DEB = Package(
    name="pics", version="3-1", file="pics_3-1_all.deb", sha256="0" * 64, license="MIT", megabytes=1
)

FAKE = """
import pathlib, sys
pathlib.Path({calls!r}).open("a").write(" ".join(sys.argv[1:]) + chr(10))
pathlib.Path({file!r}).write_bytes({content!r})
sys.stderr.write({stderr!r})
sys.exit({status})
"""


@pytest.fixture
def fake(tmp_path):
    """Make a command that writes one file into its working folder, and a list of its calls."""

    def make(*, file=WHEEL.file, content=CONTENT, status=0, stderr=""):
        script, calls = tmp_path / "fake.py", tmp_path / "calls"
        calls.touch()
        script.write_text(
            FAKE.format(calls=str(calls), file=file, content=content, status=status, stderr=stderr)
        )
        return (sys.executable, "-IS", str(script)), lambda: calls.read_text().splitlines()

    return make


def test_a_package_is_downloaded_once(tmp_path, fake):
    pip, calls = fake()
    downloads, said = Downloads(tmp_path / "kept", pip=pip), []
    first = downloads.get(WHEEL, say=said.append)
    assert first.read_bytes() == CONTENT
    assert downloads.get(WHEEL, say=said.append) == first
    assert len(calls()) == 1
    assert calls()[0].startswith("download ")
    assert calls()[0].endswith(" some-model==1.2")
    assert "--no-deps" in calls()[0]
    assert said == ["downloading some-model 1.2 (1 MB)"]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [WHEEL.file]


def test_a_file_copied_by_hand_works_without_pip(tmp_path):
    (tmp_path / WHEEL.file).write_bytes(CONTENT)
    assert Downloads(tmp_path, pip=("no-such-command",)).get(WHEEL, say=print) == tmp_path / WHEEL.file


def test_a_wrong_file_is_set_aside_and_replaced(tmp_path, fake):
    folder, said = tmp_path / "kept", []
    folder.mkdir()
    (folder / WHEEL.file).write_bytes(b"half a")
    pip, _ = fake()
    assert Downloads(folder, pip=pip).get(WHEEL, say=said.append).read_bytes() == CONTENT
    assert (folder / f"{WHEEL.file}.refused").read_bytes() == b"half a"
    assert WHEEL.sha256 in said[0]
    assert hashlib.sha256(b"half a").hexdigest() in said[0]


@pytest.mark.parametrize(
    ("package", "made", "words"),
    [
        (
            WHEEL,
            {"content": b"something else"},
            [WHEEL.sha256, hashlib.sha256(b"something else").hexdigest()],
        ),
        (
            WHEEL,
            {"file": "some_model-1.2-cp99.whl"},
            ["brought some_model-1.2-cp99.whl instead of some_model-1.2-py3"],
        ),
        (
            WHEEL,
            {"status": 1, "stderr": "\nERROR: no network\n"},
            [
                "cannot get the package some-model 1.2",
                "ERROR: no network",
                "pip download --no-deps some-model==1.2",
                WHEEL.file,
            ],
        ),
        (WHEEL, {"status": 1, "stderr": "python: No module named pip"}, ["(run: ", " -m ensurepip)"]),
        (
            DEB,
            {"status": 100, "stderr": "E: Version '3-1' for 'pics' was not found"},
            ["apt-get update", "Version '3-1' for 'pics' was not found", "apt-get download pics=3-1"],
        ),
    ],
)
def test_a_download_that_fails_gives_the_reason_and_the_way_by_hand_and_keeps_nothing(
    tmp_path, fake, package, made, words
):
    command, calls = fake(**made)
    with pytest.raises(AssetError) as error:
        Downloads(tmp_path / "kept", pip=command, apt=command).get(package, say=print)
    for one in (*words, str(tmp_path / "kept")):
        assert one in str(error.value)
    assert list((tmp_path / "kept").iterdir()) == []
    (call,) = calls()
    assert call.startswith("download ")
    assert call.endswith(f"={package.version}")


def test_without_apt_the_error_names_the_systems_that_have_it(tmp_path):
    with pytest.raises(AssetError, match="belongs to Debian and Ubuntu"):
        Downloads(tmp_path, apt=("no-such-apt-get",)).get(DEB, say=print)
