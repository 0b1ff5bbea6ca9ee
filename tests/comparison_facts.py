"""Facts of a comparison as `compare --json` gives them, invented for tests of its report."""

from __future__ import annotations

from typing import Any


def system(name: str, gpus: int, usd: float | None, best: float | None, **more: Any) -> dict[str, Any]:
    """One system with everything a report can show; `more` replaces parts."""
    known = usd is not None
    return {
        "name": name,
        "feasible": True,
        "meets_slo": True,
        "problem": None,
        "num_gpus": gpus,
        "nodes": gpus // 8,
        "racks": gpus / 72,
        "capex_usd": 40_000.0 * gpus,
        "usd_per_month": usd,
        "price": {"basis": "rental", "usd_per_gpu_hour": 3.2, "as_of": "2026-09-30", "source": "a list price"},
        "usd_per_mtok_input": 0.61 if known else None,
        "usd_per_mtok_output": 4.8 if known else None,
        "usd_per_mtok_total": 1.45 if known else None,
        "output_tok_per_s": 5100.0,
        "output_tok_per_s_per_gpu": 5100.0 / max(gpus, 1),
        "output_tok_per_s_per_mw": 91_000.0,
        "ttft_s": {"p50": 0.2, "p90": 0.41, "p99": 0.8, "mean": 0.25},
        "tpot_s": {"p50": 0.03, "p90": 0.041, "p99": 0.049, "mean": 0.031},
        "layout": "tp8 ep8 x4",
        "headroom": 2.25,
        "binding": "TPOT p95 at 91% of its limit",
        "origin_share": {"measured": 0.1, "interpolated": 0.7, "extrapolated": 0.1, "roofline": 0.1},
        "chance_meets_slo": 0.83,
        "probability_best": best,
        "regret_usd_per_month": {"mean": 2100.0, "p90": 9000.0},
        "usd_per_month_interval": [0.8 * usd, 1.3 * usd] if usd is not None else None,
        "num_gpus_interval": [gpus - 8, gpus + 8],
        "months_until_next_purchase": 7.0,
        "sure": {"num_gpus": 2 * gpus, "usd_per_month": 2 * usd} if usd is not None else None,
    } | more


_CURVE = [(0.5, 16), (1.0, 32), (2.0, 64), (4.0, 128)]
_INPUTS = ("price", "requests per second", "prediction error", "output tokens", "interest", "PUE", "lifetime")

