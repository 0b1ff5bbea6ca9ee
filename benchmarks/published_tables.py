"""DeepSeek's economics (E1 to E8) and the numbers of the Step-3 report (S1 to S7) of handbook serving 10.2, by the
product's own functions."""

from __future__ import annotations

from dataclasses import dataclass

from planner.disaggregation.attention_ffn import at_other_ratio, sparsity_floor, tok_per_s_per_gpu
from planner.disaggregation.rates import matched_units
from planner.disaggregation.unitcosts import TokenCounts, UnitPrice, token_counts
from planner.economics import fleet_usd, nodes_needed, profit_margin, revenue_usd, usd_per_mtok
from planner.model import load, override
from planner.units import HOUR_S

# DeepSeek open-infra-index, day 6 (2025-03): one day of V3 and R1 on 8-GPU H800 nodes at $2 per GPU-hour.
NODES, PEAK_NODES, USD_PER_GPU_HOUR, DAY_H = 226.75, 278.0, 2.0, 24.0
INPUT, CACHED, OUTPUT = 608e9, 342e9, 168e9
PREFILL, DECODE, HIT = 73_700.0, 14_800.0, 0.563
PRICES = 0.14, 0.55, 2.19
REVENUE_USD, COST_USD = 562_027.0, 87_072.0
# Step-3 report, table 4: dollars per GPU-hour, data-sheet FLOP/s and bytes/s (handbook serving 10.1).
H800, H20 = UnitPrice.of(2.0, 1.98e15, 3.35e12), UnitPrice.of(0.8, 2.96e14, 4.0e12)
FLOORS = (
    ("H800", 1.979e15, 3.35e12, 400e9, 0.0582),
    ("H20", 2.96e14, 4.0e12, 400e9, 0.0073),
    ("A800", 3.12e14, 2.0e12, 200e9, 0.0307),
)
"""Name, FLOP/s, HBM bytes/s, network bytes/s of a node, published least sparsity."""
STAGE_S = 0.0166
ROUNDED = 5e-3
"""Published with two or three digits: half a unit of the last."""

LEFT_OUT = "Not computed: the fourth floor of S5 (910B, 0.034), whose rates are not in the handbook."


@dataclass(frozen=True, slots=True)
class Row:
    """One published number: `ours` is within `tolerance` (relative) of `published` or it is missed."""

    name: str
    what: str
    published: float
    ours: float
    tolerance: float
    how: str

    @property
    def deviation(self) -> float:
        """Ours over published, less one."""
        return self.ours / self.published - 1

    @property
    def met(self) -> bool:
        """True within the tolerance."""
        return abs(self.deviation) <= self.tolerance


def economics() -> list[Row]:
    """E1 to E8."""
    day_s = DAY_H * HOUR_S
    cost = fleet_usd(USD_PER_GPU_HOUR, NODES * 8, DAY_H)
    parts = (CACHED, INPUT - CACHED, OUTPUT), (INPUT * HIT, INPUT * (1 - HIT), OUTPUT)
    stated, by_share = (revenue_usd(zip(tokens, PRICES, strict=True)) for tokens in parts)
    prefill = nodes_needed(INPUT, day_s, PREFILL)
    decode = nodes_needed(OUTPUT, day_s, DECODE)
    matched = sum(matched_units(INPUT / day_s, OUTPUT / day_s, PREFILL, DECODE))

    def price(gpus: float, rate: float) -> float:
        return usd_per_mtok(USD_PER_GPU_HOUR, gpus, rate) or 0.0

    peak = fleet_usd(USD_PER_GPU_HOUR, PEAK_NODES * 8, DAY_H) or 0.0
    gpu_rate = DECODE / 8
    return [
        Row("E1", "cost of a day [$]", COST_USD, cost or 0.0, 1e-9, "economics.fleet_usd"),
        Row("E2", "revenue of a day, rounded tokens [$]", REVENUE_USD, stated, 2e-4, "economics.revenue_usd"),
        Row("E2", "the same by hit share of 56.3 % [$]", REVENUE_USD, by_share, 2e-4, "economics.revenue_usd"),
        Row("E3", "profit over cost", 5.4547, profit_margin(REVENUE_USD, COST_USD) or 0.0, 5e-5, "profit_margin"),
        Row("E4", "prefill nodes", 95.48, prefill, 1e-4, "economics.nodes_needed"),
        Row("E4", "decode nodes", 131.38, decode, 1e-4, "economics.nodes_needed"),
        Row("E4", "both, against the mean that ran", NODES, matched, 6e-4, "disaggregation.rates.matched_units"),
        Row("E5", "$ per Mtok out of a decode node", 0.3003, price(8, DECODE), 2e-4, "economics.usd_per_mtok"),
        Row("E5", "$ per Mtok in of a prefill node", 0.0603, price(8, PREFILL), 1e-3, "economics.usd_per_mtok"),
        Row("E5", "$ per Mtok, all on output", 0.518, price(NODES * 8, OUTPUT / day_s), 1e-3, "usd_per_mtok"),
        Row("E5", "$ per Mtok, all tokens", 0.1122, price(NODES * 8, (INPUT + OUTPUT) / day_s), 1e-3, "usd_per_mtok"),
        Row("E6", "mean over peak nodes", 0.8156, (cost or 0.0) / peak, 1e-4, "economics.fleet_usd"),
        Row("E7", "sequences per GPU at 22 tok/s each", 84.0, gpu_rate / 22, ROUNDED, "arithmetic"),
        Row("E7", "sequences per GPU at 20 tok/s each", 93.0, gpu_rate / 20, 6e-3, "arithmetic"),
        Row("E8", "computed prompt tok/s per node", 32_207.0, PREFILL * (1 - HIT), 5e-5, "arithmetic"),
    ]


