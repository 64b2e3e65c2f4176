"""Evaluation of trained models on held-out rows and benchmarks, and zero-shot evaluation of encoders."""

from __future__ import annotations

from typing import Any

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    # Later than its modules, some of which are imported by it.
    if name == "evaluate":
        from bindllm.evaluation.benchmarks.run import evaluate

        return evaluate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
