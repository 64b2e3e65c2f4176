import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bindllm.data.report import Skipped
from bindllm.data.tables import read_table
from bindllm.errors import InputError


def read(path, required=("image", "caption")):
    skipped = Skipped()
    return [
        (name, list(record.values())) for name, record in read_table(path, required, skipped)
    ], skipped.counts


@pytest.fixture
def write(tmp_path):
    def write(name: str, content: bytes):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


def test_jsonl_reports_each_bad_line_and_continues(write):
    path = write(
        "t.jsonl",
        b'\xef\xbb\xbf{"image": "a", "caption": "\xc3\xa9"}\n'  # byte order mark, é
        b"\n"
        b'{"image": "b", "caption": \n'
        b'{"image": "c", "caption": "\xff"}\n'
        b'{"image": ' + b"1" * 5000 + b"}\n"
        b'["d", "e"]\n'
        b'{"picture": "f", "caption": "g"}\n'
        b'{"image": "h", "caption": ["i", "j"]}',
    )
    rows, counts = read(path)
    assert rows == [("t.jsonl line 1", ["a", "é"]), ("t.jsonl line 8", ["h", ["i", "j"]])]
    assert counts == {
        "not valid JSON": 2,
        "not UTF-8 text": 1,
        "not a JSON object": 1,
        "no column 'image'. Known: caption, picture.": 1,
    }


def test_csv_with_quotes_newlines_and_bad_rows(write):
    path = write(
        "t.csv",
        b"\xef\xbb\xbfimage, caption\r\n"
        b'a,"one, ""two""\nthree"\r\n'
        b"b\r\n"
        b"\r\n"
        b"c,\xff\r\n"
        b"d,x,y\r\n"
        b"e,\xc3\xa9\r\n",
    )
    rows, counts = read(path)
    assert rows == [("t.csv line 2", ["a", 'one, "two"\nthree']), ("t.csv line 8", ["e", "é"])]
    assert counts == {"not 2 fields as in the header": 2, "not UTF-8 text": 1}


def test_csv_with_faulty_quotation_marks(write):
    """Their text would be a guess; an open quotation takes all rows after it."""
    path = write("t.csv", b'image,caption\na,"an \\"odd\\" cat"\nb,"a" dog\nc,"a red\nd,owl\n')
    rows, counts = read(path)
    assert rows == []
    assert counts == {
        "not valid CSV (',' expected after '\"')": 2,
        "not valid CSV (unexpected end of data)": 1,
    }
    with pytest.raises(InputError, match="its header is not valid CSV .unexpected end of data"):
        read(write("h.csv", b'image,"caption\na,b\n'))


def test_csv_of_excel_in_utf16(write):
    with pytest.raises(InputError, match=r"t\.csv: not UTF-8 text; save it as UTF-8"):
        read(write("t.csv", "image,caption\na,b\n".encode("utf-16")))


def test_csv_holds_an_image_as_text(write):
    picture = b"data:image/png;base64," + b"x" * 200_000
    rows, counts = read(write("t.csv", b'image,caption\n"' + picture + b'",y\n'))
    assert rows == [("t.csv line 2", [picture.decode(), "y"])]
    assert counts == {}


def test_csv_field_that_is_too_long_is_one_bad_row(write, monkeypatch):
    monkeypatch.setattr("bindllm.data.tables._MAX_FIELD", 100_000)
    path = write("t.csv", b"image,caption\na," + b"x" * 200_000 + b"\nb,y\n")
    rows, counts = read(path)
    assert rows == [("t.csv line 3", ["b", "y"])]
    assert counts == {"not valid CSV (field larger than field limit (100000))": 1}


def test_tsv_keeps_quotation_marks(write):
    rows, counts = read(write("t.tsv", b'image\tcaption\na\t"quoted" words\nb\tan inch: 1"\n'))
    assert rows == [("t.tsv line 2", ["a", '"quoted" words']), ("t.tsv line 3", ["b", 'an inch: 1"'])]
    assert counts == {}


def test_parquet_with_lists_and_bad_text(tmp_path):
    path = tmp_path / "t.parquet"
    bad = pa.array([b"x", b"\xff", b"z"]).view(pa.string())
    pq.write_table(pa.table({"image": bad, "caption": [["k"], ["l"], None]}), path)
    rows, counts = read(path)
    assert rows == [("t.parquet row 1", ["x", ["k"]]), ("t.parquet row 3", ["z", None])]
    assert counts == {"not UTF-8 text": 1}


@pytest.mark.parametrize(
    ("name", "content"),
    [("t.csv", b"images,caption\n"), ("t.tsv", b"images\tcaption\n"), ("t.csv", b"")],
)
def test_missing_column_gets_the_closest_known_one(write, name, content):
    with pytest.raises(
        InputError, match=r"no column 'image'\. " + ("Did you mean 'images'" if content else "Known")
    ):
        read(write(name, content))


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_arrays([["a"], ["b"], ["c"]], ["image", "caption", "caption"]), path)
    else:
        mark = {"csv": ",", "tsv": "\t"}[kind]
        path.write_text("image,caption, caption\na,b,c\n".replace(",", mark))
    with pytest.raises(InputError, match="several columns are called 'caption'; rename all but one"):
        read(path)


def test_missing_column_of_parquet(tmp_path):
    pq.write_table(pa.table({"image": ["a"], "text": ["b"]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="no column 'caption'. Known: image, text"):
        read(tmp_path / "t.parquet")


def test_files_that_are_no_tables(write, tmp_path):
    with pytest.raises(InputError, match=r"not a table\. Did you mean '\.json'"):
        read(write("t.json1", b""))
    with pytest.raises(InputError, match="not a Parquet file"):
        read(write("t.parquet", b"nothing of the kind"))
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "missing.csv")
