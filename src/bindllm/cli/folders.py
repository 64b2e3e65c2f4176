"""``bindllm fetch``, ``convert``, ``export``, ``report`` and ``version``: commands on folders and packages."""

from __future__ import annotations

from typing import Literal

from bindllm.convert import KINDS
from bindllm.errors import UsageError, did_you_mean


def fetch(wanted: tuple[str, ...] = ("recipes/scenes.yaml",)) -> int:
    """Download and verify models and data; complete folders stay as they are.

    names:
      smollm2-135m-instruct  decoder of most recipes
      efficientnet-lite0     image encoder of most recipes
      openmoji               drawings and their names
      scenes                 20,000 scenes of drawings with known answers
      easyvqa                questions about images
      stamps                 photographs and drawings with sentences, some with audio
      links                  views of single drawings, for link-context learning
      languages              views of single drawings, with names in four languages
      minilm                 text encoder
      clip-vocabulary        tokenizer for bindllm convert imagebind
      imagenet-names         datastore of 1,000 names, for a model with context

    Args:
        wanted: names, or recipes whose models and data are fetched

    Example:
        bindllm fetch recipes/scenes.yaml clip-vocabulary
    """
    from bindllm.quickstart import fetch_all

    fetch_all(wanted)
    return 0


def convert(
    what: tuple[str, ...],
    *,
    output: str,
    tokenizer: str | None = None,
    base: str | None = None,
    encoder: tuple[str, ...] = (),
    accept_base: bool = False,
) -> int:
    """Convert published weights of ImageBind, Point-Bind or ImageBind-LLM.

    Every tensor is accounted for: converted, or dropped by a rule. The
    report is conversion.tsv in the output folder.

    Args:
        what: the published FILE; before it its kind (imagebind, pointbind or imagebind-llm), if the file holds several
        output: a folder that does not exist yet, or an empty one
        tokenizer: for imagebind: tokenizer.json of CLIP, or its packed list of merges, or none to convert without
            texts (default: checkpoints/clip-vocabulary/tokenizer.json, which bindllm fetch clip-vocabulary makes)
        base: for imagebind-llm: Hugging Face folder of the LLaMA that it was trained on
        encoder: for imagebind-llm: folder of a converted ImageBind or Point-Bind, or import path of another encoder;
            may be repeated
        accept_base: for imagebind-llm: convert although the base's weights differ from those in training

    Example:
        bindllm convert imagebind_huge.pth --output checkpoints/imagebind
    """
    # argparse has made sure of at least one word.
    *kind, file = what
    if len(kind) > 1:
        raise UsageError(f"one file at a time, not {len(kind)}")
    if kind and kind[0] not in KINDS:
        raise UsageError(f"unknown kind {kind[0]!r}. {did_you_mean(kind[0], KINDS)}")

    from bindllm.cli.options import build_encoder
    from bindllm.convert.published import as_path, convert_published

    convert_published(
        file,
        output,
        kind=kind[0] if kind else None,
        tokenizer=tokenizer,
        base=base,
        encoders=[build_encoder(as_path(value), ()) for value in encoder],
        accept_base=accept_base,
    )
    return 0


def export(
    checkpoint: str,
    output: str,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    decoder: str | None = None,
) -> int:
    """Write the tuned decoder of a checkpoint as a plain Hugging Face folder, its adapter merged.

    The folder has no bind network and no injection: for media, load the
    checkpoint itself.

    Args:
        checkpoint: folder that bindllm fit wrote, with an adapter or a tuned decoder
        output: a folder that does not exist yet, or an earlier export
        dtype: type of the weights (default: that of the decoder's files)
        decoder: folder of the decoder, if it has moved since training

    Example:
        bindllm export checkpoints/pets exports/pets --dtype bfloat16
    """
    from bindllm.model.export import export_decoder

    done = export_decoder(checkpoint, output, decoder=decoder, dtype=dtype)
    print(
        f"{done.folder}: {done.num_merged} projections merged, {done.num_replaced} norms replaced, {done.dtype}; "
        "transformers, vLLM and all other programs that read Hugging Face folders can load it"
    )
    if done.dtype != "float32":
        print(
            f"rounded to {done.dtype}: changes of a short training may be smaller than that; --dtype float32 keeps them"
        )
    if done.quantized:
        print(
            f"merged into the full decoder: training used {done.quantized}, so the answers are similar, not identical"
        )
    print(
        "not included: bind network and injection. A plain model has no input for media, and this folder cannot be the "
        f"decoder of the checkpoint. For media: BindLLM.from_pretrained({checkpoint!r}), or bindllm generate "
        f"{checkpoint}"
    )
    return 0


def report(folder: str) -> int:
    """Write report.html again, from the metrics, captions and log in a checkpoint folder.

    Args:
        folder: a checkpoint folder that bindllm fit wrote

    Example:
        bindllm report checkpoints/scenes
    """
    from bindllm.report.report import rebuild_report

    print(rebuild_report(folder))
    return 0


def version() -> int:
    """Print the versions of bindllm and its dependencies.

    Example:
        bindllm version
    """
    from bindllm.report.report import software_versions

    for package, number in software_versions().items():
        print(f"{package} {number}")
    return 0
