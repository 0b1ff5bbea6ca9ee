"""What a run is worth: the metric table, percentiles with confidence intervals, throughput, goodput and a verdict.

A run begins empty and ends draining; neither is steady service. Measured are the requests between the two
(`steady_range`), latencies by arrival, rates by the clock between the first and the last measured arrival.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.enginespec import EngineSpec
from planner.errors import InputError
from planner.records import FINISHED, LOST, REJECTED, UNFINISHED, RequestTable, StepTable
from planner.workload import SLO_STATISTICS, Objective, Slo


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of a summary: its unit, the label of an axis, which direction is better, and what it means."""

    unit: str
    label: str
    better: str
    meaning: str


_LATENCIES = {
    "ttft": ("Time to first token", "from arrival to the end of the step that finishes the prompt"),
    "tpot": ("Time per output token", "(end to end - time to first token) / (output tokens - 1), per request"),
    "e2e": ("End-to-end latency", "from arrival to the last token"),
    "queue": ("Queueing time", "from arrival to the first step that takes prompt tokens of the request"),
}

METRICS: dict[str, Metric] = {
    f"{name}_{statistic}_s": Metric("s", f"{label}, {statistic}", "lower", f"{statistic} over requests of: {meaning}")
    for name, (label, meaning) in _LATENCIES.items()
    for statistic in SLO_STATISTICS
} | {
    "output_tok_per_s": Metric("tok/s", "Output tokens per second", "higher", "generated tokens, all GPUs together"),
    "total_tok_per_s": Metric("tok/s", "Total tokens per second", "higher", "prompt and generated tokens, all GPUs"),
    "requests_per_s": Metric("1/s", "Requests per second", "higher", "answered requests"),
    "goodput_requests_per_s": Metric("1/s", "Goodput", "higher", "answered requests that keep every limit of the SLO"),
    "slo_attainment": Metric("", "SLO attainment", "higher", "share of requests that keep every limit of the SLO"),
    "mean_decode_seqs_per_rank": Metric("", "Decode batch", "none", "decoding sequences per rank, mean over busy time"),
    "kv_utilisation": Metric("", "KV utilisation", "none", "share of the KV blocks taken, mean over busy time"),
    "kv_utilisation_peak": Metric("", "Peak KV utilisation", "none", "largest share of the KV blocks taken in a step"),
    "busy_share": Metric("", "Busy share", "none", "share of the time in which an engine was in a step"),
    "prefix_hit_rate": Metric("", "Prefix hit rate", "higher", "share of the prompt tokens found in a prefix cache"),
    "num_preemptions": Metric("", "Preemptions", "lower", "times a request lost its KV and was recomputed"),
    "num_rejected": Metric("", "Rejected requests", "lower", "requests larger than the KV pool of a rank"),
    "num_unfinished": Metric("", "Unfinished requests", "lower", "requests not answered when the run was cut"),
}
"""Every number a summary can show, in the order of its tables."""

_STUDENT_T = {19: 2.093, 9: 2.262, 4: 2.776}
"""Two-sided 95 % quantiles of Student's t by degrees of freedom (standard table)."""

_NAN_PAIR = (math.nan, math.nan)


@dataclass(frozen=True, slots=True)
class LatencyStatistics:
    """Mean and percentiles [s] of one latency over `num` requests, with 95 % confidence intervals of mean and p95.

    The intervals are NaN below 50 requests.
    """

    num: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    mean_interval: tuple[float, float]
    p95_interval: tuple[float, float]

    def value(self, statistic: str) -> float:
        """The statistic called mean, p50, p90, p95 or p99 [s]."""
        if statistic not in SLO_STATISTICS:
            raise InputError(f"unknown statistic {statistic!r}. Known: {', '.join(SLO_STATISTICS)}.")
        return float(getattr(self, statistic))