COMPARISON: dict[str, Any] = {
    "kind": "comparison",
    "headline": "h200-sxm: 32 GPUs, $74,752 a month, $4.80/Mtok output; best in 61% of draws",
    "question": {
        "text": "Which cluster for DeepSeek-V3 at 20 requests/s?",
        "demands": [
            {
                "model": "deepseek-ai/DeepSeek-V3",
                "workload": "chat",
                "rate_per_s": 20.0,
                "slo": "ttft_p95 <= 2.00 s, tpot_p95 <= 50.0 ms",
                "objectives": [{"metric": "tpot", "statistic": "p95", "limit_s": 0.05}],
                "prompt_tokens_mean": 1022.0,
                "output_tokens_mean": 255.0,
            }
        ],
        "engine": "vllm 0.33.0",
        "seed": 0,
    },
    "winner": "h200-sxm:8x8",
    "baseline": "h100-sxm:16x8",
    "systems": [
        system("h200-sxm:8x8", 32, 74_752.0, 0.61),
        system("h100-sxm:16x8", 48, 101_000.0, 0.24, headroom=3.0, headroom_at_least=True),
        system("gb200-nvl72:18x4", 24, 110_300.0, 0.147, binding="capacity", racks=1),
        system("b200-sxm:4x8", 16, 119_000.0, 0.003),
        system("mi300x:4x8", 32, None, None, origin_share={"roofline": 1.0}, price=None, headroom=None),
        system("l40s:8x8", 0, None, None, feasible=False, meets_slo=False, problem="does not fit: experts break it"),
    ],
    "bands": {
        "baseline": "h100-sxm:16x8",
        "rows": [
            {
                "tok_per_s_per_user": 10 * band,
                "best": "h200-sxm:8x8" if band < 4 else "gb200-nvl72:18x4",
                "values": {"h200-sxm:8x8": 4.8 + band, "h100-sxm:16x8": 6.0 + band, "gb200-nvl72:18x4": 7.1},
                "usd_per_mtok_output": {"h200-sxm:8x8": 4.1, "h100-sxm:16x8": 4.4, "gb200-nvl72:18x4": 4.3},
                "vs_baseline_pct": -18.0,
            }
            for band in range(1, 6)
        ],
    },
    "front": {
        name: [
            {"tok_per_s_per_user": x, "output_tok_per_s_per_gpu": y / scale}
            for x, y in ((12, 410), (24, 250), (40, 90))
        ]
        for name, scale in (("h200-sxm:8x8", 1.0), ("h100-sxm:16x8", 1.4), ("gb200-nvl72:18x4", 0.6))
    },
    "inverse": {
        "limit": "$100,000 a month",
        "ceilings": [{"usd_per_mtok_output": 2.0, "tok_per_s_per_user": {"h200-sxm:8x8": 30.0, "l40s:8x8": None}}],
        "rows": [{"system": "h200-sxm:8x8", "num_users": 900, "tok_per_s_per_user": 31.0}],
    },
    "fabric": [
        {
            "change": "400 to 800 Gb/s",
            "system": "h100-sxm:16x8",
            "num_gpus_before": 48,
            "num_gpus_after": 40,
            "note": "dispatch binds",
        }
    ],
    "growth": {"growth_per_year": 0.5, "rows": [{"system": "h200-sxm:8x8", "months_until_next_purchase": 7.0}]},
    "doubles": [
        {
            "change": "twice the experts",
            "system": "h200-sxm:8x8",
            "num_gpus": 64,
            "usd_per_month": 149_504.0,
            "note": "",
        }
    ],
    "cost_curve": {
        name: [{"demand_factor": f, "num_gpus": gpus, "usd_per_month": base + gpus * each} for f, gpus in _CURVE]
        for name, base, each in (
            ("h200-sxm:8x8", 0.0, 2336.0),
            ("h100-sxm:16x8", 0.0, 3156.0),
            ("gb200-nvl72:18x4", 60_000.0, 1572.0),
        )
    },
    "sensitivity": [
        {
            "input": name,
            "low_label": "-20%",
            "high_label": "+20%",
            "low_usd_per_month": 74_752.0 - 2500.0 * (7 - index),
            "high_usd_per_month": 74_752.0 + 3100.0 * (7 - index),
            "winner_low": "h200-sxm:8x8",
            "winner_high": "gb200-nvl72:18x4" if index == 0 else "h200-sxm:8x8",
        }
        for index, name in enumerate(_INPUTS)
    ],
    "uncertainty": {
        "draws": 2000,
        "method": "Monte Carlo.",
        "assumptions": ["Prices are triangular between dated quotes."],
    },
    "rent_or_buy": [{"month": 12, "rental_usd": 897_024.0, "owned_usd": 1_300_000.0}],
    "assumptions": [{"text": "H200 rental $3.20", "source": "a list price", "as_of": "2026-09-30"}],
    "risks": ["MI300X rests on its data sheet alone.", "Prices move monthly.", "Traffic may be longer than chat."],
    "warnings": ["Only 2 of 4 replicas were simulated."],
    "next": ["Measure a GB200 node before you buy a rack."],
    "command": "moeplan compare deepseek-ai/DeepSeek-V3 --cluster h200-sxm:8x8 --cluster h100-sxm:16x8 --rate 20",
    "versions": {"moeplan": "0.1.0", "engine": "vllm 0.33.0"},
}
