from bindllm.cli import main
from card_parts import write_checkpoint


def test_the_command_prints_files_and_warnings(work, capsys):
    folder = write_checkpoint(work)
    assert main(["card", str(folder), "--language", "en"]) == 0
    out = capsys.readouterr().out
    assert f"written: {folder / 'README.md'}" in out
    assert "warning: The license of the encoder (`my_lab.Encoder`) is unknown" in out
    assert "checks, listed in the card" in out


def test_pairs_are_checked_first(work, capsys):
    assert main(["card", "nowhere", "--license", "decoder"]) == 2
    assert "--license decoder: expected NAME=VALUE" in capsys.readouterr().err
    assert main(["card", "nowhere", "--dataset", "a=b/c", "--dataset", "a=b/d"]) == 2
    assert "given twice" in capsys.readouterr().err
    assert main(["card", "nowhere"]) == 1
