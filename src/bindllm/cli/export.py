"""``bindllm export``: merge the adapter of a checkpoint into a plain Hugging Face folder."""

from __future__ import annotations

from bindllm.cli.usage import Arguments


def export(args: list[str]) -> int:
    """Export one checkpoint, and say what is in the folder, what is not, and what to load for that."""
    parser = Arguments(
        "export",
        "Merge the adapter of a checkpoint into its decoder, as a plain Hugging Face folder for other programs. Bind "
        "network and injection have no place in one: for media, load the checkpoint itself.",
    )
    parser.add_argument("checkpoint", help="folder that bindllm fit wrote, with an adapter")
    parser.add_argument("output", help="a folder that is not there yet, or an earlier export")
    parser.add_argument(
        "--dtype",
        metavar="DTYPE",
        help="float32, bfloat16 or float16; by default that of the decoder's files",
    )
    parser.add_argument(
        "--decoder", metavar="FOLDER", help="where the decoder is, if not where it was in training"
    )
    chosen = parser.parse_args(args)

    from bindllm.model.export import export_decoder

    done = export_decoder(chosen.checkpoint, chosen.output, decoder=chosen.decoder, dtype=chosen.dtype)
    print(
        f"{done.folder}: {done.num_merged} projections merged, {done.num_replaced} norms replaced, {done.dtype}; "
        "transformers, vLLM and whatever else reads Hugging Face folders can load it"
    )
    if done.dtype != "float32":
        print(
            f"rounded to {done.dtype}: what a short training changes may be as small as that; --dtype float32 keeps it"
        )
    if done.quantized:
        print(
            f"merged into the full decoder: in training it was held in {done.quantized}, so the two answer nearly, not "
            "exactly, alike"
        )
    print(
        "not in it: bind network and injection. A plain model has no input for media, and this one is no decoder for "
        f"the checkpoint either. For media: BindLLM.from_pretrained({chosen.checkpoint!r}), or bindllm generate "
        f"{chosen.checkpoint}"
    )
    return 0
