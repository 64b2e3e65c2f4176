"""docs/imagine.md: its commands are understood, and its Python names exist."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from bindllm.cli.arguments import read_command
from bindllm.cli.unclip.fit_map import fit_map
from bindllm.cli.unclip.imagine import imagine
from bindllm.unclip.linear_map import MANIFEST, WEIGHTS

PAGE = (Path(__file__).parents[1] / "docs/imagine.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^bindllm (.+)$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line):
    command, *args = shlex.split(line)
    read_command(command, {"imagine": imagine, "fit_map": fit_map}[command], args)


def test_the_python_block_calls_what_there_is():
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            home = __import__(node.module, fromlist=["*"])
            assert all(hasattr(home, name.name) for name in node.names), ast.unparse(node)


def test_the_files_of_a_map_are_those_of_the_code():
    assert f"holds `{MANIFEST}` and `{WEIGHTS}`" in PAGE
