"""Command-line values as planner objects: precisions, demand, clusters. Shared by the commands and the dashboard."""

from __future__ import annotations

from dataclasses import replace

from planner.deployment import MIN_REQUESTS
from planner.errors import InputError
from planner.hardware import Cluster, parse_cluster
from planner.model import ModelConfig, load
from planner.model.precision import override
from planner.workload import Slo, Workload, load_workload

DEFAULT_RATE_PER_S = 1.0
_TYPICAL_TPOT_S = 0.05
_GENERATIONS = 5
_MAX_REQUESTS = 20_000
_MAX_OVERSUBSCRIPTION = 64.0
_PARTS = ("experts", "attention", "dense")


def precision(model: str, weights: str | None, kv: str | None) -> ModelConfig:
    """`model` with the weight formats of `weights` (`fp8`, or `experts=nvfp4,attention=bf16`) and KV format `kv`."""
    chosen: dict[str, str] = {}
    for item in weights.split(",") if weights else ():
        part, equals, fmt = item.strip().partition("=")
        if not equals:
            chosen |= dict.fromkeys(_PARTS, part)
        elif part in _PARTS:
            chosen[part] = fmt
        else:
            raise InputError(f"--weights {weights}: {part!r} is not one of {', '.join(_PARTS)}")
    return override(load(model), kv=kv, **chosen)


def demand(text: str, rate: float | None, concurrency: int | None, num_requests: int | None) -> Workload:
    """The workload at `rate` requests per second or with `concurrency` users; 1 request per second by default."""
    if rate is None and concurrency is None and not text.endswith((".csv", ".toml")):
        rate = DEFAULT_RATE_PER_S
    return load_workload(text, rate=rate, concurrency=concurrency, num_requests=num_requests)


def plan_demand(
    text: str, rate: float | None, concurrency: int | None, num_requests: int | None, slo: Slo | None = None
) -> Workload:
    """`demand` with as many requests as a plan's simulations need when `num_requests` is not given.

    Five generations of requests at the slowest token the SLO allows, so that a growing queue shows; 1,000 at least
    for a p95, 20,000 at most.
    """
    workload = demand(text, rate, concurrency, num_requests)
    if num_requests is not None or workload.arrivals.kind not in ("poisson", "gamma"):
        return workload
    tpot_s = (slo.limits_s() if slo else {}).get("tpot", _TYPICAL_TPOT_S)
    overlapping = workload.arrivals.rate_per_s * workload.mean_output_tokens * tpot_s
    return workload.with_num_requests(int(min(max(_GENERATIONS * overlapping, MIN_REQUESTS), _MAX_REQUESTS)))


def clusters(texts: list[str], oversubscription: float = 1.0, rail_optimised: bool = True) -> list[Cluster]:
    """The offered clusters with their network; InputError when one is offered twice or the network is impossible."""
    if not 1.0 <= oversubscription <= _MAX_OVERSUBSCRIPTION:
        raise InputError(
            f"--oversubscription {oversubscription:g}: a ratio from 1 (full bisection) to {_MAX_OVERSUBSCRIPTION:g}"
        )
    offered = [
        replace(parse_cluster(text), oversubscription=oversubscription, rail_optimised=rail_optimised) for text in texts
    ]
    names = [cluster.name for cluster in offered]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"--cluster {twice} is given twice: offer each cluster once")
    return offered


def check_positive(**values: int | None) -> None:
    """InputError naming the option when a given value is below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: a positive whole number is needed")