def step3() -> list[Row]:
    """S1 to S7."""
    v3, stated = load("deepseek-v3"), override(load("stepfun-ai/step3"), experts="fp8", attention="fp8", dense="fp8")
    counts, at_32k = token_counts(v3, 8192), token_counts(v3, 32768)
    qwen, own = token_counts(load("Qwen/Qwen3-235B-A22B"), 32768), token_counts(stated, 8192)
    how, price = "unitcosts.token_counts", "unitcosts.UnitPrice"
    return [
        Row("S1", "DeepSeek-V3 8K: cache [bytes]", 2.88e8, counts.kv_bytes, ROUNDED, how),
        Row("S1", "DeepSeek-V3 8K: attention [FLOP]", 1.47e11, counts.attention_flop, ROUNDED, how),
        Row("S1", "DeepSeek-V3 8K: feed-forward [FLOP]", 4.84e10, counts.ffn_flop, ROUNDED, how),
        Row("S2", "DeepSeek-V3 32K: cache [bytes]", 1.15e9, at_32k.kv_bytes, ROUNDED, how),
        Row("S2", "Qwen3-235B 32K: cache [bytes]", 3.15e9, qwen.kv_bytes, ROUNDED, how),
        *_prices(counts, own, price),
        *(
            Row(
                "S5",
                f"least sparsity, {name}",
                floor,
                sparsity_floor(7168, 61, flop, hbm, net, STAGE_S),
                1e-2,
                "sparsity_floor",
            )
            for name, flop, hbm, net, floor in FLOORS
        ),
        Row("S6", "tok/s/GPU at 4 of 6", 2693, at_other_ratio(4039, 4, 6), 2e-4, "at_other_ratio"),
        Row("S6", "tok/s/GPU at 4 of 18", 898, at_other_ratio(4039, 4, 18), 1e-3, "at_other_ratio"),
        Row("S7", "tok/s/GPU at 47.5 ms", 4039, tok_per_s_per_gpu(6144, 32, 47.5e-3), 1e-3, "tok_per_s_per_gpu"),
    ]


def _prices(v3: TokenCounts, own: TokenCounts, how: str) -> list[Row]:
    both = H800.attention_usd_per_mtok(v3) + H800.ffn_usd_per_mtok(v3)
    attention = H20.attention_usd_per_mtok(own), H800.attention_usd_per_mtok(own)
    best = min(attention) + H800.ffn_usd_per_mtok(own)
    return [
        Row("S3", "DeepSeek-V3 8K on H800: attention [$/Mtok]", 0.0542, H800.attention_usd_per_mtok(v3), ROUNDED, how),
        Row("S3", "DeepSeek-V3 8K on H800: feed-forward", 0.0136, H800.ffn_usd_per_mtok(v3), ROUNDED, how),
        Row("S3", "DeepSeek-V3 8K on H800: both", 0.068, both, ROUNDED, how),
        Row("S4", "Step-3 8K: attention on H20 [$/Mtok]", 0.0401, attention[0], ROUNDED, how),
        Row("S4", "Step-3 8K: attention on H800", 0.0483, attention[1], ROUNDED, how),
        Row("S4", "Step-3 8K: feed-forward on H800", 0.0150, H800.ffn_usd_per_mtok(own), ROUNDED, how),
        Row("S4", "Step-3 8K: best of both", 0.055, best, 6e-3, how),
    ]