@dataclass(frozen=True, slots=True)
class ObjectiveResult:
    """An objective, the value reached [s], and whether it is kept."""

    objective: Objective
    value_s: float
    is_met: bool


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in numbers; `METRICS` explains each, `values` lists them.

    `num_measured` requests lie between the `num_warmup` first and the `num_cooldown` last ones; `window_s` is the
    time the rates refer to. `saturation` is "stable", "backlogged" (requests wait for admission longer than their
    prompts take, but the queue does not grow) or "overloaded" (more comes than goes; latencies grow with the length
    of the run and mean nothing).
    """

    ttft_s: LatencyStatistics
    tpot_s: LatencyStatistics
    e2e_s: LatencyStatistics
    queue_s: LatencyStatistics
    output_tok_per_s: float
    total_tok_per_s: float
    requests_per_s: float
    goodput_requests_per_s: float
    slo_attainment: float
    mean_decode_seqs_per_rank: float
    kv_utilisation: float
    kv_utilisation_peak: float
    busy_share: float
    prefix_hit_rate: float
    num_preemptions: int
    num_rejected: int
    num_unfinished: int
    num_measured: int
    num_warmup: int
    num_cooldown: int
    window_s: float
    saturation: str
    objectives: tuple[ObjectiveResult, ...] = ()

    @property
    def meets_slo(self) -> bool:
        """Whether every objective is kept, nothing was rejected, and the system is not overloaded."""
        kept = all(result.is_met for result in self.objectives)
        return kept and not self.num_rejected and self.saturation != "overloaded"

    def values(self) -> dict[str, float]:
        """All numbers by their name in `METRICS`, in its order."""
        numbers: dict[str, float] = {}
        for name in METRICS:
            latency, _, rest = name.partition("_")
            if latency in _LATENCIES:
                statistics: LatencyStatistics = getattr(self, f"{latency}_s")
                numbers[name] = statistics.value(rest.removesuffix("_s"))
            else:
                numbers[name] = float(getattr(self, name))
        return numbers


def steady_range(
    requests: RequestTable,
    concurrency: int | None,
    warmup: float | None = None,
    turns: float = 1.0,
    think_s: float = 0.0,
) -> tuple[int, int]:
    """First and one-past-last row of the requests to measure.

    Open loop: the system needs about one sojourn time to fill and to drain, so requests within one mean end-to-end
    latency of the first (and at least the first tenth, at most half) and of the last arrival (at most a quarter) are
    left out. Closed loop of N users: the first 2 N, sent while the users are still in step (InferenceX warms up
    with as many), and the last N, served while users leave. Runs under 20 requests, or of fewer than 4 N, and bursts
    that arrive all at once are measured whole. Conversations of `turns` turns, `think_s` between the first and the last
    [s], fill the system more slowly: in an open loop so many sojourns and the thinking, in a closed loop so many times
    2 N. An explicit `warmup` share in [0, 1) replaces all of this and keeps the tail.
    """
    count = len(requests)
    if warmup is not None:
        if not 0 <= warmup < 1:
            raise InputError(f"warmup {warmup:g} must be a share in [0, 1).")
        return int(warmup * count), count
    if concurrency is not None:
        fill = math.ceil(2 * concurrency * turns)
        return (fill, count - concurrency) if count >= max(20, 2 * fill) else (0, count)
    arrival_s = requests.arrival_s
    e2e_s = requests.e2e_s[requests.status == FINISHED]
    if count < 20 or arrival_s[-1] == arrival_s[0] or not len(e2e_s):
        return 0, count
    fill_s = float(e2e_s.mean())
    first = int(np.searchsorted(arrival_s, arrival_s[0] + fill_s * turns + think_s))
    last = int(np.searchsorted(arrival_s, arrival_s[-1] - fill_s, side="right"))
    return min(max(first, math.ceil(0.1 * count)), count // 2), max(last, count - count // 4)


def latency_statistics(values_s: NDArray[np.float64]) -> LatencyStatistics:
    """Statistics of `values_s` `[num]` [s] in order of arrival; NaN values do not count.

    Neighbouring requests are correlated, so the intervals come from batch means (Law, Simulation Modeling and
    Analysis, section 9.5): the spread of the statistic between 20, 10 or 5 consecutive batches with Student's t.
    """
    values = values_s[~np.isnan(values_s)]
    if not len(values):
        return LatencyStatistics(0, math.nan, math.nan, math.nan, math.nan, math.nan, _NAN_PAIR, _NAN_PAIR)
    mean = float(values.mean())
    p50, p90, p95, p99 = (float(q) for q in np.percentile(values, (50, 90, 95, 99)))
    num_batches = 20 if len(values) >= 400 else 10 if len(values) >= 200 else 5 if len(values) >= 50 else 0
    if not num_batches:
        return LatencyStatistics(len(values), mean, p50, p90, p95, p99, _NAN_PAIR, _NAN_PAIR)
    batches = np.array_split(values, num_batches)
    mean_interval = _interval(mean, [float(b.mean()) for b in batches])
    p95_interval = _interval(p95, [float(np.percentile(b, 95)) for b in batches])
    return LatencyStatistics(len(values), mean, p50, p90, p95, p99, mean_interval, p95_interval)


def _interval(centre: float, per_batch: list[float]) -> tuple[float, float]:
    count = len(per_batch)
    half = _STUDENT_T[count - 1] * float(np.std(per_batch, ddof=1)) / math.sqrt(count)
    return centre - half, centre + half


def summarise(
    requests: RequestTable,
    steps: StepTable,
    spec: EngineSpec,
    simulated_s: float,
    *,
    concurrency: int | None = None,
    slo: Slo | None = None,
    warmup: float | None = None,
    conversation: tuple[float, float] = (1.0, 0.0),
) -> Summary:
    """Summary of the tables of a run of `spec` that ended at `simulated_s` [s].

    `concurrency` is the number of users of a closed loop, None for an open one. The limits of `slo` decide goodput;
    without it every answered request is good. `conversation` has the mean turns of one and the
    time its user thinks [s]. `warmup`, a share of the first requests, replaces the rule of `steady_range`; 0 measures
    everything. An empty `steps` leaves batch, KV and busy numbers NaN. Raises InputError
    when no request arrived or `warmup` is outside [0, 1).
    """
    if not len(requests):
        raise InputError("the run ended before its first request arrived. Raise max_simulated_s.")
    first, last = steady_range(requests, concurrency, warmup, *conversation)
    start_s = float(requests.arrival_s[first])
    end_s = float(requests.arrival_s[last]) if last < len(requests) else simulated_s
    good = _within_limits(requests, slo)
    ended = (requests.finish_s > start_s) & (requests.finish_s <= end_s)
    window_s = end_s - start_s
    output_tokens, prompt_tokens = _tokens_between(requests, start_s, end_s, simulated_s)
    latencies = {name: latency_statistics(getattr(requests, f"{name}_s")[first:last]) for name in _LATENCIES}
    use = _engine_use(steps, spec, start_s, end_s)
    return Summary(
        ttft_s=latencies["ttft"],
        tpot_s=latencies["tpot"],
        e2e_s=latencies["e2e"],
        queue_s=latencies["queue"],
        output_tok_per_s=_rate(output_tokens, window_s),
        total_tok_per_s=_rate(output_tokens + prompt_tokens, window_s),
        requests_per_s=_rate(float(ended.sum()), window_s),
        goodput_requests_per_s=_rate(float((ended & good).sum()), window_s),
        slo_attainment=float(good[first:last].mean()),
        mean_decode_seqs_per_rank=use.mean_decode_seqs_per_rank,
        kv_utilisation=use.kv_utilisation,
        kv_utilisation_peak=use.kv_utilisation_peak,
        busy_share=use.busy_share,
        prefix_hit_rate=_hit_rate(requests, first, last),
        num_preemptions=int(requests.num_preemptions[first:last].sum()),
        num_rejected=int((requests.status == REJECTED).sum()),
        num_unfinished=int((requests.status == UNFINISHED).sum()),
        num_measured=last - first,
        num_warmup=first,
        num_cooldown=len(requests) - last,
        window_s=window_s,
        saturation=_saturation(requests, spec, first, last, is_open=concurrency is None),
        objectives=tuple(_judge(o, latencies[o.metric]) for o in (slo.objectives if slo else ())),
    )


def _hit_rate(requests: RequestTable, first: int, last: int) -> float:
    """Share of the prompt tokens of admitted rows `first` to `last` that were found."""
    if requests.cached_tokens is None:
        return 0.0
    admitted = ~np.isnan(requests.admitted_s[first:last])
    prompts = int(requests.prompt_tokens[first:last][admitted].sum())
    return float(requests.cached_tokens[first:last].sum()) / prompts if prompts else 0.0


def _rate(count: float, window_s: float) -> float:
    return count / window_s if window_s > 0 else math.nan


def _judge(objective: Objective, statistics: LatencyStatistics) -> ObjectiveResult:
    """A latency no request has, such as the TPOT of one-token answers, breaks no promise."""
    value_s = statistics.value(objective.statistic)
    return ObjectiveResult(objective, value_s, not statistics.num or value_s <= objective.limit_s)


def _within_limits(requests: RequestTable, slo: Slo | None) -> NDArray[np.bool_]:
    good = requests.status == FINISHED
    for metric, limit_s in (slo.limits_s() if slo else {}).items():
        value_s = getattr(requests, f"{metric}_s")
        good &= (value_s <= limit_s) | np.isnan(value_s)
    return np.asarray(good, dtype=np.bool_)


def _tokens_between(requests: RequestTable, start_s: float, end_s: float, simulated_s: float) -> tuple[float, float]:
    """Output and prompt tokens of the window; a prompt counts at its first token, outputs evenly until the finish."""
    begun = ~np.isnan(requests.first_token_s)
    first_s = requests.first_token_s[begun]
    finish_s = np.where(np.isnan(requests.finish_s[begun]), simulated_s, requests.finish_s[begun])
    inside = (first_s > start_s) & (first_s <= end_s)
    overlap_s = np.clip(np.minimum(finish_s, end_s) - np.maximum(first_s, start_s), 0, None)
    duration_s = finish_s - first_s
    share = np.divide(overlap_s, duration_s, out=np.zeros_like(overlap_s), where=duration_s > 0)
    output_tokens = inside.sum() + ((requests.produced_tokens[begun] - 1) * share).sum()
    return float(output_tokens), float(requests.prompt_tokens[begun][inside].sum())


@dataclass(frozen=True, slots=True)
class _EngineUse:
    mean_decode_seqs_per_rank: float
    kv_utilisation: float
    kv_utilisation_peak: float
    busy_share: float


def _engine_use(steps: StepTable, spec: EngineSpec, start_s: float, end_s: float) -> _EngineUse:
    """Means over the steps that start in the window, weighted by their duration."""
    chosen = (steps.start_s >= start_s) & (steps.start_s < end_s)
    step_s = steps.step_s[chosen]
    busy_s = float(step_s.sum())
    if not busy_s > 0:
        return _EngineUse(math.nan, math.nan, math.nan, math.nan)
    kv_share = steps.kv_tokens_used[chosen] / (spec.kv_blocks_per_rank * spec.block_tokens * spec.ranks_per_group)
    return _EngineUse(
        mean_decode_seqs_per_rank=float((steps.decode_seqs[chosen] * step_s).sum()) / busy_s / spec.ranks_per_group,
        kv_utilisation=float((kv_share * step_s).sum()) / busy_s,
        kv_utilisation_peak=float(kv_share.max()),
        busy_share=min(1.0, busy_s / ((end_s - start_s) * spec.num_groups)),
    )


def _saturation(requests: RequestTable, spec: EngineSpec, first: int, last: int, *, is_open: bool) -> str:
    """Verdict on rows `first` to `last`: does the number in the system grow from their middle to their end?

    Under stability the growth has mean zero and, for a Poisson number N in the system, variance 2 N; overloaded
    means growth above 3 sqrt(2 N), above 2 sqrt(arrivals), above 5 % of the arrivals of the second half, and
    a system that was not emptier in the middle than at the beginning.
    """
    accepted = (requests.status != REJECTED) & (requests.status != LOST)
    middle = (first + last) // 2
    if is_open and last - first >= 20:
        at_s = requests.arrival_s[[first, middle, last - 1]]
        before, then, now = (_in_system(requests, accepted, float(t)) for t in at_s)
        arrived = int(accepted[middle:last].sum())
        noise = max(0.05 * arrived, 2 * math.sqrt(arrived), 3 * math.sqrt(2 * max(then, 1)))
        if now - then > noise and then >= before:
            return "overloaded"
    ttft_s = requests.ttft_s[first:last]
    known = ~np.isnan(ttft_s)
    # What a request spends in an idle front end is no queue.
    frontend_s = spec.frontend_s + spec.frontend_s_per_token * requests.prompt_tokens[first:last][known]
    queued_s = np.maximum(requests.queue_s[first:last][known] - frontend_s, 0.0).sum()
    return "backlogged" if known.any() and queued_s > 0.5 * ttft_s[known].sum() else "stable"


def _in_system(requests: RequestTable, accepted: NDArray[np.bool_], time_s: float) -> int:
    arrived = (requests.arrival_s <= time_s) & accepted
    return int(arrived.sum() - (requests.finish_s[arrived] <= time_s).sum())
