"""A tiny pipeline for all tests of a session, which only read it."""

import pytest


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory):
    """Folder of a tiny pipeline."""
    from unclip_parts import save_tiny_pipeline

    return save_tiny_pipeline(tmp_path_factory.mktemp("unclip") / "tiny")
