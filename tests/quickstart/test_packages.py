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


def test_a_download_with_another_hash_is_refused_and_not_kept(tmp_path, fake):
    pip, _ = fake(content=b"something else")
    with pytest.raises(AssetError) as error:
        Downloads(tmp_path / "kept", pip=pip).get(WHEEL, say=print)
    assert WHEEL.sha256 in str(error.value)
    assert hashlib.sha256(b"something else").hexdigest() in str(error.value)
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_download_of_another_file_names_both(tmp_path, fake):
    pip, _ = fake(file="some_model-1.2-cp99.whl")
    with pytest.raises(AssetError, match=r"brought some_model-1\.2-cp99\.whl instead of some_model-1\.2-py3"):
        Downloads(tmp_path / "kept", pip=pip).get(WHEEL, say=print)


def test_a_failure_of_pip_names_the_package_and_the_way_by_hand(tmp_path, fake):
    pip, _ = fake(status=1, stderr="\nERROR: no network\n")
    with pytest.raises(AssetError) as error:
        Downloads(tmp_path / "kept", pip=pip).get(WHEEL, say=print)
    said = str(error.value)
    assert "cannot get the package some-model 1.2" in said
    assert "ERROR: no network" in said
    assert "pip download --no-deps some-model==1.2" in said
    assert WHEEL.file in said
    assert str(tmp_path / "kept") in said
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_debian_package_comes_from_apt(tmp_path, fake):
    apt, calls = fake(status=100, stderr="E: Version '3-1' for 'pics' was not found")
    with pytest.raises(AssetError, match="apt-get update") as error:
        Downloads(tmp_path / "kept", apt=apt).get(DEB, say=print)
    assert calls() == ["download pics=3-1"]
    assert "Version '3-1' for 'pics' was not found" in str(error.value)


def test_without_apt_the_error_names_the_systems_that_have_it(tmp_path):
    with pytest.raises(AssetError, match="belongs to Debian and Ubuntu"):
        Downloads(tmp_path, apt=("no-such-apt-get",)).get(DEB, say=print)


def test_a_python_without_pip_gets_the_command_that_installs_it(tmp_path, fake):
    pip, _ = fake(status=1, stderr="python: No module named pip")
    with pytest.raises(AssetError, match="run: .* -m ensurepip"):
        Downloads(tmp_path / "kept", pip=pip).get(WHEEL, say=print)
