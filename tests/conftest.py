"""Every test runs without network, without progress bars, and on one thread (tiny tensors gain nothing from two)."""

import functools
import gc
import os
import signal

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# Also for numpy, Faiss and the processes that tests start: one pytest worker runs on each core.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from docstring_parser.attrdoc import AttributeDocstrings
from hypothesis import HealthCheck, settings

# The same inputs in each run, however slow the machine is.
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("same")

# Imports and collection make millions of objects and no garbage. See `pytest_runtestloop`.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop():
    """Garbage is looked for among the objects of the tests only, not in torch again and again: a tenth of all time."""
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _sources_are_read_once():
    """Whoever parses a recipe looks for the words of --help in the sources: a third of the time of a tiny run."""
    read = AttributeDocstrings.get_attr_docs
    words = functools.cache(lambda component: read(AttributeDocstrings(), component))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttributeDocstrings, "get_attr_docs", lambda _, component: words(component))
        yield


@pytest.fixture(scope="session", autouse=True)
def _the_disk_is_not_waited_for():
    """No test loses power; `test_atomic` looks at the calls themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(os, "sync", lambda: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _transformers_is_muted_once():
    """Each change of a level clears the caches of all loggers: thousands of them, whenever a model is loaded."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    change = logging.set_verbosity
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            logging, "set_verbosity", lambda level: level == logging.get_verbosity() or change(level)
        )
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


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """Folder of a tiny decoder."""
    from tiny import save_tiny_decoder

    return save_tiny_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Folder of a tiny decoder and colored images, for all runs of a session; the tests only read it."""
    from tiny_run import tiny_parts

    return tiny_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty folder, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def silent():
    """Lightning says nothing about the run."""
    from bindllm.cli.recipes.recipe import quiet

    with quiet():
        yield


@pytest.fixture(scope="module")
def unmeasured():
    """What follows the trained folder is not what the tests of a file are about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bindllm.training.run.Run._measure", lambda *_: 0)
        yield
