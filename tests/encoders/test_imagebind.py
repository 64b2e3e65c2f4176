"""ImageBind's small model, through key table and folder, against the published results; and what the class promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bindllm.encoders.imagebind import ImageBind
from bindllm.encoders.imagebind.config import TRUNK_OF
from goldens import fill_input, golden
from imagebind_small import SCALES, write_small_imagebind

# Name of the golden, modality, shape and range of its inputs. Shapes with a view's dimensions and one more in front
# are a batch; with two more, a batch of several views each.
CASES = [
    ("vision", "image", (2, 3, 224, 224), 2.0),
    ("vision_196", "image", (1, 3, 196, 196), 2.0),
    ("vision_252", "image", (1, 3, 252, 252), 2.0),
    ("image_clips", "image", (2, 2, 3, 224, 224), 2.0),
    ("video_clips", "video", (2, 3, 3, 2, 224, 224), 2.0),
    ("audio", "audio", (2, 1, 128, 204), 1.5),
    ("audio_clips", "audio", (2, 3, 1, 128, 204), 1.5),
    ("audio_quiet", "audio", (1, 1, 128, 204), 0.01),
    ("depth", "depth", (2, 1, 224, 224), 1.0),
    ("depth_quiet", "depth", (1, 1, 224, 224), 0.01),
    ("thermal", "thermal", (2, 1, 224, 224), 1.0),
    ("thermal_quiet", "thermal", (1, 1, 224, 224), 0.01),
    ("imu", "imu", (2, 6, 2000), 3.0),
    ("imu_quiet", "imu", (1, 6, 2000), 0.01),
]
TEXT = ("text", "text", (), 0.0)
RESULTS = golden("imagebind_small")


def inputs_of(name: str, shape: tuple[int, ...] = (), limit: float = 0.0) -> torch.Tensor:
    if name.startswith("text"):
        return torch.from_numpy(RESULTS["text/ids"])
    return fill_input(name, shape, -limit, limit)


def distance(found: torch.Tensor, expected: np.ndarray) -> float:
    assert tuple(found.shape) == expected.shape
    return float((found.double() - torch.from_numpy(expected).double()).abs().max())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_small_imagebind(tmp_path_factory.mktemp("imagebind") / "small")


@pytest.fixture(scope="module")
def published(folder):
    return ImageBind(str(folder), scale="published")


@pytest.fixture(scope="module")
def encoder(folder):
    return ImageBind(str(folder))


@pytest.mark.parametrize(("name", "modality", "shape", "limit"), [*CASES, TEXT])
def test_results_are_the_published_ones(published, name, modality, shape, limit):
    inputs = inputs_of(name, shape, limit)
    assert distance(published.embed(modality, list(inputs)), RESULTS[f"{name}/out"]) < 1e-5
    views = inputs.flatten(0, 1) if name.endswith("clips") else inputs
    with torch.no_grad():
        head, _ = published._trunk(TRUNK_OF[modality])(views)
    assert distance(head, RESULTS[f"{name}/head"]) < 1e-5


@pytest.mark.parametrize(
    ("name", "modality", "shape", "limit"), [case for case in [*CASES, TEXT] if f"{case[0]}/trunk" in RESULTS]
)
def test_each_step_is_the_published_one(published, name, modality, shape, limit):
    inputs = inputs_of(name, shape, limit)
    trunk = published._trunk(TRUNK_OF[modality])
    pooled = []
    hook = trunk.head.norm.register_forward_hook(lambda *call: pooled.append(call[-1]))
    with torch.no_grad():
        steps = {"tokens": trunk.stem(inputs)}
        if f"{name}/stem" in RESULTS:
            steps["stem"] = trunk.stem.cut(inputs)[0]
        if name == "vision":
            steps["preln"] = trunk.input_norm(steps["tokens"])
        steps["block0"] = trunk.blocks[0](trunk.input_norm(steps["tokens"]))
        steps["trunk"] = trunk(inputs)[1]
    hook.remove()
    for step, found in steps.items():
        assert distance(found[0, :40], RESULTS[f"{name}/{step}"]) < 1e-5, step
    assert distance(pooled[0], RESULTS[f"{name}/pooled"]) < 1e-5


def test_the_learned_scale_is_capped(tmp_path):
    encoder = ImageBind(str(write_small_imagebind(tmp_path / "five", text_log_scale=5.0)), scale="published")
    embeddings = encoder.embed("text", list(inputs_of("text")))
    assert distance(embeddings, RESULTS["text_scale5/out"]) < 5e-5
    assert torch.allclose(embeddings.norm(dim=1), torch.tensor(100.0))


@pytest.mark.parametrize(
    "case", [case for case in CASES if "_quiet" not in case[0]], ids=lambda case: case[0]
)
def test_unit_embeddings_are_the_published_ones_normalized(encoder, case):
    name, modality, shape, limit = case
    embeddings = encoder.embed(modality, list(inputs_of(name, shape, limit)))
    expected = torch.from_numpy(RESULTS[f"{name}/out"])
    assert (embeddings.norm(dim=1) - 1).abs().max() < 1e-6
    assert (embeddings - expected / expected.norm(dim=1, keepdim=True)).abs().max() < 1e-5


def test_published_single_views_have_the_scale_of_their_modality(published):
    for name, modality, shape, limit in CASES:
        if name in SCALES:
            norms = published.embed(modality, list(inputs_of(name, shape, limit))).norm(dim=1)
            assert torch.allclose(norms, torch.tensor(SCALES[name])), name


def test_media_of_one_batch_may_have_any_number_of_clips(published):
    clips, single = (
        inputs_of("audio_clips", (2, 3, 1, 128, 204), 1.5),
        inputs_of("audio", (2, 1, 128, 204), 1.5),
    )
    ragged = [single[0], clips[0], single[1][None], clips[1]]
    expected = np.stack([RESULTS["audio/out"][0], RESULTS["audio_clips/out"][0]])
    found = published.embed("audio", ragged)
    assert distance(found[:2], expected) < 1e-5
    assert distance(found[2:], np.stack([RESULTS["audio/out"][1], RESULTS["audio_clips/out"][1]])) < 1e-5


def test_a_picture_is_a_film_of_two_equal_frames(encoder):
    picture = inputs_of("vision", (2, 3, 224, 224), 2.0)[0]
    image = encoder.embed("image", [picture])
    for frames in (1, 2):
        film = encoder.embed("video", [picture[:, None].expand(3, frames, 224, 224)])
        assert (film - image).abs().max() < 1e-6
    moving = torch.stack([picture, picture.flip(-1)], 1)
    assert (encoder.embed("video", [moving]) - image).abs().max() > 1e-3


def test_pictures_of_8_bits_are_normalized(encoder):
    picture = (
        torch.arange(3 * 224 * 224, dtype=torch.int64)
        .mul(2654435761)
        .remainder(256)
        .view(3, 224, 224)
        .to(torch.uint8)
    )
    mean, deviation = (torch.tensor(row).view(3, 1, 1) for row in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711),
    ))  # fmt: skip
    expected = encoder.embed("image", [(picture / 255 - mean) / deviation])
    assert (encoder.embed("image", [picture]) - expected).abs().max() < 1e-6
    film = torch.stack([picture, picture], 1)
    assert (encoder.embed("video", [film]) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(("modality", "shape"), [("depth", (1, 192, 192)), ("thermal", (1, 256, 256))])
def test_depth_and_thermal_pictures_of_other_sizes_are_taken(encoder, modality, shape):
    table = encoder._trunk(modality).stem
    side = shape[-1] // 16
    positions = table._positions((side, side))
    # Bicubic resizing reproduces its grid's corners' neighborhood: the mean of a smooth table hardly moves.
    assert positions.shape == (1 + side * side, table.positions.shape[1])
    assert torch.equal(positions[0], table.positions[0])
    square = table.positions[1:].unflatten(0, (14, 14)).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(square, size=(side, side), mode="bicubic")[0].flatten(1).T
    assert torch.equal(positions[1:], resized)
    embedding = encoder.embed(modality, [fill_input("other", shape, -1.0, 1.0)])
    assert abs(float(embedding.norm()) - 1) < 1e-6


def test_texts_pool_at_their_first_end_token(encoder):
    ids = torch.zeros(77, dtype=torch.int64)
    ids[:4] = torch.tensor([49406, 320, 1929, 49407])
    again = ids.clone()
    again[40] = 49407
    padded = ids.clone()
    padded[10:] = 17
    one, two, three = encoder.embed("text", [ids, again, padded])
    # Nothing behind the end token is seen.
    assert torch.equal(one, two)
    assert torch.equal(one, three)


def test_tokens_come_with_the_embeddings(encoder):
    clips = inputs_of("audio_clips", (2, 3, 1, 128, 204), 1.5)
    found = encoder.embed("audio", [clips[0], clips[1][0]], tokens=True)
    assert torch.equal(found.embeddings, encoder.embed("audio", [clips[0], clips[1][0]]))
    assert [tuple(each.shape) for each in found.tokens] == [(3, 12, 19, 48), (1, 12, 19, 48)]
    single = encoder.embed("audio", [inputs_of("audio", (2, 1, 128, 204), 1.5)[0]], tokens=True)
    # The class token is the first of the trunk, and not on the grid.
    assert distance(single.tokens[0].flatten(0, 2)[:39], RESULTS["audio/trunk"][1:]) < 1e-5
    ids = inputs_of("text")
    text = encoder.embed("text", list(ids), tokens=True)
    assert [len(each) for each in text.tokens] == (ids.argmax(1) + 1).tolist()
    for each, row in zip(text.tokens, ids, strict=True):
        assert torch.equal(each, encoder.embed("text", [row], tokens=True).tokens[0])
    length = min(40, len(text.tokens[0]))
    assert distance(text.tokens[0][:length], RESULTS["text/trunk"][:length]) < 1e-5
    for modality, shape, grid in (
        ("image", (3, 224, 224), (16, 16)),
        ("depth", (1, 224, 224), (14, 14)),
        ("imu", (6, 2000), (250,)),
        ("video", (2, 3, 2, 224, 224), (2, 16, 16)),
    ):
        (tokens,) = encoder.embed(modality, [fill_input("grid", shape, -1.0, 1.0)], tokens=True).tokens
        assert tokens.shape == (*grid, encoder.token_sizes[modality])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("name", "modality", "shape", "limit"), [*CASES, TEXT])
def test_half_precision_points_the_same_way(folder, encoder, dtype, name, modality, shape, limit):
    inputs = list(inputs_of(name, shape, limit))
    half = ImageBind(str(folder), dtype=dtype).embed(modality, inputs)
    assert half.dtype == torch.float32
    assert (half.norm(dim=1) - 1).abs().max() < 1e-6
    cosines = (half * encoder.embed(modality, inputs)).sum(1)
    assert cosines.min() >= 0.999
    assert cosines.max() < 1 - 1e-10


def test_small_chunks_change_nothing(encoder, monkeypatch):
    films = [fill_input(f"film{n}", (count, 3, 2, 224, 224), -2, 2) for n, count in enumerate((1, 4, 2))]
    whole = encoder.embed("video", films, tokens=True)
    sizes = []
    trunk = encoder._trunk("vision")
    hook = trunk.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    monkeypatch.setattr("bindllm.encoders.imagebind.network._CPU_BYTES", 2 * 257 * 256 * 4)
    parts = encoder.embed("video", films, tokens=True)
    hook.remove()
    assert sizes == [2, 2, 2, 1]
    assert (parts.embeddings - whole.embeddings).abs().max() < 1e-6
    for a, b in zip(parts.tokens, whole.tokens, strict=True):
        assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["vision", "video_clips", "vision_252", "audio", "depth", "imu", "text"])
def test_a_trunk_compiles_as_one_graph(published, name):
    modality, shape, limit = next(case[1:] for case in [*CASES, TEXT] if case[0] == name)
    trunk = published._trunk(TRUNK_OF[modality])
    inputs = inputs_of(name, shape, limit)
    inputs = inputs.flatten(0, 1) if name.endswith("clips") else inputs
    torch._dynamo.reset()
    with torch.no_grad():
        head, _ = torch.compile(trunk, fullgraph=True, backend="eager")(inputs)
    assert distance(head, RESULTS[f"{name}/head"]) < 1e-5


def test_gradients_reach_the_inputs(published):
    # An encoder is frozen, but who looks into it (saliency, tuning by prompts) finds a graph.
    picture = inputs_of("vision", (2, 3, 224, 224), 2.0).requires_grad_(True)
    head, _ = published._trunk("vision")(picture)
    head.square().sum().backward()
    assert picture.grad.abs().sum() > 0
    assert all(not weight.requires_grad for weight in published._trunk("vision").parameters())


def test_autocast_around_it_changes_nothing(encoder):
    inputs = list(inputs_of("imu", (2, 6, 2000), 3.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = encoder.embed("imu", inputs)
    assert torch.equal(inside, encoder.embed("imu", inputs))
