"""One point, simulated as the benchmark client that measured it.

The client of InferenceX (utils/bench_serving/benchmark_serving.py @086eabb) sends 2 requests per user to warm up and
waits for all of them; the server is empty when the 10 measured requests per user begin, all users at once and each
sending its next on the last answer. The means therefore hold one burst of prompts, nine rounds of single ones, and the
end, when users leave one by one.

Points of other clients have answers of one length. Users who began at once would then send in step for ever, which
engines that stop for prompts do (SGLang: measured TTFT is that of a burst) and engines that mix prompts and answers do
not (vLLM, TensorRT-LLM: it grows far more slowly with the users). For the latter the first answers are cut short, each
a little later than the one before, so that the users are spread over an answer from the second round on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.calibration import ANY, GENERATIONS, Calibrations
from planner.cost import StepCost
from planner.deployment import Deployment, Run, deploy, run
from planner.engine import BatchWait, Engine, Limits, PrefillBalance
from planner.errors import DoesNotFit, Infeasible, PlannerError
from planner.hardware import Cluster, System
from planner.layout import Layout
from planner.model import ModelConfig, override
from planner.validation.breakdown import Breakdown, break_down
from planner.validation.flags import Flags, flags_of
from planner.validation.names import engine_of, model_of, system_of
from planner.validation.points import Point
from planner.workload import Arrivals, Lengths, Workload

Floats = NDArray[np.float64]
Costs = dict[tuple[str | int, ...], StepCost]
"""Step times by `Point.deployed`."""

ROUNDS = 10
"""Measured requests per user of the InferenceX client (num_prompts = 10 x max_concurrency)."""
_LEAST_ROUNDS, _MOST_STEPS = 4, 40_000
"""Long answers are simulated for fewer rounds; the rounds between the first and the last count for those left out."""
_LIMIT_SHARES = (1.0, 0.5, 0.25, 0.125)
"""Shares of the default limits tried in turn: operators lower them until the server starts."""
_NOTHING = (float("nan"), float("nan"), float("nan"))


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a point should measure; `status` is `ok`, or `infeasible` or `unsupported` with the reason.

    `values` follows `points.METRICS`: mean TTFT [ms], mean TPOT [ms], output tokens per second and GPU; NaN where
    there is none. `family` is the kind of layout, `engine` the profile that was simulated and `generation` that of the
    GPU. `origin_share` is the share of the simulated time by origin (measured, interpolated, ...). `breakdown` is there
    when it was asked for.
    """

    status: str
    values: tuple[float, float, float] = _NOTHING
    origin_share: Mapping[str, float] = field(default_factory=dict)
    is_moe: bool | None = None
    family: str = ""
    engine: str = ""
    generation: str = ""
    breakdown: Breakdown | None = None

    @property
    def is_ok(self) -> bool:
        """True when there are values."""
        return self.status == "ok"

    @property
    def measured_share(self) -> float:
        """Share of the time that rests on measured kernels, interpolation between them included."""
        return self.origin_share.get("measured", 0.0) + self.origin_share.get("interpolated", 0.0)


def replay(
    point: Point, costs: Costs | None = None, calibrations: Calibrations | None = None, breaks_down: bool = False
) -> Prediction:
    """Prediction of `point`; a point that cannot be predicted says why in its status and raises nothing.

    `costs` keeps step times for the next points of the same server. `calibrations` are the shipped ones where none are
    given; with `breaks_down` the prediction says what it is made of.
    """
    known: dict[str, Any] = {}
    costs = {} if costs is None else costs
    try:
        model = _model(point)
        layout = _layout(point, model)
        serving = replace(_engine(point), calibrations=calibrations)
        known = {"is_moe": model.moe is not None, "family": layout.family, "engine": serving.name}
        known["generation"] = GENERATIONS.get(system_of(point.gpu).gpu.arch, ANY)
        result = run(_deploy(point, model, layout, serving), workload_of(point))
        cost = costs.setdefault(point.deployed, result.deployment.cost())
        if breaks_down:
            weights = _weights(len(result.simulation.requests), point.concurrency)
            known["breakdown"] = break_down(result.simulation, cost, weights)
        return Prediction("ok", _means(point, result), _origin_share(point, result, cost), **known)
    except Infeasible as error:
        status = f"infeasible: {error}"
    except PlannerError as error:
        status = f"unsupported: {error}"
    except Exception as error:  # One point that trips over a fault of moeplan must not cost all the others.
        status = f"unsupported: moeplan failed ({type(error).__name__}: {error})"
    return Prediction(" ".join(status.split()), **known)


