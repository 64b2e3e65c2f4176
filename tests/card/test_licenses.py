from pathlib import Path

import pytest

from bindllm.card.licenses import Licensed, combine, license_parts, spdx
from bindllm.errors import UsageError
from bindllm.model.card import Part, licenses_in


def combined(*expressions):
    return combine(Licensed(f"part {n}", "name", "", text) for n, text in enumerate(expressions))


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("apache-2.0", "Apache-2.0"),
        ("CC-BY-NC 4.0 (no commercial use)", "CC-BY-NC-4.0"),
        ("MIT OR GPL-2.0-only", "MIT OR GPL-2.0-only"),
        ("gemma", "LicenseRef-gemma"),
        ("Apache 2.0 License", "Apache-2.0"),
        ("ISC License (ISCL)", "ISC"),
        # No version is guessed.
        ("GPL", "LicenseRef-GPL"),
        ("", "LicenseRef-unknown"),
        ("derives from LLaMA and ImageBind (CC-BY-NC 4.0)", "LicenseRef-unknown AND CC-BY-NC-4.0"),
    ],
)
def test_licenses_in_words_become_expressions(text, expression):
    assert spdx(text) == expression


def test_the_strictest_license_decides():
    found = combined("MIT", "Apache-2.0", "CC-BY-NC-4.0")
    assert found.expression == "MIT AND Apache-2.0 AND CC-BY-NC-4.0"
    assert found.conditions == ["Non-commercial use only: CC-BY-NC-4.0 of the part 2 (`name`)."]
    assert found.hub == {"license": "cc-by-nc-4.0"}
    assert combined("MIT", "MIT").hub == {"license": "mit"}


def test_share_alike_is_passed_on_and_two_of_them_are_a_question():
    found = combined("CC-BY-NC-SA-4.0", "GPL-3.0-only")
    assert any("Share under the same license: CC-BY-NC-SA-4.0" in text for text in found.conditions)
    assert any("whether both can be kept is a legal question" in text for text in found.warnings)
    assert found.hub["license"] == "other"
    assert found.hub["license_name"] == "cc-by-nc-sa-4.0-and-gpl-3.0-only"


def test_unknown_terms_and_choices_are_warnings():
    unknown, own, choice = (
        combined("MIT", text).warnings for text in (spdx(""), "LicenseRef-llama3", "MIT OR 0BSD")
    )
    assert unknown == ["The license of the part 1 (`name`) is unknown: no file names it."]
    assert "terms that are not known here" in own[0]
    assert "leaves a choice" in choice[0]
    assert combined("MIT", "MIT OR 0BSD").expression == "MIT AND (MIT OR 0BSD)"


def test_the_user_names_the_license_of_a_part():
    part = Part("decoder", "somewhere", "somewhere")
    folders = {"somewhere": Path("somewhere")}
    rows = license_parts([part], folders, origin="", given={"decoder": "apache-2.0"})
    assert [row.expression for row in rows] == ["Apache-2.0", "Apache-2.0"]
    with pytest.raises(UsageError, match="no such part"):
        license_parts([part], folders, origin="", given={"decodr": "MIT"})
    with pytest.raises(UsageError, match="not an SPDX expression"):
        license_parts([part], folders, origin="", given={"decoder": "ask us"})


def test_converted_weights_keep_their_conditions():
    rows = license_parts([], {}, origin="from weights under CC-BY-NC 4.0", given={})
    assert rows[0].part == "trained weights"
    assert "CC-BY-NC-4.0" in combine(rows).expression


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\n---\n# Model", ["mit"]),
        ("---\nlicense: other\nlicense_name: llama3\n---\n", ["llama3"]),
        ("---\nlicense: [mit, cc0-1.0]\n---\n", ["mit", "cc0-1.0"]),
        ("---\n- a list\n---\n", []),
        ("---\n{{{\n---\n", []),
        ("# no metadata\n", []),
    ],
)
def test_the_card_of_a_model_from_the_hub_names_its_license(text, found, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert licenses_in(str(tmp_path)) == found
