"""Facts of what-ifs on one model: memory, smallest GPU count, decode step and price of each variant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.engine import Engine, Limits
    from planner.experts import ExpertSettings
    from planner.hardware import Cluster, System
    from planner.variants import DecodePoint, Variant

Facts = dict[str, Any]


def variants_facts(
    variants: Sequence[Variant],
    cluster: Cluster,
    engine: Engine,
    limits: Limits,
    batches: Sequence[int],
    context: int,
    experts: ExpertSettings | None = None,
) -> Facts:
    """What `experts variants --json` prints: a row per variant, all on the GPUs of `cluster`.

    Parameters
    ----------
    variants
        The model as it is first, then what it is compared with.
    cluster
        GPUs that every variant gets, as replicas of its best layout per batch.
    engine, limits
        Memory rule, and the most sequences and tokens of a step.
    batches
        Running sequences over all GPUs.
    context
        Tokens of each sequence.
    experts
        Popularity, placement and limits of the routed experts.
    """
    from planner.economics import gpu_hour

    price = gpu_hour(cluster.system)
    usd = price.usd if price else None
    return {
        "model": variants[0].model.name,
        "cluster": cluster.name,
        "num_gpus": cluster.num_gpus,
        "engine": f"{engine.name} {engine.version}",
        "context_tokens": context,
        "usd_per_gpu_hour": usd,
        "price_as_of": price.as_of if price else None,
        "variants": [_row(v, cluster, engine, limits, batches, context, experts, usd) for v in variants],
    }


def _row(
    variant: Variant,
    cluster: Cluster,
    engine: Engine,
    limits: Limits,
    batches: Sequence[int],
    context: int,
    experts: ExpertSettings | None,
    usd: float | None,
) -> Facts:
    from planner.enumeration import layouts
    from planner.variants import decode_points, roomiest_kv_tokens

    choices = list(layouts(variant.model, cluster, engine))
    points = decode_points(variant, cluster, engine, limits, choices, batches, context, experts)
    return {
        "variant": variant.name,
        "total_params": variant.model.total_params,
        "active_params": variant.model.active_params_with_embeddings,
        "flop_per_token": 2 * variant.model.active_params_without_input_embedding
        + variant.details.get("adapter_flop_per_token", 0),
        "weight_bytes": variant.model.weight_bytes,
        "num_gpus_min": smallest_gpus(variant, cluster.system, engine, limits, context),
        "kv_tokens": roomiest_kv_tokens(variant, cluster, engine, limits, choices, context),
        "decode": [_point(batch, point, usd) for batch, point in zip(batches, points, strict=True)],
        "note": variant.note,
        "details": dict(variant.details) | _adapter_room(variant, cluster, engine, limits, points, context),
    }


def _adapter_room(
    variant: Variant,
    cluster: Cluster,
    engine: Engine,
    limits: Limits,
    points: Sequence[DecodePoint | None],
    context: int,
) -> Facts:
    """Adapters that fit beside the weights and the cache of the largest batch with room, in that batch's layout."""
    from planner.memory import Ledger
    from planner.variants import adapters_that_fit

    last = next((point for point in reversed(points) if point), None)
    if last is None or "num_adapters" not in variant.details:
        return {}
    layout = last.layout
    use = Ledger(variant.model, cluster.system, engine).use(layout, limits, last.backend, context)
    seqs = -(-last.batch // (layout.replicas * layout.attention_dp * layout.pp)) * layout.pp
    each = variant.held_bytes(layout) / variant.details["num_adapters"]
    return {
        "adapter_bytes_per_gpu": each,
        "adapters_that_fit": adapters_that_fit(use, seqs * context, each),
        "adapters_beside_batch": last.batch,
    }


def _point(batch: int, point: DecodePoint | None, usd: float | None) -> Facts:
    from planner.economics import usd_per_mtok

    if point is None:
        return {"batch": batch, "fits": False}
    return {
        "batch": batch,
        "fits": True,
        "layout": str(point.layout),
        "backend": point.backend if point.layout.attention_dp > 1 else None,
        "step_s": point.step_s,
        "tok_per_s_per_gpu": point.tok_per_s_per_gpu,
        "usd_per_mtok_decode": usd_per_mtok(usd, 1, point.tok_per_s_per_gpu),
    }


def smallest_gpus(variant: Variant, system: System, engine: Engine, limits: Limits, context: int) -> int | None:
    """Fewest GPUs of `system` that hold the variant, what it keeps beside the model, and one sequence; None if none."""
    from planner.errors import InputError
    from planner.fit import fit

    answer = fit(variant.model, system, engine, context_tokens=context, limits=limits)
    while answer.fits:
        held = variant.held_bytes(answer.layout) / max(answer.use.kv_bytes_per_token, 1e-9)
        if answer.use.kv_tokens - held >= context:
            return answer.num_gpus
        try:
            answer = fit(
                variant.model, system, engine, context_tokens=context, num_gpus=2 * answer.num_gpus, limits=limits
            )
        except InputError:
            return None
    return None
