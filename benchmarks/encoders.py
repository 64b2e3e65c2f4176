"""ImageBind's huge trunks with random weights: their time compared with that of only their matrix products.

The products use the trunk's weights and its number of rows, alternate with the trunk, and write to preallocated
memory, so they only read weights and multiply. A trunk that did nothing else would have share 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.measure import Metric, paired
from bindllm.encoders.imagebind.config import HUGE, TRUNK_OF
from bindllm.encoders.imagebind.network import Trunk, run_views

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Batch sizes and their repetitions; a batch of 32 takes a minute on two cores.
BATCHES = {1: 20, 8: 20, 32: 10} if ON_GPU else {1: 5, 8: 3, 32: 1}
GPU_BATCH = 64
SHAPES: dict[str, tuple[int, ...]] = {
    "image": (3, 224, 224),
    "video": (15, 3, 2, 224, 224),
    "text": (77,),
    "audio": (3, 1, 128, 204),
    "depth": (1, 224, 224),
    "thermal": (1, 224, 224),
    "imu": (6, 2000),
}
"""Input shape of one item of each modality under the published sampling; video and audio have a leading view axis."""
VIEWED = ("video", "audio")


def metrics() -> list[Metric]:
    """Return the share of the matrix rate, half over single precision, and embeddings per second of every modality."""
    vision = random_trunk("vision", torch.float32)
    found = [_share(vision, batch, repeats) for batch, repeats in BATCHES.items()]
    found += _half_precision(vision)
    for modality, trunk_name in TRUNK_OF.items():
        trunk = vision if trunk_name == "vision" else random_trunk(trunk_name, torch.float32)
        found.append(_speed(trunk, modality))
    return found


def random_trunk(name: str, dtype: torch.dtype) -> Trunk:
    """Return a huge trunk whose activations stay of the order of 1."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.device("meta"):
        trunk = Trunk(name, HUGE.trunks[name], HUGE.embedding_size)
    trunk = trunk.to_empty(device=DEVICE).requires_grad_(False).eval()
    for module in trunk.modules():
        for part, tensor in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm):
                tensor.fill_(float(part == "weight"))
            elif part in ("bias", "log_scale"):
                tensor.zero_()
            else:
                fan_in = tensor[0].numel() if tensor.dim() > 1 else len(tensor)
                tensor.normal_(std=fan_in**-0.5, generator=generator)
    return trunk.to(dtype)


def random_views(modality: str, media: int) -> list[Tensor]:
    """Return the views of some prepared media of one modality."""
    shape = SHAPES[modality]
    generator = torch.Generator().manual_seed(0)
    if modality == "text":
        return list(torch.randint(1, 49408, (media, *shape), generator=generator))
    views = torch.randn(media, *shape, generator=generator)
    return list(views.flatten(0, 1) if modality in VIEWED else views)


