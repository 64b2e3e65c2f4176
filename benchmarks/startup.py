"""Startup time: import, help, and from the start of `bindllm generate` to its first token."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measure import Metric, paired

CHECKPOINT, IMAGE = "checkpoints/openmoji", "data/openmoji/images/1F431.svg"

# The floor: plain transformers loads the same decoder and answers with one token, without an image.
PLAIN = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("checkpoints/smollm2-135m-instruct")
decoder = AutoModelForCausalLM.from_pretrained("checkpoints/smollm2-135m-instruct")
decoder.generate(**tokenizer("Describe this image.", return_tensors="pt"), max_new_tokens=1)
"""


def metrics() -> list[Metric]:
    """Time whole processes in turn."""

    def process(*arguments: str):
        return lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    torch = process("-c", "import torch")
    found = []
    for name, run in (
        ("import_over_torch", process("-c", "import bindllm")),
        ("help_over_torch", process("-m", "bindllm.cli", "--help")),
    ):
        ratio, ours, theirs = paired(run, torch, repeats=5)
        note = f"{ours * 1e3:.0f} ms over {theirs * 1e3:.0f} ms; at most 0.3; floor: an empty Python process"
        _, empty, _ = paired(process("-c", "pass"), process("-c", "pass"), repeats=3)
        found.append(Metric(name, ratio, "ratio", empty / theirs, note))
    generate = process("-m", "bindllm.cli", "generate", CHECKPOINT, "--image", IMAGE, "--max_new_tokens", "1")
    ratio, ours, theirs = paired(generate, process("-c", PLAIN), repeats=3)
    note = f"first token of `bindllm generate`: {ours:.1f} s over {theirs:.1f} s of plain transformers"
    found.append(Metric("generate_start_over_transformers", ratio, "ratio", 1.0, note))
    return found
