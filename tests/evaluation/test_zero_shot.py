"""Zero-shot metrics on tiny data sets with known results, and the report of skipped media."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

import tiny_layouts as tiny
from bindllm.cache.visual_cache import VisualCache
from bindllm.embeddings.precompute import precompute_embeddings
from bindllm.embeddings.store import EmbeddingStore
from bindllm.errors import EncoderError, InputError, StoreError
from bindllm.evaluation import measures
from bindllm.evaluation.layouts import Choice, Column, Dataset, Item, read_layout
from bindllm.evaluation.zero_shot import (
    TEMPLATES,
    check_template,
    evaluate_zero_shot,
    fill_templates,
    read_templates,
)
from bindllm.media import Media
from tiny_layouts import WordEncoder, write


def measure(layout, folder, *, encoders=None, choice=None, **settings):
    dataset = read_layout(layout, folder, choice)
    return evaluate_zero_shot(
        dataset,
        encoders or [WordEncoder()],
        store=folder.parent / "store",
        templates=settings.pop("templates", None),
        **settings,
    )


@pytest.fixture(params=[None, 1, 3], ids=["whole", "one by one", "by three"])
def _chunks(request, monkeypatch):
    """The numbers do not depend on how many scores are in memory at a time."""
    if request.param:
        monkeypatch.setattr(measures, "_CHUNK", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("write_it", [tiny.imagenet, tiny.imagenet_flat])
def test_accuracy(tmp_path, write_it):
    result = measure("imagenet", write_it(tmp_path / "set"))
    assert result["top-1 accuracy"] == 0.75
    assert result["mean accuracy per class"] == pytest.approx((2 / 3 + 1) / 2)
    # For the cat image among the dogs five classes are equally distant, and four of them fit into the first five.
    assert result["top-5 accuracy"] == pytest.approx((3 + 4 / 5) / 4)
    assert [one.chance for one in result.measures] == pytest.approx([1 / 6, 5 / 6, 1 / 6])
    assert [one.num_queries for one in result.measures] == [4, 4, 2]
    assert (result.num_measured, result.num_listed) == (4, 4)
    assert result.classes[0] == {"name": "dog", "num_items": 3, "accuracy": pytest.approx(2 / 3)}
    assert result.classes[2] == {"name": "rain", "num_items": 0, "accuracy": None}
    assert "4 of 6 classes have no media here" in result.notes


def test_accuracy_of_other_modalities(tmp_path):
    assert measure("esc50", tiny.esc50(tmp_path / "esc"))["top-1 accuracy"] == 0.75
    for fold, expected in ((1, 1.0), (2, 0.5)):
        result = measure("esc50", tmp_path / "esc", choice=Choice(folds=(fold,)))
        assert result["top-1 accuracy"] == expected
    for name in ("modelnet", "modelnet_resampled"):
        result = measure("modelnet40", getattr(tiny, name)(tmp_path / name))
        assert (result["top-1 accuracy"], result.modality) == (0.75, "point")
        assert "top-5 accuracy" not in [one.name for one in result.measures]


def test_a_class_is_the_mean_of_its_prompts_at_unit_length(tmp_path):
    """With "{}" and "{} rain rain rain" the class dog lies at (.811, .585) between the axes of dog and rain.

    So a sound is a dog from 0.51 parts of dog to one of rain on. Were the sentences not of unit length before they
    are averaged, it would be from 0.30 on; were their mean not, from 0.80; by the first sentence alone, from 1.
    """
    write(tmp_path / "set/dog/a.wav", "dog dog dog rain rain rain rain rain")
    write(tmp_path / "set/rain/b.wav", "dog dog rain rain rain rain rain")
    result = measure("folder", tmp_path / "set", templates=["{}", "{} rain rain rain"])
    assert result["top-1 accuracy"] == 1
    assert measure("folder", tmp_path / "set", templates=["{}"])["top-1 accuracy"] == 0.5
    assert result.templates == ("{}", "{} rain rain rain")


@pytest.mark.usefixtures("_chunks")
def test_mean_average_precision(tmp_path):
    """By hand: speech 1/2 * 1/2 + 1/2 * 2/4, dog 1/3 * (1 + 1 + 3/4); of cars there is no clip."""
    result = measure("audioset", tiny.audioset(tmp_path / "set"))
    speech, dog = 1 / 2, (1 + 1 + 3 / 4) / 3
    assert result["mAP"] == pytest.approx((speech + dog) / 2, abs=1e-6)
    found = [one["average_precision"] for one in result.classes]
    assert found == [pytest.approx(speech, abs=1e-6), pytest.approx(dog, abs=1e-6), None]
    assert "1 of 3 classes have no media here" in result.notes
    assert (result.num_measured, result.num_listed, result.measures[0].num_queries) == (4, 5, 2)
    assert list(result.skipped.lines()) == ["1 x the file does not exist (vanishedxxx from 0 s)"]


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize(("layout", "media"), [("audiocaps", "audio"), ("coco", "image")])
def test_recall_in_both_directions(tmp_path, layout, media):
    result = measure(layout, tiny.LAYOUTS[layout](tmp_path / "set"))
    assert result[f"{media} to text recall@1"] == 0.75
    assert result[f"text to {media} recall@1"] == 0.625
    by_name = {one.name: one for one in result.measures}
    assert by_name[f"{media} to text recall@1"].chance == 0.5
    assert by_name[f"text to {media} recall@1"].chance == 0.5
    assert by_name[f"text to {media} recall@1"].num_queries == 4
    # Of four texts and two media the first five are all of them, which is no measure.
    assert len(by_name) == 2


def test_equal_media_and_equal_texts_are_one(tmp_path):
    """Two files with the same content have all captions of both; a caption of two images is right for both."""
    write(
        tmp_path / "set/captions.csv",
        "image,caption\na.png,a dog\nb.png,the rain\nc.png,the rain\nc.png,a car\nd.png,a lamp\n",
    )
    for name, words in (("a", "dog"), ("b", "dog"), ("c", "rain"), ("d", "lamp")):
        write(tmp_path / f"set/{name}.png", words)
    result = measure("table", tmp_path / "set", choice=Choice(split="all"))
    # Dog: "a dog" of the first file counts. Rain: one of its texts. Lamp.
    assert result["image to text recall@1"] == 1
    # "a dog" and "the rain" (dog or rain is right) and "a lamp" are right; to "a car" all three are alike.
    assert result["text to image recall@1"] == pytest.approx((3 + 1 / 3) / 4)
    queries = [(one.num_queries, one.num_candidates) for one in result.measures]
    assert queries == [(3, 4), (4, 3)]
    assert any(note.startswith("1 media have the same content as another one") for note in result.notes)


def test_retrieval_between_any_two_modalities(tmp_path):
    rows = [
        {"image": f"{name}.png", "sound": f"{name}.ogg", "split": "test"} for name in ("dog", "rain", "car")
    ]
    write(tmp_path / "set/captions.jsonl", "\n".join(map(json.dumps, rows)))
    for name, heard in (("dog", "dog"), ("rain", "rain"), ("car", "dog wind")):
        write(tmp_path / f"set/{name}.png", name)
        write(tmp_path / f"set/{name}.ogg", heard)
    choice = Choice(source=Column("audio", "sound"), target=Column("image", "image"))
    result = measure("table", tmp_path / "set", choice=choice)
    # The car's audio is taken for the dog; to the car's image all audio clips are equally distant.
    assert result["audio to image recall@1"] == pytest.approx(2 / 3)
    assert result["image to audio recall@1"] == pytest.approx((2 + 1 / 3) / 3)
    write(tmp_path / "set/car.png", "broken")
    result = measure("table", tmp_path / "set", choice=choice)
    assert result.skipped.examples == {"none of its targets can be read": [str(tmp_path / "set/car.ogg")]}
    with pytest.raises(InputError, match="prompts need texts, but image is retrieved"):
        measure("table", tmp_path / "set", choice=choice, templates=["a photo of a {}."])


def test_templates_of_captions_are_averaged(tmp_path):
    """A second template mentions rain, so all captions of the dog come closer to the rain."""
    plain = measure("clotho", tiny.clotho(tmp_path / "set"))
    result = measure("clotho", tmp_path / "set", templates=["{}", "{} rain"])
    # "a cat" is equally distant from both clips; "a cat rain" is closer to the wrong one.
    assert plain["text to audio recall@1"] == 0.625
    assert result["text to audio recall@1"] == 0.5
    assert result.measures[0].num_candidates == 4


def test_an_encoder_with_one_constant_embedding_reaches_exactly_chance(tmp_path):
    class Blind(WordEncoder):
        def embed(self, modality, inputs):
            return torch.eye(self.embedding_size)[[3] * len(inputs)]

        def fingerprint(self):
            return "b" * 64

    for layout in ("imagenet", "clotho", "coco", "modelnet"):
        folder = getattr(tiny, layout)(tmp_path / layout)
        result = measure(layout.replace("modelnet", "modelnet40"), folder, encoders=[Blind()])
        assert result.measures
        for one in result.measures:
            assert one.value == pytest.approx(one.chance), one.name


def test_a_second_run_only_reads_the_store(tmp_path):
    first, second = WordEncoder(), WordEncoder()
    folder = tiny.audioset(tmp_path / "set")
    one = measure("audioset", folder, encoders=[first])
    assert Counter(first.embedded) == {"audio": 4, "text": 3}
    assert one.num_encoded == 7
    two = measure("audioset", folder, encoders=[second])
    assert (second.embedded, two.num_encoded) == ([], 0)
    assert two.measures == one.measures
    # Another data set with the same content: only its texts are new.
    measure("esc50", tiny.esc50(tmp_path / "esc"), encoders=[second])
    assert Counter(second.embedded)["audio"] == 2


def test_files_that_cannot_be_read_are_skipped_and_reported(tmp_path):
    folder = tiny.imagenet(tmp_path / "set")
    write(folder / "val/n00000002/ILSVRC2012_val_9.JPEG", "broken")
    result = measure("imagenet", folder)
    assert (result["top-1 accuracy"], result.num_measured, result.num_listed) == (0.75, 4, 5)
    assert result.skipped.counts == {"the file cannot be read": 1}
    assert result.skipped.examples["the file cannot be read"][0].endswith("ILSVRC2012_val_9.JPEG: broken")
    clotho = tiny.clotho(tmp_path / "clotho")
    with (clotho / "clotho_captions_evaluation.csv").open("a") as table:
        table.write("broken.wav,wind,wind,wind,wind,wind\n")
    write(clotho / "evaluation/broken.wav", "broken")
    result = measure("clotho", clotho)
    # Its caption is no candidate either.
    assert (result["audio to text recall@1"], result.measures[0].num_candidates) == (0.75, 4)
    assert (result.num_measured, result.num_listed) == (2, 3)


def test_a_task_can_be_measured_again(tmp_path):
    folder = tiny.audiocaps(tmp_path / "set")
    write(folder / "audio/rain1.wav", "broken")
    dataset = read_layout("audiocaps", folder)
    one, two = (evaluate_zero_shot(dataset, [WordEncoder()], store=tmp_path / "store") for _ in range(2))
    assert (one.skipped, one.measures, one.notes) == (two.skipped, two.measures, two.notes)
    assert one.skipped.total == 2


def test_nothing_to_measure_is_an_error(tmp_path):
    for file in (tiny.esc50(tmp_path / "set") / "audio").iterdir():
        file.write_text("broken")
    with pytest.raises(InputError, match=r"none of 4 media can be measured: 4 x the file cannot be read"):
        measure("esc50", tmp_path / "set")
    with pytest.raises(InputError, match="the prompt 'broken dog' cannot be embedded"):
        measure("imagenet", tiny.imagenet(tmp_path / "other"), templates=["broken {}"])


def test_encoders_that_do_not_serve_the_modality(tmp_path):
    folder = tiny.esc50(tmp_path / "set")
    with pytest.raises(
        InputError, match=r"needs an encoder of audio for its media; the given encoders support image, text"
    ):
        measure("esc50", folder, encoders=[WordEncoder("image text")])
    with pytest.raises(InputError, match=r"needs an encoder of text for the texts or media to compare"):
        measure("esc50", folder, encoders=[WordEncoder("audio")])


def test_encoders_that_were_never_trained_together_get_a_warning(tmp_path):
    folder = tiny.esc50(tmp_path / "set")
    result = measure("esc50", folder, encoders=[WordEncoder("audio"), WordEncoder("text", space="other")])
    assert "was never trained together with" in result.warnings[0]
    assert result["top-1 accuracy"] == 0.75
    # An encoder that the data set does not need is not a reason to warn.
    others = [WordEncoder("audio"), WordEncoder("text"), WordEncoder("image", space="other")]
    assert measure("esc50", folder, encoders=others).warnings == []


def image_cache(folder, words, **settings):
    encoder = WordEncoder()
    store = EmbeddingStore.for_encoder(folder / "images", encoder)
    files = [write(folder / f"{number}.png", content) for number, content in enumerate(words)]
    precompute_embeddings(store, encoder, [Media.image(file) for file in files])
    return VisualCache.build(folder / "cache", store, **settings)


def test_queries_are_blended_with_a_cache(tmp_path):
    """The image nearest to a clip of rain and dog shows more dog: blended with it, the clip is taken for a dog."""
    write(tmp_path / "set/dog/a.wav", "dog dog dog dog rain rain rain rain rain")
    write(tmp_path / "set/rain/b.wav", "rain")
    assert measure("folder", tmp_path / "set")["top-1 accuracy"] == 0.5
    cache = image_cache(tmp_path, ["dog dog rain", "car"], top_k=1, weight=0.5)
    result = measure("folder", tmp_path / "set", cache=cache)
    # The other clip finds the same image and is still classified as rain.
    assert result["top-1 accuracy"] == 1
    assert (result.cache["weight"], result.cache["images"]) == (0.5, 2)
    assert (
        measure("folder", tmp_path / "set", cache=image_cache(tmp_path / "b", ["dog dog rain"], weight=0.0))[
            "top-1 accuracy"
        ]
        == 0.5
    )


def test_a_cache_skips_images_and_needs_its_encoder(tmp_path):
    cache = image_cache(tmp_path, ["dog", "car"], weight=1.0)
    result = measure("imagenet", tiny.imagenet(tmp_path / "set"), cache=cache)
    assert result["top-1 accuracy"] == 0.75
    assert "the cache skips image queries" in result.notes
    other = WordEncoder("image text", space="other")
    with pytest.raises(StoreError, match="was built with the encoder"):
        measure("imagenet", tmp_path / "set", encoders=[other], cache=cache)
    assert other.embedded == []


def test_a_crash_of_the_encoder_loses_nothing_that_was_embedded(tmp_path):
    class Stops(WordEncoder):
        def embed(self, modality, inputs):
            if modality == "text":
                raise EncoderError("out of memory")
            return super().embed(modality, inputs)

    folder = tiny.esc50(tmp_path / "set")
    with pytest.raises(EncoderError, match="out of memory"):
        measure("esc50", folder, encoders=[Stops()])
    encoder = WordEncoder()
    measure("esc50", folder, encoders=[encoder])
    assert "audio" not in encoder.embedded


def test_classes_with_the_same_name_are_reported(tmp_path):
    classes = write(tmp_path / "classes.tsv", "dog\tcrane\ncat\tcrane\n")
    for name in ("dog", "cat"):
        write(tmp_path / f"set/{name}/a.png", name)
    result = measure("folder", tmp_path / "set", choice=Choice(classes=classes))
    assert result["top-1 accuracy"] == 0.5
    assert "2 classes have the same name as another one and cannot be distinguished" in result.notes


def test_blocks_give_the_result_of_one_matrix(tmp_path):
    """A random data set, compared with the whole matrix of cosines."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(300, 12, generator=generator), dim=1)

    class Given(WordEncoder):
        def prepare(self, media):
            if media.modality == "text":
                return rows[260 + int(media.source[1:])]
            return rows[int(Path(media.source).name)]

        def fingerprint(self):
            return "c" * 64

    labels = torch.randint(0, 40, (260,), generator=generator)
    for number in range(260):
        write(tmp_path / f"set/{number}", str(number))
    items = [Item(Media.audio(f"{tmp_path}/set/{n}"), labels=(int(label),)) for n, label in enumerate(labels)]
    dataset = Dataset("classify", "audio", items, num_listed=260, classes=[(f"k{n}",) for n in range(40)])
    result = evaluate_zero_shot(dataset, [Given()], store=tmp_path / "store", templates=["{}"])
    scores = rows[:260] @ rows[260:].T
    assert result["top-1 accuracy"] == pytest.approx(float((scores.argmax(1) == labels).double().mean()))
    five = (scores.topk(5).indices == labels[:, None]).any(dim=1)
    assert result["top-5 accuracy"] == pytest.approx(float(five.double().mean()))


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
