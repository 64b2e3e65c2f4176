"""The shape of the code: who may import whom, how long files and functions may be, what `import bindllm` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "bindllm"
FILES = sorted(SOURCE.rglob("*.py"))
LAYERS = {
    0: {"", "errors", "atomic", "imports", "media", "conversation", "assets"},
    1: {"encoders", "retrieval", "checkpoint"},
    2: {"model", "data", "testing"},
    3: {"training", "evaluation"},
    4: {"verbs", "cli"},
}
SHARED = (0, 4)  # layers whose rooms may import each other
LAYER_OF = {room: layer for layer, rooms in LAYERS.items() for room in rooms}


def room_of(file: Path) -> str:
    part = file.relative_to(SOURCE).parts[0]
    return part.removesuffix(".py").removeprefix("__init__")


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imported_rooms(tree: ast.Module, file: Path) -> set[str]:
    """Rooms of bindllm that a file imports when it runs, also inside functions."""
    modules = []
    for node in (part for top in tree.body if not is_for_types(top) for part in ast.walk(top)):
        if isinstance(node, ast.Import):
            modules += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            modules += (
                [node.module] if node.module != "bindllm" else [f"bindllm.{n.name}" for n in node.names]
            )
    inside = [module.split(".") for module in modules if module.split(".")[0] == "bindllm"]
    names = {parts[1] if len(parts) > 1 else "" for parts in inside}
    return {name if name in LAYER_OF else "" for name in names}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_a_file_imports_lower_layers_and_its_own_room_only(file):
    room = room_of(file)
    if room == "":
        return
    for other in imported_rooms(ast.parse(file.read_text()), file) - {room, ""}:
        below = LAYER_OF[other] < LAYER_OF[room]
        shared = LAYER_OF[other] == LAYER_OF[room] and LAYER_OF[room] in SHARED
        assert below or shared, f"{room} imports {other}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_files_and_functions_are_short(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_every_file_is_in_a_room_that_has_a_layer():
    assert {room_of(file) for file in FILES} == set(LAYER_OF)


@pytest.mark.parametrize("statement", ["import bindllm", "from bindllm.cli import main; main(['--help'])"])
def test_nothing_heavy_is_imported_before_it_is_needed(statement):
    heavy = "{'torch', 'transformers', 'lightning', 'jsonargparse', 'numpy', 'PIL', 'rich'}"
    code = f"{statement}\nimport sys\nfound = {heavy} & set(sys.modules)\nassert not found, found"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
