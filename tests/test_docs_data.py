"""docs/data.md: each of its rows, read as its recipe line says, becomes what the page shows."""

import re
from pathlib import Path
from textwrap import indent

import pytest
import yaml
from jsonargparse import ArgumentParser

from bindllm.data.formats import FORMATS
from bindllm.data.rows import Row
from bindllm.data.source_config import SourceConfig
from bindllm.data.sources import read_source
from bindllm.media import Media

PAGE = (Path(__file__).parents[1] / "docs/data.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
MEDIA = re.compile(r"\[\w+ ([\w/]+\.\w+)\]")


def examples() -> list:
    """Rows, recipe line and outcome; where a section shows another outcome of the same rows, these again."""
    found = []
    for name, section in SECTIONS.items():
        rows = recipe = None
        for language, text in BLOCK.findall(section):
            if language in ("json", "csv"):
                rows = text
            elif language == "yaml":
                recipe = text
            else:
                found.append(pytest.param(rows, recipe, text, id=f"{name}-{len(found)}"))
    return found


def source(line: dict) -> SourceConfig:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--source", type=SourceConfig)
    return parser.instantiate(parser.parse_object({"source": line})).source


def shown(row: Row) -> str:
    """A row in the way of the page."""
    lines = [(message.role, parts(message.content)) for message in row.conversation.messages]
    answer = row.conversation.messages[-1].text
    lines += [("rejected", row.rejected.messages[-1].text)] if row.rejected else []
    lines += [("references", " | ".join(row.references))] if row.references != (answer,) else []
    lines += [("type", row.type)] if row.type else []
    lines += [("options", " | ".join(row.options))] if row.options else []
    lines += [("desirable", "yes" if row.desirable else "no")] if row.desirable is not None else []
    return "".join(f"{name:<12}{indent(text, 12 * ' ').lstrip()}\n" for name, text in lines)


def parts(content) -> str:
    return "".join(
        part if isinstance(part, str) else f"[{part.modality} {named(part)}] " for part in content
    ).strip()


def named(media: Media) -> str:
    return f"of {len(media.source)} bytes" if isinstance(media.source, bytes) else media.source


@pytest.mark.parametrize(("rows", "recipe", "outcome"), examples())
def test_an_example_becomes_what_the_page_shows(rows, recipe, outcome, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = source({**yaml.safe_load(recipe), "split": "train"})
    Path(config.path).parent.mkdir(parents=True)
    one_line = config.path.endswith(".jsonl")
    Path(config.path).write_text(" ".join(rows.splitlines()) if one_line else rows)
    for file in MEDIA.findall(outcome):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()
    found, report = read_source(config)
    assert report.skipped.total == 0
    assert "\n".join(map(shown, found["train"])) == outcome


def test_the_page_shows_every_format():
    table = re.findall(r"^\| \[`(\w+)`\]\(#(\w+)\) \|.*\| (.*) \|$", PAGE, flags=re.MULTILINE)
    assert [name for name, _, _ in table] == [anchor for _, anchor, _ in table] == list(FORMATS)
    lines = [
        text
        for section in SECTIONS.values()
        for language, text in BLOCK.findall(section)
        if language == "yaml"
    ]
    assert {yaml.safe_load(line)["format"] for line in lines} == set(FORMATS)


def test_the_recipe_at_the_top_names_sources():
    ((_, text),) = BLOCK.findall(PAGE.split("\n## ")[0])
    assert [source(line).format for line in yaml.safe_load(text)["data"]["sources"]] == [
        "caption",
        "llava",
        "alpaca",
    ]
