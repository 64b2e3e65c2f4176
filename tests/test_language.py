"""Words that the project's prose and names do not use, each with a plain replacement (CONTRIBUTING.md, Language)."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    file
    for pattern in (
        "src/**/*.py",
        "docs/*.md",
        "docs/*.py",
        "recipes/*.yaml",
        "examples/*",
        "*.md",
        "checkpoints/README.md",
        "Makefile",
        "setup.cfg",
    )
    for file in ROOT.glob(pattern)
    if file.is_file() and file.name != "CHANGELOG.md"
)
PATTERNS = {
    r"\bwhat (?:is(?! the | it here)|it|they|was|were|has|have|can|becomes)\b": "the name of the thing",
    r"\b(?:anew|afresh)\b": "again, from scratch",
    r"\blikewise\b": "the same",
    r"\bbeforehand\b": "before, in advance",
    r"\bforesee\w*": "predict, expect",
    r"\bbesides?\b": "next to, in addition to, compared with",
    r"\bsenses\b": "modalities",
    r"\b(?:nobody|strangers?)\b": "no one; untrusted",
    r"\b(?:go|goes|going|went) on\b": "continue, resume",
    r"\bis no (?!longer)[a-z]": "is not a",
    r"\bthere is none\b": "does not exist",
    r"\bat hand\b": "available",
    r"\bput right\b": "fix",
    r"\b(?:earlier|first|present) form\b|\bmeasured yet\b": "the settings of the variant, not its date",
    r"(?<!b\"a )\bpictures?\b": "image",
    r"\bfilms?\b": "video",
    r"(?i)(?:quanti|token|normali|organi|initiali|generali|optimi|standardi)s(?:e|ed|er|ing|ation)\b": "-ize",
    r"(?i)neighbour|colour|grey|licence|favour|behaviour|centre|metre\b": "American spelling",
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_plain_words(pattern):
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for file in FILES
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"write {PATTERNS[pattern]!r} instead: {found[:20]}"
