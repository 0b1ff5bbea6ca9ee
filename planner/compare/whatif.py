"""What another fabric or a larger model would change: GPUs for the same demand within the same SLO, in closed form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from planner.compare.estimator import Estimator
from planner.errors import PlannerError
from planner.hardware import Cluster
from planner.layout import Layout
from planner.sizing import Anchor, Replica
from planner.variants.pruning import with_experts

SMALL_DOMAIN, LARGE_DOMAIN = 8, 72
_FAST_CARD_BYTES_PER_S = 75e9
"""Between 400 and 800 Gbit/s cards: the slower are doubled, the faster halved."""
_OVERSUBSCRIBED = 4.0


@dataclass(frozen=True, slots=True)
class WhatIf:
    """GPUs of the same demand as asked and after one change (estimates; None where no replica can)."""

    topic: str
    change: str
    num_gpus_before: int | None
    num_gpus: int | None
    layout: str
    note: str = ""


def fabric(estimator: Estimator, found: list[Replica], anchor: Anchor) -> Iterator[WhatIf]:
    """Another scale-up domain, cards of another rate and another oversubscription."""
    for change, cluster in _fabrics(estimator):
        inside = min(cluster.scale_up_gpus, estimator.widest.scale_up_gpus)
        # Kinds that stay inside the smaller domain are as before, so only the others are computed anew.
        crossing = estimator.replicas(cluster=cluster, only=partial(_is_wider, inside))
        changed = [replica for replica in found if replica.num_gpus <= inside] + crossing
        yield _whatif(estimator, "fabric", change, found, changed, anchor)


def _is_wider(num_gpus: int, layout: Layout) -> bool:
    return layout.replica_gpus > num_gpus


def _fabrics(estimator: Estimator) -> Iterator[tuple[str, Cluster]]:
    base = estimator.widest
    system = base.system
    pcie = 0.0 if system.pcie is None else system.pcie.bytes_per_s
    if system.scale_up.bytes_per_s > 2 * pcie:
        domain = system.scale_up.size or system.gpus_per_node
        other = LARGE_DOMAIN if domain <= SMALL_DOMAIN else SMALL_DOMAIN
        link = replace(system.scale_up, size=other)
        yield f"{system.scale_up.name} domain {domain} -> {other} GPUs", _with(base, scale_up=link)
    card = system.scale_out
    if card is not None:
        factor = 0.5 if card.bytes_per_s >= _FAST_CARD_BYTES_PER_S else 2.0
        gbit = card.bytes_per_s * 8e-9
        faster = replace(card, bytes_per_s=card.bytes_per_s * factor)
        yield f"network {gbit:g} -> {gbit * factor:g} Gbit/s per GPU", _with(base, scale_out=faster)
        other_ratio = _OVERSUBSCRIBED if base.oversubscription < _OVERSUBSCRIBED else 1.0
        text = f"oversubscription {base.oversubscription:g}:1 -> {other_ratio:g}:1"
        yield text, replace(base, oversubscription=other_ratio)


def _with(cluster: Cluster, **links: object) -> Cluster:
    return replace(cluster, system=replace(cluster.system, **links))  # type: ignore[arg-type]


def doubles(estimator: Estimator, found: list[Replica], anchor: Anchor) -> Iterator[WhatIf]:
    """Twice the experts (same number picked), and prompts of twice the length."""
    model, workload = estimator.demand.model, estimator.demand.workload
    if model.moe is not None:
        larger = with_experts(model, lambda count: 2 * count, f"{model.name} with twice the experts")
        params = f"{model.total_params / 1e9:,.0f} -> {larger.total_params / 1e9:,.0f} B parameters"
        change = f"{model.moe.num_experts} -> {2 * model.moe.num_experts} experts"
        yield _whatif(estimator, "model", change, found, estimator.replicas(model=larger), anchor, params)
    change = f"prompts of {workload.mean_prompt_tokens:,.0f} -> {2 * workload.mean_prompt_tokens:,.0f} tokens"
    try:
        longer = workload.with_lengths(prompt=2.0)
    except PlannerError as error:
        yield WhatIf("context", change, None, None, "", str(error))
        return
    note = ""
    if longer.max_prompt_tokens + longer.max_output_tokens > model.max_context:
        note = f"beyond the {model.max_context:,} tokens the model was made for"
    yield _whatif(estimator, "context", change, found, estimator.replicas(workload=longer), anchor, note)


def _whatif(
    estimator: Estimator,
    topic: str,
    change: str,
    found: list[Replica],
    changed: list[Replica],
    anchor: Anchor,
    note: str = "",
) -> WhatIf:
    before, after = estimator.fewest(found, anchor), estimator.fewest(changed, anchor)
    return WhatIf(
        topic,
        change,
        None if before is None else before[0],
        None if after is None else after[0],
        "" if after is None else str(after[1].layout),
        note,
    )
