import csv
import json

from bindllm.training.callbacks import RunLog


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as stream:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(stream)]


def test_rows_are_on_disk_at_once_and_new_columns_keep_old_rows(tmp_path):
    log = RunLog(tmp_path)
    log.log_metrics({"train_loss": 2.5, "epoch": 0}, step=0)
    assert rows(tmp_path) == [{"epoch": "0", "step": "0", "train_loss": "2.5"}]
    log.log_metrics({"my_metric": 1.0}, step=1)
    assert rows(tmp_path) == [
        {"epoch": "0", "step": "0", "train_loss": "2.5"},
        {"step": "1", "my_metric": "1.0"},
    ]


def test_a_resumed_run_keeps_earlier_rows_and_drops_those_it_will_log_again(tmp_path):
    first = RunLog(tmp_path)
    for step in range(4):
        first.log_metrics({"train_loss": step, "extra": 7}, step=step)
        first.log_captions([{"model": f"at {step}"}], step)
    again = RunLog(tmp_path)
    again.keep_before(2)
    again.log_metrics({"train_loss": 20}, step=2)
    assert [row["train_loss"] for row in rows(tmp_path)] == ["0", "1", "20"]
    assert rows(tmp_path)[0]["extra"] == "7"
    captions = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert captions == [{"step": 0, "model": "at 0"}, {"step": 1, "model": "at 1"}]


def test_a_line_that_was_cut_by_a_kill_is_dropped(tmp_path):
    log = RunLog(tmp_path)
    log.log_metrics({"train_loss": 1.0}, step=0)
    log.log_captions([{"model": "red"}], 0)
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write("0,")
    with (tmp_path / "captions.jsonl").open("a") as stream:
        stream.write('{"step": 0, "gen')
    again = RunLog(tmp_path)
    again.keep_before(5)
    assert len(rows(tmp_path)) == 1
    assert (tmp_path / "captions.jsonl").read_text() == '{"step": 0, "model": "red"}\n'


def test_a_fresh_run_starts_with_the_header_alone(tmp_path):
    RunLog(tmp_path).keep_before(0)
    assert (tmp_path / "metrics.csv").read_text() == "epoch,step,train_loss,val_loss,lr,gradient_norm\n"


def test_a_caption_with_an_odd_line_break_is_one_line(tmp_path):
    log = RunLog(tmp_path)
    log.log_captions([{"model": "one\u2028two\x85three"}], 0)
    log.keep_before(1)
    (line,) = (tmp_path / "captions.jsonl").read_text(encoding="utf-8").strip("\n").split("\n")
    assert json.loads(line)["model"] == "one\u2028two\x85three"
