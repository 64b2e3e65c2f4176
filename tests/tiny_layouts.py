"""Tiny data sets in the layouts of published ones, and an encoder with known results."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import torch

from bindllm.errors import MediaError
from bindllm.media import Media

WORDS = ("nothing", "dog", "cat", "rain", "car", "chair", "lamp", "desk", "speech", "bird", "sea", "wind")


class WordEncoder:
    """Files and texts contain words: the embedding is the normalized sum of the axes of the known words.

    Args:
        modalities: supported modalities.
        space: name of its joint space.
    """

    embedding_size = len(WORDS)

    def __init__(
        self, modalities: str = "image audio video point depth text", space: str | None = "words"
    ) -> None:
        self.modalities = tuple(modalities.split())
        self.space = space
        self.embedded: list[str] = []

    @property
    def config(self) -> dict:
        return {"modalities": " ".join(self.modalities), "space": self.space}

    def fingerprint(self) -> str:
        return hashlib.sha256(f"WordEncoder {self.config}".encode()).hexdigest()

    def to(self, device) -> WordEncoder:
        return self

    def prepare(self, media: Media) -> torch.Tensor:
        try:
            words = str(media.source) if media.modality == "text" else Path(media.source).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise MediaError(f"{media.name}: cannot be read ({error})") from error
        if "broken" in words:
            raise MediaError(f"{media.name}: broken")
        words = "".join(char if char.isalpha() else " " for char in words.lower()).split()
        axes = torch.tensor([float(words.count(word)) for word in WORDS])
        return axes if axes.any() else torch.eye(len(WORDS))[0]

    def embed(self, modality: str, inputs) -> torch.Tensor:
        self.embedded += [modality] * len(inputs)
        return torch.nn.functional.normalize(torch.stack(list(inputs)), dim=-1)


def write(file: Path, words: str) -> Path:
    """Write a text file, and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(words, encoding="utf-8")
    return file


def write_csv(file: Path, header: str, *rows: list) -> Path:
    """Write a table with a header."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header.split(","), *rows])
    return file


def write_json(file: Path, content) -> Path:
    return write(file, json.dumps(content))


SYNSETS = {"n00000001": "dog, domestic dog", "n00000002": "cat", "n00000003": "rain", "n00000004": "car"} | {
    "n00000005": "chair",
    "n00000006": "lamp",
}
IMAGES = {"n00000001": ["dog", "dog two", "cat"], "n00000002": ["cat"]}
"""Three of the four are right: 0.75, by class 2/3 and 1."""


def imagenet(folder: Path) -> Path:
    """`val/<wnid>/*.JPEG` and Kaggle's table of names."""
    write(folder / "LOC_synset_mapping.txt", "".join(f"{key} {names}\n" for key, names in SYNSETS.items()))
    for key, contents in IMAGES.items():
        for number, words in enumerate(contents):
            write(folder / "val" / key / f"ILSVRC2012_val_{key}{number}.JPEG", words)
    write(folder / "val" / "n00000001" / "._ILSVRC2012_val_0.JPEG", "left by an archive of macOS")
    return folder


def imagenet_flat(folder: Path) -> Path:
    """The flat validation folder of the Kaggle release, with its solution."""
    write(folder / "LOC_synset_mapping.txt", "".join(f"{key} {names}\n" for key, names in SYNSETS.items()))
    rows = []
    for key, contents in IMAGES.items():
        for number, words in enumerate(contents):
            name = f"ILSVRC2012_val_{key}{number}"
            write(folder / "ILSVRC/Data/CLS-LOC/val" / f"{name}.JPEG", words)
            rows.append([name, f"{key} 85 1 499 272 {key} 1 2 3 4 "])
    write_csv(folder / "LOC_val_solution.csv", "ImageId,PredictionString", *rows)
    return folder


