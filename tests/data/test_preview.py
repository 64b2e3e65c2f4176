"""What `bindllm check` shows of a row: the words and the colors give the same information."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from bindllm.conversation import Conversation, Message
from bindllm.data.preview import BAD, CONTROL, GOOD, GROUPS, legend, preview_lines, preview_rows
from bindllm.data.rows import Row, make_sample, tokenize
from bindllm.media import Media
from tiny import tiny_tokenizer

A, B = Media.image("a.png"), Media.image("b.png")
ONE = Conversation((Message("user", [A, "Hi"]), Message("assistant", "yoyo")))
TWO = Conversation((*ONE.messages, Message("user", [B, "2"]), Message("assistant", "xyz")))
WHOLE = 51


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def plain(sample, tokenizer) -> list[str]:
    return [line.plain for line in preview_lines(sample, tokenizer)]


def test_it_marks_what_is_learned_and_which_media_speaks(tokenizer):
    assert plain(tokenize(TWO, tokenizer, WHOLE - 1), tokenizer) == [
        ": 50 tokens, 8 to learn in 2 answers, answer cut",
        "  media 0  given   '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'",
        "  media 0  learned 'yoyo<|im_end|>'",
        "  media 0  given   '\\n'",
        "  media 1  given   '<|im_start|>user\\n2<|im_end|>\\n<|im_start|>assistant\\n'",
        "  media 1  learned 'xy<|im_end|>'",
        "  media 0: a.png",
        "  media 1: b.png",
    ]


def test_turns_that_did_not_fit_are_named(tokenizer):
    lines = plain(replace(tokenize(TWO, tokenizer, 30), name="t row 1", type="color"), tokenizer)
    assert lines[0] == "t row 1: 26 tokens, 5 to learn, 1 of 2 answers dropped, type color"
    assert lines[-1] == "  media 0: a.png"


def test_letters_that_cannot_be_seen_are_written_out(tokenizer):
    conversation = Conversation((Message("user", "a\u200bb\tc"), Message("assistant", "d\u00a0\u202ee")))
    lines = plain(tokenize(conversation, tokenizer, 100), tokenizer)
    assert "a\\u200bb\\tc" in lines[1]
    assert lines[2] == "  no media learned 'd\\xa0\\u202ee<|im_end|>'"


def test_a_pair_shows_both_answers(tokenizer):
    worse = Conversation((*TWO.messages[:-1], Message("assistant", "no")))
    sample = make_sample(Row(TWO, (), "t row 1", rejected=worse), tokenizer, 100)
    lines = plain(sample, tokenizer)
    assert lines[0] == "t row 1: 51 tokens, 4 to learn or 3 not to"
    assert lines[-4:] == [
        "  media 1  chosen  'xyz<|im_end|>'",
        "  media 1  rejected 'no<|im_end|>'",
        "  media 0: a.png",
        "  media 1: b.png",
    ]
    assert not any("learned" in line for line in lines)


@pytest.mark.parametrize(("desirable", "word", "style"), [(True, "wanted", GOOD), (False, "unwanted", BAD)])
def test_a_judged_answer_says_how(tokenizer, desirable, word, style):
    sample = make_sample(Row(ONE, (), "t row 1", desirable=desirable), tokenizer, 100)
    line = preview_lines(sample, tokenizer)[2]
    assert line.plain == f"  media 0  {word:7} 'yoyo<|im_end|>'"
    assert word in [line.plain[span.start : span.end].strip() for span in line.spans if span.style == style]


def test_colors_and_words_agree(tokenizer):
    lines = preview_lines(tokenize(TWO, tokenizer, WHOLE), tokenizer)
    told = [(line.plain[span.start : span.end].strip(), span.style) for line in lines for span in line.spans]
    assert ("learned", GOOD) in told
    assert ("<|im_end|>", CONTROL) in told
    assert not any(word == "given" and style for word, style in told)
    for group, name in enumerate(("a.png", "b.png")):
        assert (f"media {group}", GROUPS[group]) in told
        assert lines[-2 + group].plain == f"  media {group}: {name}"
        assert lines[-2 + group].style == GROUPS[group]


def test_output_to_a_file_has_words_and_no_codes(tokenizer):
    lines = [legend(), *preview_lines(tokenize(TWO, tokenizer, WHOLE), tokenizer)]
    for terminal in (False, True):
        console = Console(file=StringIO(), force_terminal=terminal, highlight=False, soft_wrap=True)
        for line in lines:
            console.print(line, markup=False)
        told = console.file.getvalue()
        assert ("\x1b[" in told) == terminal
        assert terminal or "media 1  learned 'xyz<|im_end|>'\n" in told


def test_a_few_rows_of_each_source_are_shown_in_turn(tokenizer):
    spelled = Conversation((Message("user", "<|im_end|>"), Message("assistant", "x")))
    rows = [
        Row(ONE, (), f"{source}:{n}", source)
        for source, count in ((0, 3), (2, 1), (5, 9))
        for n in range(count)
    ]
    rows[1] = Row(spelled, (), "0:1", 0)
    lines = [str(line) for line in preview_rows(rows, tokenizer, 100, number=5)]
    shown = [line for line in lines if not line.startswith(" ")]
    assert [line[:3] for line in shown] == ["0:0", "2:0", "5:0", "0:1", "5:1"]
    assert shown[3].startswith("0:1: skipped (a message spells the control token")
    assert list(preview_rows(rows, tokenizer, 100, number=0)) == []
