"""Fixtures for the tests of the store."""

import pytest

from bindllm import Media
from bindllm.embeddings import store


@pytest.fixture(autouse=True)
def settled(monkeypatch) -> None:
    """Trust the time of change of files that a test has just written."""
    monkeypatch.setattr(store, "SETTLED_NS", 0)


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of the media whose content was hashed."""
    names: list[str] = []
    original = Media.content_hash

    def counted(media: Media, *stream) -> str:
        names.append(media.name)
        return original(media, *stream)

    monkeypatch.setattr(Media, "content_hash", counted)
    return names
