"""Facts of attention-FFN disaggregation."""

from __future__ import annotations

from dataclasses import asdict

from planner import __version__
from planner.disaggregation.attention_ffn import AfdAnswer, AfdPoint
from planner.disaggregation.unitcosts import UnitPrice, token_counts
from planner.economics import gpu_hour
from planner.facts.basic import Facts, layout_facts


def afd_facts(answer: AfdAnswer, engine: str, command: str) -> Facts:
    """What `afd --json` prints."""
    plain = answer.plain
    return {
        "model": answer.model.name,
        "cluster": answer.cluster.name,
        "engine": engine,
        "context": answer.context,
        "tpot_limit_s": answer.tpot_s,
        "best": _point(answer.best),
        "splits": [_point(point) for point in answer.points],
        "plain": None
        if plain is None
        else {
            "layout": layout_facts(plain.layout),
            "batch": plain.batch,
            "tpot_s": plain.tpot_s,
            "output_tok_per_s_per_gpu": plain.output_tok_per_s_per_gpu,
        },
        "gain": answer.gain,
        "sparsity": answer.sparsity,
        "sparsity_floor": answer.sparsity_floor,
        "roofline_batch": answer.roofline_batch,
        "cost_floor": _cost_floor(answer),
        "notes": list(answer.model.notes),
        "command": command,
        "versions": {"moeplan": __version__},
    }


def _point(point: AfdPoint) -> Facts:
    return asdict(point) | {
        "num_gpus": point.num_gpus,
        "ffn_batch": point.ffn_batch,
        "output_tok_per_s_per_gpu": point.output_tok_per_s_per_gpu,
    }


def _cost_floor(answer: AfdAnswer) -> Facts | None:
    """Least dollars per million tokens on this GPU, None without a price or 8-bit rates."""
    gpu, price = answer.cluster.gpu, gpu_hour(answer.cluster.system)
    rates = dict(gpu.flop_per_s)
    if price is None or "fp8" not in rates:
        return None
    unit = UnitPrice.of(price.usd, rates["fp8"], gpu.hbm_bytes_per_s)
    counts = token_counts(answer.model, answer.context)
    return {
        "attention_usd_per_mtok": unit.attention_usd_per_mtok(counts),
        "ffn_usd_per_mtok": unit.ffn_usd_per_mtok(counts),
        "usd_per_gpu_hour": price.usd,
    } | asdict(counts)
