"""Rows as a model sees them, for people: which part is learnt, and which media speaks to which part."""

from __future__ import annotations

from itertools import groupby

from transformers import PreTrainedTokenizerBase

from bindllm.data.tokenise import IGNORE, Sample


def preview_lines(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    r"""Return a title and a line for each stretch of tokens with the same media and the same use.

    Example:
        >>> preview_lines(sample, tokenizer)  # doctest: +SKIP
        ['captions.jsonl line 1: 27 tokens, 4 to learn, cut: no',
         "  media 0  given  '<|im_start|>user\nDescribe this image.<|im_end|>\n<|im_start|>assistant\n'",
         "  media 0  learnt 'red square<|im_end|>'"]
    """
    lines = [
        f"{sample.name}: {len(sample.input_ids)} tokens, {sample.num_supervised} to learn"
        f"{', answer cut' if sample.truncated else ''}"
    ]
    learnt = (sample.labels != IGNORE).tolist()
    tokens = zip(sample.media_index.tolist(), learnt, sample.input_ids.tolist(), strict=True)
    for (group, is_learnt), stretch in groupby(tokens, key=lambda token: token[:2]):
        text = tokenizer.decode([token[2] for token in stretch])
        media = "no media" if group < 0 else f"media {group} "
        lines.append(f"  {media} {'learnt' if is_learnt else 'given '} {text!r}")
    for number, group in enumerate(sample.media):
        lines.append(f"  media {number}: {', '.join(media.name for media in group)}")
    return lines
