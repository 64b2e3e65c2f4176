from bindllm.errors import MissingExtraError, did_you_mean


def test_an_unknown_name_gets_the_known_ones_and_the_closest():
    assert did_you_mean("captoin", ["caption", "vqa"]) == "Did you mean 'caption'? Known: caption, vqa."
    assert did_you_mean("zzz", ["caption"]) == "Known: caption."
    assert did_you_mean("zzz", []) == "Known: none."


def test_a_missing_extra_says_what_to_install():
    error = MissingExtraError("resvg_py", extra="svg", purpose="read SVG images")
    assert "pip install 'bindllm[svg]'" in str(error)
    assert isinstance(error, ImportError)
