import json

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from bindllm.card.bill import bill_of_materials
from bindllm.card.card import write_model_card
from bindllm.card.facts import CardOptions
from bindllm.card.licenses import Combined
from bindllm.errors import InputError, UsageError
from card_parts import write_checkpoint, write_evaluation, write_held_out


@pytest.fixture
def folder(work):
    folder = write_checkpoint(work)
    write_held_out(folder)
    return folder


def test_the_metadata_are_those_of_the_hub(folder):
    options = CardOptions(licenses={"encoder": "MIT"}, languages=["en"], base_models=["org/decoder"])
    write_model_card(folder, options=options)
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.language, data.library_name) == ("cc-by-sa-4.0", ["en"], "bindllm")
    assert (data.base_model, data.base_model_relation) == (["org/decoder"], "adapter")
    assert (data.pipeline_tag, data.tags) == ("image-text-to-text", ["bindllm", "image"])
    (result,) = data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == (
        "held-out answers",
        "accuracy",
        0.8,
    )


def test_the_card_states_parts_data_results_and_gaps(folder):
    text = card(folder)
    assert "| decoder | `models/decoder` | Apache-2.0 |" in text
    assert "| encoder | `my_lab.Encoder` | LicenseRef-unknown |" in text
    assert "| `data/shapes` | caption | 5 image | 5 | 2 |" in text
    assert "| optimizer: lr | 0.01 |" in text
    assert "| `model` | 0.8 |" in text
    assert "- Without the image the same model answers 0.0% right." in text
    assert "- test split: 1 of 2 media are training media too, by content." in text
    assert "- Any published benchmark." in text
    assert "The license of the encoder (`my_lab.Encoder`) is unknown" in text


def test_an_evaluation_becomes_a_result_for_leaderboards(folder, work):
    pope = write_evaluation(work / "pope", folder)
    written = write_model_card(folder, [pope], CardOptions(datasets={"pope": "lab/POPE:random"}))
    (entry,) = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results" / "pope.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("lab/POPE", "random", 0.5)
    assert entry.notes.startswith("bindllm; accuracy 0.5 (0.")
    assert entry.notes.endswith("95 % interval, 40 items")
    text = (folder / "README.md").read_text()
    assert "Any published benchmark" not in text
    assert "40 of 41 questions (1 without their media), 1 answers that could not be read." in text
    # 0.png to 2.png are training images, and 4.png has the content of one.
    assert "- pope: 3 of 4 media are training media too, by content." in text
    assert folder / ".eval_results" / "pope.yaml" in written.files
    # A benchmark may be a table; its media are named from the folder of it.
    file = pope / "evaluation.json"
    file.write_text(file.read_text().replace("data/shapes", "data/shapes/captions.jsonl"))
    # A result that is no longer claimed is removed, and one of the owner stays.
    (folder / ".eval_results" / "own.yaml").write_text("[]\n")
    written = write_model_card(folder, [pope])
    assert [file.name for file in (folder / ".eval_results").iterdir()] == ["own.yaml"]
    assert any("pope: not in .eval_results" in warning for warning in written.warnings)
    assert "- pope: 3 of 4 media are training media too" in (folder / "README.md").read_text()


def test_an_evaluation_of_other_weights_is_refused(folder, work):
    pope = write_evaluation(work / "pope", folder, fingerprint="00" * 32)
    with pytest.raises(InputError, match="measured other weights"):
        write_model_card(folder, [pope])
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        "{",
        '{"format": 1, "complete": false}',
        '{"format": 1, "complete": true, "benchmark": "pope"}',
    ],
)
def test_a_damaged_evaluation_is_named(content, folder, work):
    pope = write_evaluation(work / "pope", folder)
    (pope / "evaluation.json").write_text(content)
    with pytest.raises(InputError, match="pope"):
        write_model_card(folder, [pope])


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.json", "report/facts.json", "bindllm.json"])
@pytest.mark.parametrize(
    "content", ['{"data": 3, "tasks": 3}', '{"data": {"sources": [{}]}, "tasks": {"x": {}}}']
)
def test_files_of_any_shape_are_one_error(name, content, folder):
    (folder / name).write_text(content)
    with pytest.raises(InputError, match="damaged"):
        write_model_card(folder)
    assert not (folder / "bom.cdx.json").exists()


def test_a_data_set_of_a_benchmark_that_was_not_evaluated_is_refused(folder):
    with pytest.raises(UsageError, match="no evaluation of it"):
        write_model_card(folder, options=CardOptions(datasets={"pope": "lab/POPE"}))


def test_text_of_the_owner_is_kept(folder):
    card(folder)
    readme = folder / "README.md"
    readme.write_text(readme.read_text() + "\n## Contact\n\nUs.\n")
    assert card(folder) == card(folder)
    assert card(folder).endswith("## Contact\n\nUs.\n")
    # A whole page that bindllm did not write.
    readme.write_text("# Our own page\n")
    assert card(folder).endswith("# Our own page\n")


def test_the_bill_of_materials_lists_models_data_and_software(folder):
    write_model_card(folder)
    bill = json.loads((folder / "bom.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    kinds = {part["name"]: part["type"] for part in bill["components"]}
    assert kinds["models/decoder"] == "machine-learning-model"
    assert (kinds["data/shapes"], kinds["torch"]) == ("data", "library")
    torch = next(part for part in bill["components"] if part["name"] == "torch")
    assert torch["purl"] == f"pkg:pypi/torch@{torch['version']}"
    references = {part["bom-ref"] for part in bill["components"]}
    assert set(bill["dependencies"][0]["dependsOn"]) == references
    assert "LicenseRef-unknown" in bill["metadata"]["component"]["licenses"][0]["expression"]


def test_bills_of_checkpoints_that_differ_in_their_adapter_only_differ(folder):
    manifest = json.loads((folder / "bindllm.json").read_text())
    combined = Combined("Apache-2.0", [], [], {})
    serials = {
        bill_of_materials("m", {**manifest, **adapter}, (), combined)["serialNumber"]
        for adapter in ({}, {"adapter_sha256": "a" * 64}, {"adapter_sha256": "b" * 64})
    }
    assert len(serials) == 3


def test_a_checkpoint_without_a_recipe_claims_nothing_about_training(folder):
    for name in ("recipe.yaml", "metrics.json", "report/facts.json"):
        (folder / name).unlink()
    text = card(folder)
    assert "the training is not known here" in text
    assert "No evaluation was made." in text
    assert "Overlap of training and test media: the folder has no recipe." in text
    assert "pipeline_tag" not in text


def test_a_source_that_is_gone_is_listed_as_not_compared(folder, work):
    (work / "data").rename(work / "moved")
    assert "- Overlap of training and test media: data/shapes:" in card(folder)


def card(folder):
    write_model_card(folder)
    return (folder / "README.md").read_text()