def esc50(folder: Path) -> Path:
    """Two folds: in the first both clips are right, in the second one of two."""
    clips = [("1-a.wav", 1, 0, "dog", "dog"), ("1-b.wav", 1, 10, "sea_wind", "sea wind")]
    clips += [("2-a.wav", 2, 0, "dog", "rain"), ("2-b.wav", 2, 11, "rain", "rain")]
    rows = []
    for name, fold, target, category, words in clips:
        write(folder / "audio" / name, words)
        rows.append([name, fold, target, category, "False", "1", "A"])
    write_csv(folder / "meta/esc50.csv", "filename,fold,target,category,esc10,src_file,take", *rows)
    return folder


def modelnet(folder: Path) -> Path:
    """`<class>/{train,test}/*.off`: of the test shapes three of four are right."""
    for name, words in (
        ("chair/test/chair_0002", "chair"),
        ("chair/test/chair_0003", "lamp"),
        ("lamp/test/lamp_0002", "lamp"),
        ("night_desk/test/night_desk_0002", "desk"),
        ("chair/train/chair_0001", "lamp"),
    ):
        write(folder / f"{name}.off", words)
    return folder


def modelnet_resampled(folder: Path) -> Path:
    """`modelnet40_normal_resampled`: a list of names, a list of shapes, and tables of points."""
    write(folder / "modelnet40_shape_names.txt", "chair\nlamp\nnight_desk\n")
    write(folder / "modelnet40_test.txt", "chair_0002\nchair_0003\nlamp_0002\nnight_desk_0002\n")
    write(folder / "modelnet40_train.txt", "chair_0001\n")
    for name, words in (("chair_0002", "chair"), ("chair_0003", "lamp"), ("lamp_0002", "lamp")):
        write(folder / name.rpartition("_")[0] / f"{name}.txt", words)
    write(folder / "night_desk/night_desk_0002.txt", "desk")
    return folder


def audioset(folder: Path) -> Path:
    """Three classes, one without a clip; the clips called in three ways, and one that has vanished."""
    write(
        folder / "class_labels_indices.csv",
        'index,mid,display_name\n0,/m/1,"Speech"\n1,/m/2,"Dog, domestic"\n2,/m/3,"Car"\n',
    )
    write(
        folder / "eval_segments.csv",
        "# Segments csv created Sun Mar  5 10:54:25 2017\n# num_ytids=5\n"
        "# YTID, start_seconds, end_seconds, positive_labels\n"
        '--aaaaaaaaa, 30.000, 40.000, "/m/1,/m/2"\nbbbbbbbbbbb, 0.000, 10.000, "/m/2"\n'
        'ccccccccccc, 20.000, 30.000, "/m/2"\nddddddddddd, 5.500, 15.500, "/m/1"\n'
        'vanishedxxx, 0.000, 10.000, "/m/1,/m/3"\n',
    )
    write(folder / "eval/--aaaaaaaaa.wav", "speech dog")
    write(folder / "eval/Ybbbbbbbbbbb.flac", "speech")
    write(folder / "eval/ccccccccccc_20000_30000.wav", "dog")
    write(folder / "videos/ddddddddddd_5.5.mp4", "car")
    return folder


CLIPS = {"dog": ["a dog", "a cat"], "rain": ["rain", "a dog again"]}
"""What a sound or image holds, and what is said about it.

To the dog's sound "a dog" and "a dog again" are alike: it finds the right one in half of the orders, so recall@1 is
0.75. Of the texts "a dog" and "rain" are right, "a dog again" is wrong and "a cat" is like neither: 0.625.
"""


def audiocaps(folder: Path) -> Path:
    """`test.csv`, one clip named by its video and start, one by its number, one vanished."""
    rows, videos = [], {"dog": ("vid-dogxxxx", 30), "rain": ("vid_rainxxx", 0)}
    for words, captions in CLIPS.items():
        for number, caption in enumerate(captions):
            rows.append([f"{words}{number}", *videos[words], caption])
    rows.append(["103", "vanishedxxx", 20, "wind"])
    write_csv(folder / "test.csv", "audiocap_id,youtube_id,start_time,caption", *rows)
    write(folder / "audio/vid-dogxxxx_30.wav", "dog")
    write(folder / "audio/rain1.wav", "rain")
    return folder


