"""What `bindllm fit` prints at its end."""

from pathlib import Path

from rich.console import Console

from bindllm.evaluation.run import VARIANTS, CaptionRow, HeldOutResult
from bindllm.verbs.fit import _summary

NUMBERS = {"loss": 2.0, "perplexity": 7.4, **dict.fromkeys(("cider", "bleu4", "rouge_l", "exact_match"), 0.5)}
METRICS = {name: NUMBERS for name in VARIANTS}


def test_a_long_caption_leaves_room_for_the_file_and_the_true_caption(capsys):
    row = CaptionRow("data/radar/sweeps/0.npy", ["something near"], generated="It is a metaphor. " * 20)
    result = HeldOutResult(METRICS, [row], problems={}, num_without_media=0, seconds=1.0)
    _summary(Console(width=80), METRICS, result, Path("report.html"), modalities={"radar"})
    told = capsys.readouterr().out
    assert "0.npy" in told
    assert "something near" in told
    assert "It is a metaphor" in told
