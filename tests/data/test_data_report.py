"""What was read, in words that fit every format."""

from dataclasses import replace

from rich.console import Console

from bindllm.conversation import Conversation, Message
from bindllm.data.report import (
    MAX_EXAMPLES,
    MAX_REASONS,
    OTHER_REASON,
    DataReport,
    Skipped,
    SourceReport,
    count_languages,
)
from bindllm.data.rows import Row, tokenize
from bindllm.media import Media
from tiny import tiny_tokenizer

A, B = Media.image("a.png"), Media.audio("b.wav")


def row(*questions, rejected: bool = False) -> Row:
    """A row with an answer to each question: a list of its parts."""
    turns = [turn for parts in questions for turn in (Message("user", parts), Message("assistant", "yes"))]
    other = Conversation((*turns[:-1], Message("assistant", "no"))) if rejected else None
    return Row(Conversation(tuple(turns)), ("yes",), "t row 1", rejected=other)


def test_rows_are_counted_with_their_answers_and_different_media():
    report = SourceReport("talks", format="messages")
    report.count([row([A, "?"], "?"), row([A, B, "?"]), row("?"), row("?", rejected=True)])
    assert (report.num_rows, report.answers, report.pairs, report.text_only) == (4, 5, 1, 2)
    assert (report.num_media, report.media) == (2, {"image": 1, "audio": 1})
    assert report.counted == (
        "4 rows (messages), 5 answers, 1 pairs of a better and a worse answer, 1 images, 1 audio media, "
        "2 rows without media"
    )


def test_reasons_that_differ_from_row_to_row_do_not_make_the_report_as_long_as_the_data():
    skipped, both = Skipped(), Skipped()
    for n in range(1000):
        skipped.add(f"unknown word {n}", f"line {n}")
    both.add("empty answer", "line 0")
    both.update(skipped)
    for one, named in ((skipped, MAX_REASONS), (both, MAX_REASONS - 1)):
        assert len(one.counts) == MAX_REASONS + 1
        assert one.counts[OTHER_REASON] == 1000 - named
        assert one.examples[OTHER_REASON][0] == f"line {named}: unknown word {named}"
        assert len(one.examples[OTHER_REASON]) == MAX_EXAMPLES
    assert (skipped.total, both.total) == (1000, 1001)


def test_captions_are_counted_as_captions():
    report = SourceReport("hums", modality="audio")
    report.count([row([B, "?"]), row([B, "?"])])
    assert report.counted == "1 audio media, 2 captions"


def test_answers_are_as_long_as_their_language_is_in_tokens():
    def sample(answer, language):
        conversation = Conversation((Message("user", "?"), Message("assistant", answer)))
        return replace(tokenize(conversation, tiny_tokenizer(), 200), language=language)

    samples = [sample("cat", "en"), sample("猫", "zh"), sample("熊猫", "zh"), sample("?", "")]
    # Three bytes, and tokens, for each character, and the end token.
    assert count_languages(samples) == {
        "en": "1 rows, supervised tokens: 4.0 (longest 4), 0 truncated",
        "zh": "2 rows, supervised tokens: 5.5 (longest 7), 0 truncated",
        "no language": "1 rows, supervised tokens: 2.0 (longest 2), 0 truncated",
    }
    assert count_languages(samples[3:]) == {}


def test_the_table_names_what_was_cut_and_skipped():
    talks, pictures = SourceReport("talks", format="llava"), SourceReport("pictures")
    talks.count([row([B, "?"])])
    pictures.count([row([A, "?"])])
    report = DataReport(sources=[talks, pictures], rows={"train": 1, "test": 1}, truncated=3, text_only=2)
    report.skipped.add("empty answer", "talks row 7")
    pictures.remarks.add("media next to the row that it does not use (.wav)", "0.tar sample 1 (a)")
    pictures.warning = "40 of 50 rows share media"
    assert report.modalities == {"audio", "image"}
    console = Console(width=120)
    with console.capture() as capture:
        console.print(report)
    told = " ".join(capture.get().replace("│", " ").split())
    for line in (
        "talks 1 rows (llava), 1 audio media",
        "pictures 1 images, 1 captions",
        "rows 1 train, 1 test",
        "rows cut to max_length 3",
        "rows without media 2",
        "skipped: 1 x empty answer (talks row 7)",
        "note: 1 x media next to the row that it does not use (.wav) (0.tar sample 1 (a))",
        "warning: pictures: 40 of 50 rows share media",
    ):
        assert line in told
