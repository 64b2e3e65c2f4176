"""One pass through the decoder with the media bound to its tokens, and logits where they are needed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel


@dataclass
class BindOutput:
    """What a forward gives.

    Attributes:
        logits: [B, T, V] without labels; with labels [N, V], at the N positions that predict a supervised token.
        targets: the supervised tokens, [N], or None.
        rows: the row of the batch that each of them is in, [N], or None.
    """

    logits: Tensor
    targets: Tensor | None = None
    rows: Tensor | None = None


def run_decoder(
    decoder: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    bind: Tensor,
    media_index: Tensor,
    labels: Tensor | None,
    plain_logits: bool,
) -> BindOutput:
    """Run a decoder that carries an injection.

    Args:
        decoder: its hooks take ``bind`` and ``media_index``.
        input_ids: [B, T].
        attention_mask: 1 for tokens, 0 for padding on either side, [B, T].
        bind: bind vector of each media group, [B, M, D].
        media_index: the media group that each token listens to, or -1, [B, T].
        labels: the supervised token ids at their own place, -100 elsewhere, [B, T]; None: logits everywhere.
        plain_logits: as `bindllm.model.decoder.has_plain_logits` says of this decoder.
    """
    padded_left = not bool(attention_mask[:, 0].all())
    inputs = {"input_ids": input_ids, "use_cache": False, "bind": bind, "media_index": media_index}
    if padded_left:
        inputs["attention_mask"] = attention_mask
        inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp_(min=0)
    # Else neither: causal attention never looks at padding on the right, and runs faster without a mask.
    if labels is None:
        return BindOutput(decoder(**inputs).logits)
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    if plain_logits:
        hidden = decoder.get_decoder()(**inputs).last_hidden_state
        logits = decoder.get_output_embeddings()(hidden[rows, columns])
    else:
        logits = decoder(**inputs).logits[rows, columns]
    return BindOutput(logits, labels[rows, columns + 1], rows)
