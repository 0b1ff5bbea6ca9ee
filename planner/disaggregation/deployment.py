"""Two pools as one deployable choice, and what a simulation of them shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from planner.deployment import (
    Deployment,
    check_context,
    deploy,
    scaled,
    with_replicas,
    worst_objective,
)
from planner.disaggregation.handover import Handover
from planner.disaggregation.simulation import PoolsSimulation, simulate_pools
from planner.disaggregation.transfer import KvRoute, kv_route
from planner.economics import DEFAULT_TERMS, Terms, TokenCosts, hourly_usd, served_costs
from planner.engine import Engine, Limits
from planner.errors import DoesNotFit, InputError, LayoutError
from planner.experts import AS_SERVED, ExpertSettings
from planner.hardware import Cluster
from planner.layout import Layout
from planner.metrics import Summary, summarise
from planner.model import ModelConfig
from planner.pipeline import stage_split
from planner.tactics import PLAIN, Tactics
from planner.timer import step_timer
from planner.workload import Slo, Workload
from planner.workload.demand import MIN_REQUESTS

MAX_SIMULATED_RANKS = 32
"""Ranks of both pools that a plan simulates at least where a whole share of both pools has fewer."""


@dataclass(frozen=True, slots=True)
class Disaggregated:
    """A prefill and a decode pool joined by `route`; `shared` says that both are parts of one cluster."""

    prefill: Deployment
    decode: Deployment
    handover: Handover
    route: KvRoute
    shared: bool

    @property
    def name(self) -> str:
        """Both layouts with their limits."""
        return f"prefill {self.prefill.name}; decode {self.decode.name}"

    @property
    def layouts(self) -> str:
        """Both layouts alone."""
        return f"prefill {self.prefill.layout} + decode {self.decode.layout}"

    @property
    def num_gpus(self) -> int:
        """GPUs of both pools."""
        return self.prefill.layout.num_gpus + self.decode.layout.num_gpus

    @property
    def usd_per_hour(self) -> float | None:
        """Bill of all GPUs, None when a price is unknown; pools on one cluster share its nodes."""
        if self.prefill.cluster == self.decode.cluster:
            return hourly_usd(self.prefill.cluster.system, self.num_gpus, self.prefill.terms)
        pools = [self.prefill.usd_per_hour, self.decode.usd_per_hour]
        return None if None in pools else sum(usd for usd in pools if usd is not None)

    def with_replicas(self, prefill: int, decode: int) -> Disaggregated:
        """The same pools with other numbers of replicas."""
        sized = [
            replace(pool, layout=with_replicas(pool.layout, count))
            for pool, count in ((self.prefill, prefill), (self.decode, decode))
        ]
        return replace(self, prefill=sized[0], decode=sized[1])


@dataclass(frozen=True)
class PoolsRun:
    """A simulated pair of pools: what its users see and what it costs.

    `summary` counts steps, batch and KV of the decode pool, `prefill_summary` those of the prefill pool; latencies and
    rates are the same in both. `worst_ratio` is the largest objective over its limit (1 or less meets the SLO).
    """

    deployment: Disaggregated
    workload: Workload
    slo: Slo | None
    summary: Summary
    prefill_summary: Summary
    simulation: PoolsSimulation
    worst_objective: str
    worst_ratio: float
    output_tok_per_s: float
    token_costs: TokenCosts
    simulated_share: float

    @property
    def meets_slo(self) -> bool:
        """True when every objective holds and the queue does not grow."""
        return self.worst_ratio <= 1.0

    @property
    def usd_per_mtok_output(self) -> float | None:
        """$ per million output tokens by the rule of the terms, None when the price is unknown."""
        return self.token_costs.usd_per_mtok_output

    @property
    def num_gpus(self) -> int:
        """GPUs of both pools."""
        return self.deployment.num_gpus

    @property
    def rejection_reason(self) -> str | None:
        """Why requests were rejected, None when none was."""
        if not self.simulation.num_rejected:
            return None
        kept = self.deployment.handover.reserved_decode_tokens
        extra = f", beside {kept} reserved tokens" if kept else ""
        return (
            f"{self.simulation.num_rejected:,} of {len(self.simulation.requests):,} requests exceed the KV pool of a "
            f"prefill rank ({self.simulation.prefill.kv_tokens_per_rank:,} tokens) or of a decode rank "
            f"({self.simulation.decode.kv_tokens_per_rank:,} tokens{extra}). Shorten them or give a rank more memory."
        )


def pair(prefill: Deployment, decode: Deployment, handover: Handover, *, shared: bool) -> Disaggregated:
    """Join two deployments of one model. LayoutError when both together exceed the cluster they share."""
    check_model(prefill.model)
    if shared:
        total, offered = prefill.layout.num_gpus + decode.layout.num_gpus, prefill.cluster
        if total > offered.num_gpus:
            raise LayoutError(
                f"prefill {prefill.layout} takes {prefill.layout.num_gpus} GPUs and decode {decode.layout} takes "
                f"{decode.layout.num_gpus}: {total} of the {offered.num_gpus} of {offered.name}. Use fewer replicas, a "
                "larger cluster, or --decode-cluster for a cluster of its own."
            )
    route = kv_route(prefill.model, prefill.layout, decode.layout, prefill.cluster, decode.cluster, shared)
    return Disaggregated(prefill, decode, handover, route, shared)


def check_model(model: ModelConfig) -> None:
    """InputError for models whose phases do not hand over a cache of the prompt alone."""
    if any(layer.stack == "encoder" for layer in model.layers):
        raise InputError(
            f"{model.name} is an encoder-decoder model: no engine hands its cross-attention cache from one pool to "
            "another. Simulate it with --layout."
        )


def check_experts(experts: ExpertSettings) -> None:
    """InputError for settings of experts that only one pool can have."""
    if experts.residency is not None:
        raise InputError("--residency keeps experts outside HBM in one pool only: simulate it with --layout.")
    if experts.drift or experts.rebalance_steps:
        raise InputError("--drift-* and --rebalance-steps are simulated in one pool only: use --layout.")


def check_combination(
    workload: Workload, tactics: Tactics = PLAIN, router: str = "least_requests", *, fails: bool = False
) -> None:
    """InputError for what is simulated in one pool only: shared prefixes, drafts, overlap, other routers, failures."""
    asked = {
        f"--workload {workload.name} shares prefixes, and prefix caches are": workload.shares,
        "--speculative and --overlap are": tactics != PLAIN,
        f"--router {router} is": router != "least_requests",
        "failures (--fail-at, --mtbf-gpu) are": fails,
    }
    for what in (text for text, given in asked.items() if given):
        raise InputError(f"{what} simulated in one pool only: use --layout, or plan without --disaggregate.")


def pools(
    model: ModelConfig,
    clusters: tuple[Cluster, Cluster],
    layouts: tuple[Layout, Layout],
    limits: tuple[Limits, Limits],
    backends: tuple[str, str],
    engine: Engine,
    handover: Handover,
    workload: Workload,
    *,
    shared: bool,
    experts: ExpertSettings = AS_SERVED,
    terms: Terms = DEFAULT_TERMS,
) -> Disaggregated:
    """A checked pair, each argument as (prefill, decode). Raises what `deploy` and `pair` raise, naming the pool."""
    check_model(model)
    check_experts(experts)
    check_combination(workload)
    prompt, output = workload.mean_prompt_tokens, workload.mean_output_tokens
    contexts = (max(1, int(prompt)), int(prompt + output / 2))
    built = []
    for name, cluster, layout, limit, backend, context in zip(
        ("prefill", "decode"), clusters, layouts, limits, backends, contexts, strict=True
    ):
        chosen = backend if layout.attention_dp > 1 else "all_reduce"
        try:
            built.append(deploy(model, cluster, layout, engine, limit, chosen, context, experts, terms=terms))
        except DoesNotFit as error:
            raise DoesNotFit(f"{name} pool: {error}", error.remedies) from error
        except InputError as error:
            raise type(error)(f"{name} pool: {error}") from error
    return pair(built[0], built[1], handover, shared=shared)


def run_pools(
    deployment: Disaggregated,
    workload: Workload,
    slo: Slo | None = None,
    *,
    seed: int = 0,
    whole: bool = False,
    progress: Callable[[float], None] | None = None,
) -> PoolsRun:
    """Simulate `deployment` under `workload` and judge it against `slo`.

    Where both pools are multiples of a smaller pair, that pair is simulated at its share of the load, unless `whole`.
    """
    check_context(deployment.prefill.model, workload)
    counts = deployment.prefill.layout.replicas, deployment.decode.layout.replicas
    parts = 1 if whole else _parts(deployment, workload)
    share = 1 / parts
    offered = scaled(workload, share)
    if parts > 1:
        offered = offered.with_num_requests(
            min(workload.num_requests, max(MIN_REQUESTS, int(workload.num_requests * share)))
        )
    both = (deployment.prefill, deployment.decode)
    specs = [pool.spec(count // parts) for pool, count in zip(both, counts, strict=True)]
    timers = [step_timer(pool.cost(), pool.limits) for pool in both]
    splits = [stage_split(pool.cost()) if pool.layout.pp > 1 else None for pool in both]
    simulation = simulate_pools(
        specs[0],
        specs[1],
        (timers[0], timers[1]),
        deployment.route,
        deployment.handover,
        offered,
        splits=(splits[0], splits[1]),
        seed=seed,
        progress=progress,
    )
    if workload.arrivals.concurrency:
        share = offered.arrivals.concurrency / workload.arrivals.concurrency
    result = _judged(deployment, workload, slo, simulation, share)
    if simulation.num_rejected == len(simulation.requests):
        raise DoesNotFit(f"no request was served: {result.rejection_reason}", ["a larger KV cache (more GPUs)"])
    return result


def _parts(deployment: Disaggregated, workload: Workload) -> int:
    """Into how many equal pairs the pools can be cut, so that a pair is still large enough to be like the whole."""
    layouts = deployment.prefill.layout, deployment.decode.layout
    most = math.gcd(layouts[0].replicas, layouts[1].replicas)
    ranks = sum(layout.replicas * layout.attention_dp * layout.pp for layout in layouts)
    users = workload.arrivals.concurrency or most
    fitting = [n for n in range(1, most + 1) if most % n == 0 and ranks // n >= min(ranks, MAX_SIMULATED_RANKS)]
    return max((n for n in fitting if n <= users), default=1)


def _judged(
    deployment: Disaggregated, workload: Workload, slo: Slo | None, simulation: PoolsSimulation, share: float
) -> PoolsRun:
    arrivals = simulation.workload.arrivals
    concurrency = arrivals.concurrency if arrivals.kind == "closed" else None
    summaries = [
        summarise(simulation.requests, steps, spec, simulation.simulated_s, concurrency=concurrency, slo=slo)
        for steps, spec in (
            (simulation.decode_steps, simulation.decode),
            (simulation.prefill_steps, simulation.prefill),
        )
    ]
    summaries = [_with_decode_waits(summary, simulation) for summary in summaries]
    objective, ratio = worst_objective(summaries[0])
    tok_per_s = summaries[0].output_tok_per_s / share
    usd = served_costs(deployment.usd_per_hour, tok_per_s, workload, deployment.prefill.terms)
    return PoolsRun(
        deployment, workload, slo, summaries[0], summaries[1], simulation, objective, ratio, tok_per_s, usd, share
    )


def _with_decode_waits(summary: Summary, simulation: PoolsSimulation) -> Summary:
    """`summary`, "backlogged" also where requests wait for room on the decode side for more than half their TTFT."""
    measured = slice(summary.num_warmup, len(simulation.requests) - summary.num_cooldown)
    waited_s = simulation.requests.queue_s[measured] + simulation.handovers.reserve_wait_s[measured]
    ttft_s = simulation.requests.ttft_s[measured]
    known = ~np.isnan(waited_s) & ~np.isnan(ttft_s)
    if summary.saturation == "stable" and waited_s[known].sum() > 0.5 * ttft_s[known].sum():
        return replace(summary, saturation="backlogged")
    return summary