def runner(trunk: Trunk, modality: str, views: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Return a function that does the work of `ImageBind.embed` after the weights are loaded."""

    def run() -> Tensor:
        with torch.no_grad():
            return run_views(trunk, modality, views, keep_tokens=False)[0]

    return run


def products(trunk: Trunk, rows: int) -> tuple[Callable[[], None], int]:
    """Return a function with only the matrix products of all blocks at this number of rows, and their FLOP."""
    weights = [
        layer.weight
        for block in trunk.blocks
        for layer in (block.attention.qkv, block.attention.out, block.up, block.down)
    ]
    kind = {"device": DEVICE, "dtype": weights[0].dtype}
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1], **kind) for weight in weights[:4]}
    outputs = {weight.shape[0]: torch.empty(rows, weight.shape[0], **kind) for weight in weights[:4]}

    def run() -> None:
        for weight in weights:
            torch.mm(inputs[weight.shape[1]], weight.t(), out=outputs[weight.shape[0]])

    return run, 2 * rows * sum(weight.numel() for weight in weights)


def measured(
    trunk: Trunk,
    modality: str,
    views: Sequence[Tensor],
    *,
    repeats: int,
    run: Callable[[], object] | None = None,
) -> tuple[float, float, float]:
    """Return the share of the matrix rate, the seconds, and the seconds of all operations at that rate."""
    _, (sequence,) = run_views(trunk, modality, views[:1], keep_tokens=True)
    tokens = len(sequence)
    width = trunk.stem.positions.shape[1]
    multiply, work = products(trunk, len(views) * tokens)
    # Attention products and patch embedding; norms, GELU and sums do not count as operations.
    attention = len(trunk.blocks) * 4 * tokens * tokens * width
    patches = 0 if modality == "text" else 2 * (tokens - 1) * trunk.stem.weight.numel()
    extra = len(views) * (attention + (patches // 2 if modality == "image" else patches))
    ratio, ours, products_only = paired(run or runner(trunk, modality, views), multiply, repeats=repeats)
    whole = (work + extra) / work
    return whole / ratio, ours, whole * products_only


def _share(trunk: Trunk, batch: int, repeats: int) -> Metric:
    views = random_views("image", batch)
    share, ours, ideal = measured(trunk, "image", views, repeats=repeats)
    return Metric(
        f"vision_huge_b{batch}_matrix_share", share, "share", 1.0,
        f"float32, batch {batch}: {ours:.2f} s, {ideal:.2f} s at the rate of its own matrix products; at least 0.85 "
        "at batch 8",
    )  # fmt: skip


def _half_precision(vision: Trunk) -> list[Metric]:
    """Compare speed and direction of bfloat16 with float32 if the processor has its instructions."""
    if not (ON_GPU or has_bfloat16()):
        return []
    half = random_trunk("vision", torch.bfloat16)
    batch = GPU_BATCH if ON_GPU else 8
    views = random_views("image", batch)
    single_run, half_run = runner(vision, "image", views), runner(half, "image", views)
    repeats = 10 if ON_GPU else 3
    ratio, single_time, half_time = paired(single_run, half_run, repeats=repeats)
    rows = batch * half.stem.count(views[0].shape)
    allowed, _, _ = paired(products(vision, rows)[0], products(half, rows)[0], repeats=repeats)
    cosine = float((single_run() * half_run()).sum(1).min())
    shape = f"batch {batch}"
    found = [
        Metric(
            "vision_huge_bf16_over_fp32", ratio, "times faster", allowed,
            f"{shape}: {single_time:.2f} s over {half_time:.2f} s; floor: the matrix products only; "
            "at least 1.6",
        ),
        Metric(
            "vision_huge_bf16_cosine", cosine, "cosine", 1.0,
            f"{shape}: least cosine between bfloat16 and float32 embeddings; at least 0.999",
        ),
    ]  # fmt: skip
    return found + (_gpu_shares(half, views) if ON_GPU else [])


def _gpu_shares(half: Trunk, views: Sequence[Tensor]) -> list[Metric]:
    """Return the share of the matrix rate in bfloat16 at a batch that fills a GPU, eager and compiled."""
    found = []
    for name, network in (("eager", half), ("compiled", torch.compile(half))):
        inputs = torch.stack(list(views)).to(DEVICE, half.head.project.weight.dtype)

        def run(network: nn.Module = network, inputs: Tensor = inputs) -> Tensor:
            with torch.no_grad():
                return network(inputs)[0]

        share, ours, ideal = measured(half, "image", views, repeats=20, run=run)
        found.append(
            Metric(
                f"vision_huge_bf16_b{len(views)}_{name}_matrix_share", share, "share", 1.0,
                f"{name}: {ours * 1e3:.0f} ms, {ideal * 1e3:.0f} ms at the rate of its matrix products; at least 0.6",
            )
        )  # fmt: skip
    return found


def _speed(trunk: Trunk, modality: str) -> Metric:
    media = 1 if modality in VIEWED else 8
    media *= 8 if ON_GPU else 1
    views = random_views(modality, media)
    share, ours, ideal = measured(trunk, modality, views, repeats=5 if ON_GPU else 2)
    views_each = f", {len(views) // media} views each" if modality in VIEWED else ""
    return Metric(
        f"imagebind_{modality}_per_second", media / ours, "embeddings/s", media / ideal,
        f"float32, {media} at a time{views_each}; share of the matrix rate {share:.2f}; floor: all operations at the "
        "rate of its own matrix products",
    )  # fmt: skip


def has_bfloat16() -> bool:
    """Return whether the processor has bfloat16 multiplication instructions."""
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))
