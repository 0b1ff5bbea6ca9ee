"""What one generated token must compute and read at least, and the least it can cost on a GPU (Step-3 report, 2).

Counts are per token at a given context: cost >= max(FLOP x price of a FLOP, bytes x price of a byte) per component,
with data-sheet rates, so a floor and never a forecast (handbook serving 10.1). The cache is counted in one byte per
value and rates are those of 8 bits, as the report does.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.model import ModelConfig
from planner.model.config import Attention
from planner.units import HOUR_S

_TOKENS_PER_MTOK = 1e6


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """FLOP and cache bytes of one generated token.

    `attention_flop` are those on the cache, `projection_flop` those with attention weights, `ffn_flop` those of
    experts, shared experts and dense feed-forward.
    """

    kv_bytes: float
    attention_flop: float
    projection_flop: float
    ffn_flop: float


@dataclass(frozen=True, slots=True)
class UnitPrice:
    """Dollars of one FLOP and of one byte read, each as if nothing else were used."""

    usd_per_flop: float
    usd_per_byte: float

    @classmethod
    def of(cls, usd_per_hour: float, flop_per_s: float, bytes_per_s: float) -> UnitPrice:
        """From the price of a GPU-hour and its data-sheet rates.

        >>> price = UnitPrice.of(2.0, 1.98e15, 3.35e12)
        >>> f"{price.usd_per_flop:.2g} {price.usd_per_byte:.3g}"
        '2.8e-19 1.66e-16'
        """
        return cls(usd_per_hour / HOUR_S / flop_per_s, usd_per_hour / HOUR_S / bytes_per_s)

    def attention_usd_per_mtok(self, counts: TokenCounts) -> float:
        """Projections, and the cache at its dearer side."""
        cache = max(counts.attention_flop * self.usd_per_flop, counts.kv_bytes * self.usd_per_byte)
        return _TOKENS_PER_MTOK * (cache + counts.projection_flop * self.usd_per_flop)

    def ffn_usd_per_mtok(self, counts: TokenCounts) -> float:
        """Experts at a batch that hides their weights."""
        return _TOKENS_PER_MTOK * counts.ffn_flop * self.usd_per_flop


def token_counts(model: ModelConfig, context: int) -> TokenCounts:
    """Counts of one token after `context` others.

    MLA is counted on its latent, keys and values both as wide as a cached row (2 x 576 for DeepSeek-V3, Step-3
    report, table 2); others by their head widths.

    >>> from planner.model import load
    >>> counts = token_counts(load("deepseek-v3"), 8192)
    >>> f"{counts.kv_bytes:.3g} {counts.attention_flop:.3g} {counts.ffn_flop:.4g}"
    '2.88e+08 1.47e+11 4.836e+10'
    """
    kv_bytes = attention_flop = projections = ffn = 0.0
    for layer in model.layers:
        for mixer in layer.mixers:
            if isinstance(mixer, Attention):
                seen = min(context, mixer.window or context)
                latent = (mixer.kv_lora_rank or 0) + (mixer.qk_rope_head_dim or 0)
                width = 2 * latent if mixer.kind == "mla" else mixer.qk_head_dim + mixer.v_head_dim
                kv_bytes += mixer.kv_values * seen
                attention_flop += 2.0 * mixer.num_heads * width * seen
        share = layer.moe.active_experts / layer.moe.num_experts if layer.moe else 1.0
        for weight in layer.weights:
            if weight.is_matrix and weight.part == "attention":
                projections += 2.0 * weight.params
            elif weight.is_matrix and weight.part in ("expert", "shared_expert", "dense_ffn"):
                ffn += 2.0 * weight.params * (share if weight.part == "expert" else 1.0)
    return TokenCounts(kv_bytes, attention_flop, projections, ffn)
