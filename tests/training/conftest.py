"""What tests of whole fits share."""

from functools import partial

import pytest

from bindllm.cli.recipe import quiet
from bindllm.training.callbacks import SampleCaptions
from tiny import save_tiny_decoder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """Folder of a tiny decoder."""
    return save_tiny_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def silent():
    """Lightning says nothing about the run."""
    with quiet():
        yield


@pytest.fixture(scope="module")
def unmeasured():
    """Long answers, and what follows the trained folder, are not what the tests of a file are about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bindllm.training.run.Run._measure", lambda *_: 0)
        patch.setattr("bindllm.cli.fit.SampleCaptions", partial(SampleCaptions, max_new_tokens=4))
        yield
