"""The sentences around a class name."""

import pytest

from bindllm.errors import InputError
from bindllm.evaluation.zero_shot import TEMPLATES, check_template, fill_templates, read_templates


def test_every_default_template_has_a_place_for_the_name():
    for templates in TEMPLATES.values():
        assert templates
        assert all(check_template(template) for template in templates)


def test_names_with_braces_stay_as_they_are():
    filled = fill_templates(["a {b}", "c"], ["the {}.", "{} and {}"])
    assert [text.source for text in filled] == ["the a {b}.", "a {b} and a {b}", "the c.", "c and c"]


def test_a_file_of_templates(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeff# of the paper\n\n  a photo of a {}. \nart of the {}.\n", encoding="utf-8")
    assert read_templates(file) == ("a photo of a {}.", "art of the {}.")
    file.write_text("a photo of a {}.\na photo\n")
    with pytest.raises(InputError, match=r"prompts\.txt line 2: 'a photo' has no \{\} for the class name"):
        read_templates(file)
    file.write_text("# nothing\n")
    with pytest.raises(InputError, match="contains no template"):
        read_templates(file)
    with pytest.raises(InputError, match="nowhere.txt: cannot be read"):
        read_templates(tmp_path / "nowhere.txt")
