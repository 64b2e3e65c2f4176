"""Every test runs without network, without progress bars, and on one thread (tiny tensors gain nothing from two)."""

import functools
import os
import signal

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from docstring_parser.attrdoc import AttributeDocstrings


@pytest.fixture(scope="session", autouse=True)
def _sources_are_read_once():
    """Whoever parses a recipe looks for the words of --help in the sources: a third of the time of a tiny run."""
    read = AttributeDocstrings.get_attr_docs
    words = functools.cache(lambda component: read(AttributeDocstrings(), component))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttributeDocstrings, "get_attr_docs", lambda _, component: words(component))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_interrupts():
    """A shell starts background jobs with SIGINT ignored, and children would inherit that."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)
