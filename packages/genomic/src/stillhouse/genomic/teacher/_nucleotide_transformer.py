"""The Nucleotide Transformer v2 in the ESM classes of transformers. Imports transformers.

NTv2 is ESM with a gated MLP: the first layer of each MLP has twice the width, and SiLU of one half multiplies
the other, without biases where `add_bias_fnn` is false. The code that comes with the released weights was
written for transformers 4 and imports names that transformers 5 no longer has; this module needs none of
it.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import EsmConfig, EsmForMaskedLM


class GatedIntermediate(nn.Module):
    """SiLU(a) · b with [a, b] = W x; [..., d] → [..., intermediate_size]."""

    def __init__(self, config: EsmConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.add_bias_fnn)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply it."""
        gate, value = self.dense(hidden_states).chunk(2, dim=-1)
        return F.silu(gate) * value


class NucleotideTransformerV2(EsmForMaskedLM):
    """ESM for masked language modelling with NTv2's gated MLP; the names of the weights are those released.

    Args:
        config: an `EsmConfig` with NTv2's `add_bias_fnn`.
    """

    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012, transformers reads a list
        r"position_embeddings\.weight",
        r"rotary_embeddings\.inv_freq",
        r"position_ids",
    ]

    def __init__(self, config: EsmConfig) -> None:
        super().__init__(config)
        layers: Any = self.esm.encoder.layer
        for layer in layers:
            layer.intermediate = GatedIntermediate(config)
            layer.output.dense = nn.Linear(
                config.intermediate_size, config.hidden_size, bias=config.add_bias_fnn
            )
            for fresh in (layer.intermediate.dense, layer.output.dense):
                self._init_weights(fresh)
