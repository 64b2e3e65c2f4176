"""The shape of the code: who may import whom, how long files and functions may be, what `import bindllm` costs."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "bindllm"
FILES = sorted(SOURCE.rglob("*.py"))
# From the ground up: a file imports from its own room and from rooms that come before it.
ROOMS = [
    *("errors", "atomic", "imports", "parallel", "media", "conversation", "shots"),
    *("encoders", "testing", "embeddings", "cache"),
    *("model", "data", "objectives", "evaluation", "report", "card", "training"),
    *("convert", "quickstart", "reasoning", "unclip", "serving", "lmms_eval", "cli"),
]
MOST_LINES, MOST_FUNCTION_LINES, MOST_FILES = 500, 60, 12


def room_of(file: Path) -> str:
    part = file.relative_to(SOURCE).parts[0]
    return part.removesuffix(".py").removeprefix("__init__")


def imported_rooms(tree: ast.Module) -> set[str]:
    """Rooms of bindllm that a file imports, also inside functions and for type hints."""
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "bindllm":
            modules += [f"bindllm.{name.name}" for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
    return {name.split(".")[1] for name in modules if name.startswith("bindllm.")} & set(ROOMS)


def test_files_import_only_rooms_below_them():
    upward = {
        (room, other)
        for file in FILES
        if (room := room_of(file))
        for other in imported_rooms(tree_of(file))
        if ROOMS.index(other) > ROOMS.index(room)
    }
    assert not upward


@functools.cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@functools.cache
def names_in(file: Path) -> set[str]:
    """Names that a file defines or imports at its top level, also for type hints, and the modules next to it."""
    found = {path.stem for path in file.parent.iterdir()} if file.name == "__init__.py" else set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {name.asname or name.name for name in node.names}
    return found


def test_imported_names_exist_also_those_for_type_hints():
    missing = []
    for file in FILES:
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bindllm."):
                home = SOURCE.joinpath(*node.module.split(".")[1:])
                home = home / "__init__.py" if home.is_dir() else home.with_suffix(".py")
                missing += [f"{file}: {name.name}" for name in node.names if name.name not in names_in(home)]
    assert missing == []


def test_files_functions_and_folders_are_small():
    too_long = []
    for file in FILES:
        text = file.read_text()
        if text.count("\n") > MOST_LINES:
            too_long.append(str(file))
        too_long += [
            f"{file}: {node.name}"
            for node in ast.walk(tree_of(file))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and node.end_lineno - node.lineno >= MOST_FUNCTION_LINES
        ]
    folders = {folder for file in FILES if (folder := file.parent) != SOURCE}
    crowded = [folder.name for folder in folders if len(list(folder.glob("[!_]*.py"))) > MOST_FILES]
    assert (too_long, crowded) == ([], [])
    assert {room_of(file) for file in FILES} == {"", *ROOMS}


def test_no_two_files_of_tests_have_one_name():
    """Pytest imports them by their names alone: two of one name stop the whole suite."""
    names = [file.name for file in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("statement", ["import bindllm", "from bindllm.cli import main; main(['--help'])"])
def test_nothing_heavy_is_imported_before_it_is_needed(statement):
    heavy = "{'torch', 'transformers', 'lightning', 'jsonargparse', 'numpy', 'PIL', 'rich'}"
    code = f"{statement}\nimport sys\nfound = {heavy} & set(sys.modules)\nassert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
