"""docs/cache.md: its commands are understood, its recipe key is read, and its tables say what the code does."""

import ast
import re
import shlex
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from bindllm.cache.blend import CacheConfig
from bindllm.cache.factories import choose
from bindllm.cli import COMMANDS
from bindllm.cli.arguments import read_command
from bindllm.cli.generate import generate
from bindllm.cli.index import index

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/cache.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def rows(head: str) -> list[list[str]]:
    """The cells of the table that starts with these words, without its head."""
    table = re.search(rf"^\| {re.escape(head)}.*\n(?:^\|.*\n)+", PAGE, flags=re.MULTILINE)[0]
    return [[cell.strip() for cell in line.strip("|").split(" |")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("line", [line for block in blocks("bash") for line in block.splitlines()])
def test_every_command_is_understood(line):
    program, command, *args = shlex.split(line)
    assert program == "bindllm"
    assert command in COMMANDS
    if command in ("index", "generate"):
        read_command(command, {"index": index, "generate": generate}[command], args)


@pytest.mark.parametrize("block", blocks("python"))
def test_every_python_block_names_what_there_is(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("bindllm"):
            home = __import__(node.module, fromlist=["*"])
            assert all(hasattr(home, name.name) for name in node.names), ast.unparse(node)


def test_the_recipe_has_all_settings_with_their_defaults():
    (block,) = blocks("yaml")
    entry = yaml.safe_load(block)["model"]["cache"]
    assert entry == asdict(CacheConfig("caches/openmoji"))
    assert [row[0].strip("`") for row in rows("setting")] == [field.name for field in fields(CacheConfig)]


def test_the_kinds_are_those_that_are_chosen():
    pytest.importorskip("faiss")
    limits = [int(number.replace(",", "")) for number in re.findall(r"up to ([\d,]+)", str(rows("images")))]
    kinds = [row[1].strip("`") for row in rows("images")]
    assert [choose(limit, 1024)[0] for limit in limits] == kinds[:1]
    assert re.fullmatch(kinds[1].replace("<lists>", r"\d+"), choose(limits[0] + 1, 1024)[0])
