"""PointBind on small networks with made-up weights: contract, settings, errors, degenerate clouds."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bindllm.encoders import PointBind, Tuned
from bindllm.encoders.pointbind.networks import I2PMAE
from bindllm.errors import EncoderError, InputError, MediaError
from bindllm.media import Media
from bindllm.testing import check_encoder
from pointbind_parts import POINTS, SIZES, bumpy, write_small

VARIANTS = sorted(SIZES)


@pytest.fixture(params=VARIANTS, scope="module")
def encoder(request, tmp_path_factory) -> PointBind:
    folder = tmp_path_factory.mktemp("small") / request.param
    return PointBind(write_small(folder, request.param), points=POINTS)


def clouds(*counts: int) -> list[Media]:
    return [Media.point(bumpy(seed, count)) for seed, count in enumerate(counts)]


def test_keeps_the_contract(encoder):
    check_encoder(encoder, clouds(200, POINTS, 40, 3, 1000))


def test_belongs_to_the_space_of_imagebind(encoder):
    assert (encoder.space, encoder.embedding_size) == ("imagebind", 1024)


def test_batches_of_unequal_clouds_equal_single_ones(encoder):
    inputs = [encoder.prepare(media) for media in clouds(200, 30, 96, 5000, 7)]
    batch, tokens = encoder.embed("point", inputs, tokens=True)
    for row, group, one in zip(batch, tokens, inputs, strict=True):
        alone = encoder.embed("point", [one], tokens=True)
        assert (alone.embeddings[0] - row).abs().max() < 1e-6
        assert (alone.tokens[0] - group).abs().max() < 1e-5


def test_its_blocks_are_trained(encoder):
    entry = {"class_path": "bindllm.encoders.PointBind", "init_args": encoder.config}
    tuned = Tuned(entry)
    inputs = [tuned.prepare(media) for media in clouds(200, 30)]
    assert torch.equal(tuned.embed("point", inputs), encoder.embed("point", inputs))
    for parameter in tuned.parameters().values():
        parameter.requires_grad_(True)
    tuned.embed("point", inputs)[:, :9].sum().backward()
    # Blocks of all levels.
    numbers = {int(name.partition(".")[0]) for name, value in tuned.parameters().items() if value.grad.any()}
    assert numbers == set(range(5 if isinstance(encoder.network, I2PMAE) else 2))
    assert not encoder.embed("point", inputs).requires_grad


def test_tokens_are_those_of_the_groups(encoder):
    inputs = [encoder.prepare(media) for media in clouds(200, 30)]
    embeddings, tokens = encoder.embed("point", inputs, tokens=True)
    shape = (6, 36) if isinstance(encoder.network, I2PMAE) else (24, 24)
    assert [each.shape for each in tokens] == [shape] * 2
    assert encoder.token_sizes == {"point": shape[1]}
    assert torch.equal(embeddings, encoder.embed("point", inputs))
    # They carry the cloud: no two groups are alike.
    assert torch.pdist(tokens[0]).min() > 1e-4


@pytest.mark.parametrize("cloud", [np.zeros((1, 3)), np.eye(3), np.full((50, 3), 7.0), np.zeros((5000, 3))])
def test_degenerate_clouds_have_finite_unit_embeddings(encoder, cloud):
    embeddings = encoder.embed("point", [encoder.prepare(Media.point(cloud.astype(np.float32)))])
    assert torch.isfinite(embeddings).all()
    assert float(embeddings.norm()) == pytest.approx(1, abs=1e-5)


def test_position_and_size_of_a_cloud_do_not_matter_but_its_shape_does(encoder):
    points = bumpy(0, POINTS)
    media = [points, points * 3 - 20, points * (1, 1, 2)]
    same, moved, stretched = encoder.embed(
        "point", [encoder.prepare(Media.point(array.astype(np.float32))) for array in media]
    )
    assert (same - moved).abs().max() < 1e-4
    assert (same - stretched).abs().max() > 1e-3


def test_order_of_points_behind_the_first_does_not_matter(encoder):
    points = bumpy(0, POINTS)
    turned = np.concatenate([points[:1], points[:0:-1]])
    first, second = encoder.embed(
        "point", [encoder.prepare(Media.point(array)) for array in (points, turned)]
    )
    assert (first - second).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_differ_by_rounding_only(encoder, dtype):
    other = PointBind(**encoder.config | {"dtype": dtype})
    inputs = [encoder.prepare(media) for media in clouds(200, 30, 96)]
    full, half = encoder.embed("point", inputs), other.embed("point", inputs)
    assert half.dtype == torch.float32
    assert (full * half).sum(dim=-1).min() > 0.999
    assert not torch.equal(full, half)
    for ours, theirs in zip(
        encoder.network.group(torch.stack(inputs)), other.network.group(torch.stack(inputs)), strict=True
    ):
        assert torch.equal(ours.chosen, theirs.chosen)
        assert torch.equal(ours.neighbors, theirs.neighbors)


def test_the_network_compiles_as_one_graph(encoder):
    points = torch.stack([encoder.prepare(media) for media in clouds(200, 30)])
    network = encoder.network
    levels = network.group(points)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad():
        for ours, theirs in zip(network(points, levels), compiled(points, levels), strict=True):
            assert (ours - theirs).abs().max() < 1e-6


def test_the_network_stays_frozen(encoder):
    inputs = [encoder.prepare(media) for media in clouds(200)]
    before = encoder.embed("point", inputs)
    assert not any(parameter.requires_grad for parameter in encoder.network.parameters())
    encoder.network.train()
    assert torch.equal(before, encoder.embed("point", inputs))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(before, encoder.embed("point", inputs))


def test_nothing_is_loaded_before_the_first_embedding(tmp_path):
    encoder = PointBind(str(tmp_path / "nowhere"), points=POINTS)
    assert encoder.prepare(Media.point(bumpy(0))).shape == (POINTS, 3)
    for use in (encoder.fingerprint, lambda: encoder.embed("point", [torch.zeros(POINTS, 3)])):
        with pytest.raises(EncoderError, match="bindllm convert pointbind FILE --output .*nowhere"):
            use()


def test_fingerprint_tells_weights_variant_and_settings_apart(encoder, tmp_path):
    config = encoder.config
    prints = {encoder.fingerprint()}
    prints.add(PointBind(**config | {"dtype": "bfloat16"}).fingerprint())
    prints.add(PointBind(**config | {"points": POINTS + 1}).fingerprint())
    # The radius is no tensor: without the config, the same weights would count as the same encoder.
    for name, radius in (("near", [0.3, 0.8, 1.2]), ("far", [0.5, 0.8, 1.2])):
        folder = write_small(tmp_path / name, "i2p-mae", radius=radius)
        prints.add(PointBind(folder, points=POINTS).fingerprint())
    assert len(prints) == 5


def test_bad_settings():
    with pytest.raises(InputError, match="Did you mean 'float16'"):
        PointBind(dtype="float15")
    for points in (0, 2.5, True):
        with pytest.raises(InputError, match="8192"):
            PointBind(points=points)


def test_bad_inputs(encoder, tmp_path):
    with pytest.raises(InputError, match="'image'"):
        encoder.embed("image", [torch.zeros(POINTS, 3)])
    with pytest.raises(InputError, match=r"not \[5, 3\]; call prepare"):
        encoder.embed("point", [torch.zeros(5, 3)])
    with pytest.raises(MediaError, match="gone.ply"):
        encoder.prepare(Media.point(tmp_path / "gone.ply"))
    small = PointBind(**encoder.config | {"points": 10})
    with pytest.raises(EncoderError, match="at least 24 points"):
        small.embed("point", [torch.zeros(10, 3)])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON.*bindllm convert pointbind FILE"),
        ("[]", "variant None is unknown"),
        ('{"variant": "point-bart"}', "Did you mean 'point-bert'"),
        ('{"variant": "i2p-mae", "sizes": 3}', "must be an object"),
        ('{"variant": "i2p-mae", "sizes": {"radii": [1]}}', "the size 'radii' is unknown"),
        ('{"variant": "i2p-mae", "sizes": {"depth": [1]}}', "every level needs all of its sizes"),
        ('{"variant": "i2p-mae", "sizes": {"groups": [64, 8, 4]}}', "fewer groups than the next one gathers"),
        ('{"variant": "point-bert", "sizes": {"heads": 5}}', "cannot be shared by 5 heads"),
        ('{"variant": "point-bert", "sizes": {"width": "wide"}}', "no network can have"),
    ],
)
def test_bad_configs(tmp_path, content, words):
    write_small(tmp_path, "point-bert")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(EncoderError, match=words):
        PointBind(str(tmp_path), points=POINTS).embed("point", [torch.zeros(POINTS, 3)])


def test_missing_unexpected_and_misshaped_tensors_are_all_listed(tmp_path):
    write_small(tmp_path, "point-bert")
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["norm.bias"]
    tensors["extra"] = torch.zeros(2)
    tensors["class_token"] = torch.zeros(1, 1, 7)
    # Half a batch norm is no batch norm.
    tensors["groups.first_norm.running_var"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(EncoderError) as caught:
        PointBind(str(tmp_path), points=POINTS).embed("point", [torch.zeros(POINTS, 3)])
    for words in (
        "missing norm.bias",
        "unexpected extra",
        "unexpected groups.first_norm.running_var",
        "class_token has shape [1, 1, 7], expected [1, 1, 24]",
    ):
        assert words in str(caught.value)


def test_damaged_weights(tmp_path):
    write_small(tmp_path, "i2p-mae")
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(EncoderError, match="not a readable safetensors file"):
        PointBind(str(tmp_path), points=POINTS).embed("point", [torch.zeros(POINTS, 3)])


def test_published_sizes_are_the_defaults(tmp_path):
    write_small(tmp_path, "point-bert")
    (tmp_path / "config.json").write_text('{"variant": "point-bert"}')
    with pytest.raises(EncoderError, match=r"class_token has shape \[1, 1, 24\], expected \[1, 1, 384\]"):
        PointBind(str(tmp_path)).embed("point", [torch.zeros(8192, 3)])
