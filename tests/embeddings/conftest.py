"""Fixtures for the tests of the store."""

import pytest

from bindllm import Media


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of the media whose content was hashed."""
    names: list[str] = []
    original = Media.content_hash

    def counted(media: Media) -> str:
        names.append(media.name)
        return original(media)

    monkeypatch.setattr(Media, "content_hash", counted)
    return names