def rounds_of(point: Point) -> int:
    """Requests per user that are simulated."""
    return int(np.clip(_MOST_STEPS // point.osl, _LEAST_ROUNDS, ROUNDS))


def workload_of(point: Point) -> Workload:
    """Closed loop of the point's users; the client draws both lengths evenly between its bounds, rounded down."""
    users = point.concurrency
    num_requests = rounds_of(point) * users
    prompt, output = (
        Lengths.uniform(*(max(1, int(tokens * share)) for share in point.lengths)) for tokens in (point.isl, point.osl)
    )
    if point.lengths == (1.0, 1.0) and engine_of(point.engine).policy == "mixed":
        first = np.linspace(0, point.osl, users, endpoint=False).astype(int) + 1
        output = Lengths.replay([*first.tolist(), *[point.osl] * (num_requests - users)])
    return Workload(point.name, prompt, output, Arrivals.closed(users), num_requests)


def _model(point: Point) -> ModelConfig:
    """The model with the point's KV format and room for its requests: a server that ran them was told to take them."""
    model = model_of(point.model, point.precision)
    kv = _flags(point, engine_of(point.engine)).kv
    model = override(model, kv=kv) if kv else model
    tokens = point.isl + point.osl
    return replace(model, max_context=tokens) if 0 < model.max_context < tokens else model


def _layout(point: Point, model: ModelConfig) -> Layout:
    """Degrees of the point; benchmarks label dense models with expert degrees too, where they mean nothing."""
    ep = point.moe_ep if model.moe else 1
    return Layout(point.tp, point.pp, ep, point.attention_dp, point.tp * point.attention_dp // ep)


def _cluster(chosen: System, num_gpus: int) -> Cluster:
    return Cluster(chosen, -(-num_gpus // chosen.gpus_per_node), min(num_gpus, chosen.gpus_per_node))


def _engine(point: Point) -> Engine:
    """The engine as the point ran it: any expert degree, and its flags."""
    serving = replace(engine_of(point.engine), expert_parallel="any")
    flags = _flags(point, serving)
    serving = replace(serving, receive_interval=flags.receive_interval)
    if flags.memory_fraction is not None:
        serving = serving.with_memory_fraction(flags.memory_fraction)
    if flags.frontend_workers is not None:
        serving = replace(serving, frontend_workers=flags.frontend_workers)
    if flags.prefill_balance is not None:
        serving = replace(serving, prefill_balance=PrefillBalance(True, *flags.prefill_balance))
    if flags.batch_wait is not None:
        serving = replace(serving, batch_wait=BatchWait(*flags.batch_wait))
    if flags.mxfp4_activations == "fp8":
        serving = replace(serving, mxfp4_by_fp8=(system_of(point.gpu).gpu.arch,))
    return serving


def _flags(point: Point, serving: Engine) -> Flags:
    """Flags of the InferenceX client's servers; those of other clients are not known."""
    return Flags() if point.lengths == (1.0, 1.0) else flags_of(point, serving.name)


def _deploy(point: Point, model: ModelConfig, layout: Layout, serving: Engine) -> Deployment:
    """The server with the engine's limits, or the largest share of them that leaves room for one request."""
    chosen = system_of(point.gpu)
    cluster, context = _cluster(chosen, point.num_gpus), point.isl + point.osl // 2
    backend = "allgather_reducescatter" if point.attention_dp > 1 else "all_reduce"
    reason = None
    for share in _LIMIT_SHARES:
        limits = _limits(serving, chosen, point, share)
        try:
            found = deploy(model, cluster, layout, serving, limits, backend, context)
        except DoesNotFit as error:
            reason = reason or error
            continue
        if found.memory.kv_tokens // layout.pp >= point.isl + point.osl:
            return found
        reason = reason or DoesNotFit(
            f"{model.name} as {layout} leaves {found.memory.kv_tokens:,} KV tokens per rank on {cluster.name}, one "
            f"request needs {point.isl + point.osl:,}"
        )
    assert reason is not None
    raise reason


def _limits(serving: Engine, chosen: System, point: Point, share: float) -> Limits:
    """`share` of the default limits, but always places for all users: that much every benchmark allows."""
    budget = serving.budget(chosen.gpu.hbm_bytes, chosen.gpu.arch)
    flagged = _flags(point, serving).limits(Limits(budget.max_num_seqs, budget.max_batched_tokens), point)
    ranks = point.attention_dp if serving.divides_prefill_by_attention_dp else 1
    seqs = max(point.concurrency, int(flagged.max_num_seqs * share))
    return Limits(seqs, max(seqs, int(flagged.max_batched_tokens * share) // ranks))


def _means(point: Point, result: Run) -> tuple[float, float, float]:
    """Mean TTFT and TPOT over the measured requests, and the throughput the source derives from them.

    The points state concurrency x mean output / (TTFT + TPOT x (mean output - 1)) / GPUs, not tokens over time.
    """
    requests, users = result.simulation.requests, point.concurrency
    weights = _weights(len(requests), users)
    ttft_s, tpot_s = (_mean(values, weights) for values in (requests.ttft_s, requests.tpot_s))
    tokens = sum(max(1, int(point.osl * share)) for share in point.lengths) / 2
    latency_s = ttft_s + (tpot_s * (tokens - 1) if tokens > 1 else 0.0)
    return ttft_s * 1e3, tpot_s * 1e3, users * tokens / latency_s / point.num_gpus


def _weights(num_requests: int, users: int) -> Floats:
    """Weight of every request, in order of sending: the first and the last round count once, those between ROUNDS - 2
    times in all, however many were simulated.
    """
    between = num_requests - 2 * users
    weights = np.full(num_requests, (ROUNDS - 2) * users / between)
    weights[:users] = weights[-users:] = 1.0
    return weights


def _mean(values: Floats, weights: Floats) -> float:
    known = ~np.isnan(values)
    return float(np.average(values[known], weights=weights[known])) if known.any() else float("nan")


def _origin_share(point: Point, result: Run, cost: StepCost) -> Mapping[str, float]:
    """Share of the time by origin: a decode and a prefill step of mean size, by the time spent in such steps."""
    steps = result.simulation.steps
    decoding, prefilling = steps.decode_seqs > 0, steps.prefill_tokens > 0
    seqs = float(steps.decode_seqs[decoding].mean()) if decoding.any() else 1.0
    chunk = min(float(steps.prefill_tokens[prefilling].mean()), float(result.deployment.limits.max_batched_tokens))
    ranks = point.attention_dp
    decode = cost.decode(np.array(max(1.0, round(seqs / ranks))), np.array(point.isl + point.osl / 2))
    prefill = cost.prefill(np.array(max(1.0, chunk)), ranks=1.0)
    share = float(steps.step_s[prefilling].sum() / steps.step_s.sum())
    of_decode, of_prefill = decode.origin_share(), prefill.origin_share()
    return {name: (1 - share) * of_decode[name] + share * of_prefill[name] for name in of_decode}