def clotho(folder: Path) -> Path:
    """`clotho_captions_evaluation.csv` and `evaluation/*.wav`; captions repeat to make five."""
    rows = []
    for words, captions in CLIPS.items():
        write(folder / "evaluation" / f"The {words}, at night.wav", words)
        rows.append([f"The {words}, at night.wav", *captions, *captions, captions[0]])
    header = "file_name,caption_1,caption_2,caption_3,caption_4,caption_5"
    write_csv(folder / "clotho_captions_evaluation.csv", header, *rows)
    return folder


def coco(folder: Path) -> Path:
    """`annotations/captions_val2017.json` and `val2017/`."""
    images, annotations = [], []
    for number, (words, captions) in enumerate(CLIPS.items()):
        write(folder / "val2017" / f"{number:012}.jpg", words)
        images.append({"id": number, "file_name": f"{number:012}.jpg", "height": 9, "width": 9})
        annotations += [{"id": len(c), "image_id": number, "caption": f"{c}\n"} for c in captions]
    write_json(folder / "annotations/captions_val2017.json", {"images": images, "annotations": annotations})
    return folder


def coco_karpathy(folder: Path) -> Path:
    """Karpathy's splits over the images of 2017, which are in other folders and have lost their prefix."""
    write_json(
        folder / "dataset_coco.json", {"dataset": "coco", "images": karpathy("COCO_val2014_{:012}.jpg")}
    )
    for number, words in enumerate(CLIPS):
        write(folder / ("train2017", "val2017")[number] / f"{number:012}.jpg", words)
    return folder


def karpathy(name: str) -> list[dict]:
    """Two test images and one of the training split."""
    images = []
    for number, captions in enumerate([*CLIPS.values(), ["wind"]]):
        sentences = [{"raw": caption, "tokens": caption.split()} for caption in captions]
        split = "test" if number < len(CLIPS) else "train"
        images.append({"filename": name.format(number), "split": split, "sentences": sentences})
        images[-1] |= {"filepath": "val2014"} if "COCO" in name else {}
    return images


def flickr30k(folder: Path) -> Path:
    """Karpathy's split, and a folder of images."""
    write_json(folder / "dataset_flickr30k.json", {"images": karpathy("{}.jpg")})
    for number, words in enumerate(CLIPS):
        write(folder / "flickr30k-images" / f"{number}.jpg", words)
    return folder


def flickr30k_csv(folder: Path) -> Path:
    """`results.csv`, with the one row of the published file that lacks a separator."""
    write(
        folder / "results.csv",
        "image_name| comment_number| comment\n0.jpg| 0| a dog\n0.jpg| 1   a cat\n1.jpg| 0| rain\n"
        "1.jpg| 1| a dog again\n",
    )
    for number, words in enumerate(CLIPS):
        write(folder / "flickr30k_images/flickr30k_images" / f"{number}.jpg", words)
    return folder


def flickr30k_token(folder: Path) -> Path:
    """`results_20130124.token`."""
    lines = [f"{n}.jpg#{m}\t{text}" for n, texts in enumerate(CLIPS.values()) for m, text in enumerate(texts)]
    write(folder / "results_20130124.token", "\n".join(lines))
    for number, words in enumerate(CLIPS):
        write(folder / "images" / f"{number}.jpg", words)
    return folder


LAYOUTS = {
    "imagenet": imagenet,
    "esc50": esc50,
    "audioset": audioset,
    "modelnet40": modelnet,
    "audiocaps": audiocaps,
    "clotho": clotho,
    "coco": coco,
    "flickr30k": flickr30k,
}
"""Writer of the usual form of each published data set."""
