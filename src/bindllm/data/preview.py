"""Rows as the model sees them, in color: the part that is learned, and the media that each part listens to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, zip_longest

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from bindllm.data.rows import IGNORE, Row, Sample, make_sample
from bindllm.errors import InputError

GOOD, BAD = "bold green", "bold red"
"""Colors of answers to learn, and of answers to avoid."""
GROUPS = ("cyan", "magenta", "yellow", "blue")
"""Colors of the media groups, in turn."""
NO_GROUP, CONTROL = "dim", "dim"


def legend() -> Text:
    """Return a line that explains the words and colors of `preview_lines`."""
    return Text.from_markup(
        f"rows as the model sees them: given, [{GOOD}]learned[/] (in preferences: [{GOOD}]chosen[/] or "
        f"[{GOOD}]wanted[/], [{BAD}]rejected[/] or [{BAD}]unwanted[/]); [{GROUPS[0]}]media 0, [/]"
        f"[{GROUPS[1]}]media 1, [/]...: the media that the tokens listen to"
    )


def preview_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, *, number: int
) -> Iterator[Text]:
    """Yield the lines of a few rows, the first of each source, then the second of each, and so on."""
    by_source: dict[int, list[Row]] = {}
    for row in rows:
        first = by_source.setdefault(row.source, [])
        if len(first) < number:
            first.append(row)
    # In turn, so that a long first source does not hide a fault of the others.
    in_turn = [row for turn in zip_longest(*by_source.values()) for row in turn if row is not None]
    for row in in_turn[:number]:
        try:
            sample = make_sample(row, tokenizer, max_length)
        except InputError as error:
            yield Text(f"{row.name}: skipped ({error})")
        else:
            yield from preview_lines(sample, tokenizer)


def preview_lines(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    r"""Return a title, a line for each run of tokens with the same media and the same use, and the media.

    The words give the same information as the colors. Invisible characters are written as in Python. In a preference
    pair, the worse answer follows the better one.

    Examples:
        >>> [line.plain for line in preview_lines(sample, tokenizer)]  # doctest: +SKIP
        ['captions.jsonl line 1: 27 tokens, 4 to learn',
         "  media 0  given   '<|im_start|>user\nDescribe this image.<|im_end|>\n<|im_start|>assistant\n'",
         "  media 0  learned 'red square<|im_end|>'",
         '  media 0: a.png']
    """
    good, bad = "learned", "rejected"
    if sample.rejected is not None:
        good = "chosen"
    elif sample.desirable is not None:
        good = "wanted" if sample.desirable else "unwanted"
    lines = [Text(_title(sample), "bold")]
    lines += _runs(sample, tokenizer, learned=good, style=BAD if good == "unwanted" else GOOD)
    if sample.rejected is not None:
        # The prompt is shown above; only the other answer follows.
        rejected, start = sample.rejected, sample.rejected.prompt_length
        lines += _runs(rejected, tokenizer, learned=bad, style=BAD, start=start)
    for number, group in enumerate(sample.media):
        lines.append(Text(f"  media {number}: {', '.join(media.name for media in group)}", _color(number)))
    return lines


def _title(sample: Sample) -> str:
    """Return the length of a row, and the parts of it that did not fit."""
    kept, answers = sample.num_answers, sum(m.role == "assistant" for m in sample.conversation.messages)
    # Such a row learns only its last answer, so earlier ones are not missing.
    parts = [f"{len(sample.input_ids):,} tokens, {sample.num_supervised:,} to learn"]
    if sample.rejected is not None:
        parts[0] += f" or {sample.rejected.num_supervised:,} not to"
    if kept > 1:
        parts[0] += f" in {kept} answers"
    if sample.truncated:
        parts.append(
            "answer cut"
            if sample.query_only or kept == answers
            else f"{answers - kept} of {answers} answers dropped"
        )
    if sample.type:
        parts.append(f"type {sample.type}")
    return f"{sample.name}: {', '.join(parts)}"


def _runs(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, *, learned: str, style: str, start: int = 0
) -> Iterable[Text]:
    """Yield a line for each run of tokens from ``start`` on with the same media and the same use."""
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    is_learned = (sample.labels != IGNORE).tolist()
    tokens = list(zip(sample.media_index.tolist(), is_learned, sample.input_ids.tolist(), strict=True))
    for (group, teaches), run in groupby(tokens[start:], key=lambda token: token[:2]):
        # Together, because one character may consist of several tokens.
        text = tokenizer.decode([token[2] for token in run], clean_up_tokenization_spaces=False)
        media = "no media" if group < 0 else f"media {group} "
        use = learned if teaches else "given"
        # repr shows line breaks and other invisible characters.
        shown = Text(repr(text), style if teaches else "")
        shown.highlight_words(control, CONTROL)
        yield Text.assemble(
            "  ", (media, _color(group)), " ", (f"{use:7}", style if teaches else ""), " ", shown
        )


def _color(group: int) -> str:
    return NO_GROUP if group < 0 else GROUPS[group % len(GROUPS)]
