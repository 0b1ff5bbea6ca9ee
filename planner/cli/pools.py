"""`simulate` with a prefill and a decode pool."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from planner.choices import ExpertChoices, PoolChoices
from planner.cli.terminal import command_line, progress_bar, show
from planner.disaggregation.deployment import pools, run_pools
from planner.disaggregation.handover import Handover, handover
from planner.economics import Terms
from planner.engine import Engine, Limits
from planner.errors import InputError
from planner.facts.disaggregation import pools_facts
from planner.fit import limits_for
from planner.hardware import Cluster, parse_cluster
from planner.layout import Layout, parse_layout
from planner.model import ModelConfig
from planner.options import check_positive
from planner.options import experts as expert_settings
from planner.pooltext import pools_text
from planner.workload import Slo, Workload

_Limits = tuple[int | None, int | None]


def simulate_two(
    model: ModelConfig,
    cluster: Cluster,
    layout: str | None,
    chosen: PoolChoices,
    workload: Workload,
    slo: Slo | None,
    profile: Engine,
    limits: _Limits,
    backend: str,
    experts: ExpertChoices,
    terms: Terms,
    seed: int,
    out: Path | None,
    json: bool,
) -> None:
    """Simulate the pools of `chosen`; `limits` and `backend` are those of a pool that has none of its own."""
    layouts = _layouts(layout, chosen)
    if out is not None:
        from planner.runfolder import check_folder

        check_folder(out)
    start = time.perf_counter()
    clusters, shared = _clusters(cluster, chosen)
    rules = _rules(profile, chosen)
    backends = (chosen.prefill_backend or backend, chosen.decode_backend or backend)
    bounds = _limits(chosen, limits, backends, profile, clusters, layouts)
    settings = expert_settings(model, experts)
    deployment = pools(
        model,
        clusters,
        layouts,
        bounds,
        backends,
        profile,
        rules,
        workload,
        shared=shared,
        experts=settings,
        terms=terms,
    )
    with progress_bar() as progress:
        run = run_pools(
            deployment, workload, slo, seed=seed, whole=True, progress=lambda share: progress("simulate", share)
        )
    facts = pools_facts(run, command_line())
    if out is not None:
        from planner.runfolder import write_pools

        write_pools(out, run, facts)
    show(facts, json, pools_text, wall_s=time.perf_counter() - start)


def _layouts(layout: str | None, chosen: PoolChoices) -> tuple[Layout, Layout]:
    """The two layouts; InputError where there is none, one, or one for all beside them."""
    both = (chosen.prefill_layout, chosen.decode_layout)
    if layout is not None:
        used = next(name for name, value in vars(chosen).items() if value is not None)
        raise InputError(
            f"--layout {layout} is one pool, --{used.replace('_', '-')} belongs to two. Give --layout, or "
            "--prefill-layout and --decode-layout."
        )
    if both == (None, None):
        raise InputError(
            "no layout is given. Give --layout, such as tp=8,ep=8, or --prefill-layout and --decode-layout for two "
            "pools."
        )
    if both[0] is None or both[1] is None:
        missing = "--decode-layout" if both[0] else "--prefill-layout"
        raise InputError(f"two pools need two layouts: {missing} is missing, such as attention_dp=8,ep=8.")
    return parse_layout(both[0]), parse_layout(both[1])


def _clusters(cluster: Cluster, chosen: PoolChoices) -> tuple[tuple[Cluster, Cluster], bool]:
    """The cluster of each pool, and whether it is one."""
    if chosen.decode_cluster is None:
        return (cluster, cluster), True
    other = replace(
        parse_cluster(chosen.decode_cluster),
        oversubscription=cluster.oversubscription,
        rail_optimised=cluster.rail_optimised,
    )
    return (cluster, other), False


def _rules(engine: Engine, chosen: PoolChoices) -> Handover:
    """The engine's handover with what the user chose; earlier sending asks for room earlier."""
    rules = handover(engine)
    reserve = chosen.kv_reserve or ("arrival" if chosen.kv_send in ("chunks", "layers") else rules.reserve)
    send = chosen.kv_send or ("whole" if reserve == "prefilled" else rules.send)
    kept = chosen.reserved_decode_tokens
    return replace(
        rules,
        reserve=reserve,
        send=send,
        reserved_decode_tokens=rules.reserved_decode_tokens if kept is None else kept,
    )


def _limits(
    chosen: PoolChoices,
    common: _Limits,
    backends: tuple[str, str],
    engine: Engine,
    clusters: tuple[Cluster, Cluster],
    layouts: tuple[Layout, Layout],
) -> tuple[Limits, Limits]:
    """Limits of each pool: its own, those of both, else the engine's defaults."""
    from planner.capacity.buffers import most_sequences

    found = []
    for name, backend, cluster, layout in zip(("prefill", "decode"), backends, clusters, layouts, strict=True):
        own = {key: getattr(chosen, f"{name}_{key}") for key in ("max_num_seqs", "max_batched_tokens")}
        check_positive(**{f"{name}_{key}": value for key, value in own.items()})
        seqs = own["max_num_seqs"] or common[0] or (most_sequences(engine) if backend == "deepep" else None)
        tokens = own["max_batched_tokens"] or common[1]
        found.append(limits_for(engine, cluster.system, seqs, tokens, layout.attention_dp))
    return found[0], found[1]
