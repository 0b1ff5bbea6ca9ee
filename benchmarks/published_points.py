"""Published throughput and latency values replayed: bursts, offline queues, closed loops and steady rates.

Rows are those of published_points.csv (GPUStack performance lab, TensorRT-LLM performance overviews), grouped into
runs by `run_group`. A run is served with its engine's defaults and the flags that are published with it; lengths are
fixed at the stated means. With calibrations as shipped: none of these values was used to fit them.
"""

from __future__ import annotations

import csv
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from planner.deployment import Deployment, deploy, run
from planner.engine import Engine, Limits
from planner.errors import DoesNotFit, Infeasible, PlannerError
from planner.hardware import Cluster
from planner.layout import Layout
from planner.model import ModelConfig, override
from planner.validation.names import engine_of, model_of, system_of
from planner.workload import Arrivals, Lengths, Workload

ENGINES = {
    "TensorRT-LLM (C++ runtime, IFB)": "trtllm",
    "TensorRT-LLM (PyTorch)": "trtllm",
    "TensorRT-LLM + Triton backend": "trtllm",
}
GPUS = {"RTX PRO 6000 SE": "rtx-pro-6000"}
PRECISIONS = {"fp16": "bf16", "fp8 (native ckpt)": "", "mxfp4 (native ckpt)": ""}
"""FP16 has the bytes and the rate of BF16; native checkpoints are what the model's name says."""
SHARES = (1.0, 0.5, 0.25, 0.125)
"""Shares of the default limits tried in turn: operators lower them until the server starts."""
BURST_RATE = 100.0
"""Stated rates from here on send everything at once (GuideLLM's 1000)."""
_NUM_REQUESTS = re.compile(r"(?:all |; |^)([0-9]+) requests|n_req ([0-9]+)")
_FLAG = re.compile(r"--?([a-z][\w-]*)(?:[ =]([^-\s;][^\s;]*))?")


@dataclass(frozen=True, slots=True)
class Published:
    """One run: its conditions as read, and every value published of it by metric."""

    group: str
    fields: dict[str, str]
    values: dict[str, float]

    @property
    def source(self) -> str:
        """Who published it."""
        return self.fields["source"].replace("TensorRT-LLM perf-overview", "TensorRT-LLM")

    @property
    def flags(self) -> dict[str, str]:
        """Server flags in the notes, without their leading dashes."""
        notes = re.split(r"served as:|params:", self.fields["notes"])
        return dict(_FLAG.findall(notes[-1])) if len(notes) > 1 else {}

    @property
    def num_requests(self) -> int:
        """Requests of the run; the users where the notes do not say."""
        found = _NUM_REQUESTS.search(self.fields["notes"])
        stated = next((int(text) for text in found.groups() if text), 0) if found else 0
        return max(stated, int(_number(self.fields["concurrency"])))

    @property
    def conditions(self) -> tuple[str, ...]:
        """What identical values should have in common."""
        return tuple(self.fields[key] for key in ("model", "gpu", "engine", "tp", "dp", "isl_mean", "osl_mean"))


@dataclass(frozen=True, slots=True)
class Outcome:
    """Predicted values of a run by metric, or why there are none."""

    predicted: dict[str, float]
    reason: str = ""


def read(path: Path) -> list[Published]:
    """Runs of a points file in its order."""
    fields: dict[str, dict[str, str]] = {}
    values: dict[str, dict[str, float]] = defaultdict(dict)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            fields.setdefault(row["run_group"], row)
            values[row["run_group"]][row["metric"]] = float(row["value"])
    return [Published(group, row, values[group]) for group, row in fields.items()]


def repeated(runs: Sequence[Published]) -> dict[str, str]:
    """Runs whose values (two or more) another one states as well -> why they are not counted.

    Under other conditions neither can be trusted; under the same the first counts.
    """
    seen: dict[tuple[tuple[str, float], ...], list[Published]] = defaultdict(list)
    for one in runs:
        if len(one.values) > 1:
            seen[tuple(sorted(one.values.items()))].append(one)
    reasons = {}
    for same in seen.values():
        if len({one.conditions for one in same}) > 1:
            told = " and ".join(sorted({f"{one.fields['gpu']} {one.fields['engine']}" for one in same}))
            reasons |= {one.group: f"the source states the same figures for {told}" for one in same}
        else:
            reasons |= {one.group: "a figure that the source states twice" for one in same[1:]}
    return reasons


def replay(one: Published) -> Outcome:
    """Predicted values of a run under its metrics' names; what cannot be predicted says why."""
    try:
        deployment = served(one)
        result = run(deployment, workload_of(one), max_replicas=1)
    except Infeasible as error:
        return Outcome({}, f"does not fit by our ledger: {_first(error)}")
    except PlannerError as error:
        return Outcome({}, _first(error))
    requests, prompt, output = result.simulation.requests, *_lengths(one)
    done = requests.finish_s[np.isfinite(requests.finish_s)]
    tok_per_s = len(done) * output / float(done.max())
    tpot_ms = float(np.nanmean(requests.tpot_s)) * 1e3 if output > 1 else float("nan")
    latency_ms = float(np.nanmean(requests.e2e_s)) * 1e3
    predicted = {
        "output_tok_s_total": tok_per_s,
        "total_tok_s": tok_per_s * (prompt + output) / output,
        "ttft_mean_ms": float(np.nanmean(requests.ttft_s)) * 1e3,
        "ttft_p99_ms": float(np.nanpercentile(requests.ttft_s, 99)) * 1e3,
        "tpot_mean_ms": tpot_ms,
        "itl_mean_ms": tpot_ms,
        "latency_mean_ms": latency_ms,
        "latency_per_output_token_ms": latency_ms / output,
    }
    return Outcome({metric: predicted[metric] for metric in one.values if metric in predicted})


def served(one: Published) -> Deployment:
    """The server of a run. PlannerError where it is not one that can be described."""
    fields, flags = one.fields, one.flags
    if fields["engine"] == "TensorRT-LLM (static batch)":
        raise PlannerError("static batches are not modelled")
    chosen = system_of(GPUS.get(fields["gpu"], fields["gpu"]))
    model = _model(one)
    num_gpus, dp = int(_number(fields["n_gpus"])), int(_number(fields["dp"]))
    deepep = flags.get("moe-a2a-backend") == "deepep"
    ep = num_gpus if deepep else int(_number(fields["ep"]) or 1)
    ep = ep if model.moe else 1
    layout = Layout(int(_number(fields["tp"])), 1, ep, dp, num_gpus // ep)
    cluster = Cluster(chosen, -(-num_gpus // chosen.gpus_per_node), min(num_gpus, chosen.gpus_per_node))
    backend = "deepep" if deepep else "allgather_reducescatter" if dp > 1 else "all_reduce"
    engine, context = _engine(one), sum(_lengths(one))
    reason: DoesNotFit | None = None
    for share in SHARES:
        try:
            limits = _limits(engine, one, share)
            found = deploy(model, cluster, layout, engine, limits, backend, context)
        except DoesNotFit as error:
            reason = reason or error
            continue
        if found.memory.kv_tokens >= context:
            return found
    raise reason or DoesNotFit(f"{model.name} leaves no room for one request of {context:,} tokens", [])


def workload_of(one: Published) -> Workload:
    """Everything at once, a closed loop where fewer users than requests are stated, or requests at an even rate."""
    prompt, output = _lengths(one)
    rate, users = _number(one.fields["request_rate"]), int(_number(one.fields["concurrency"]))
    count = one.num_requests or 500
    steady = 0 < rate < BURST_RATE
    arrivals = Arrivals.gamma(rate, 0.01) if steady else Arrivals.closed(min(users, count) if users else count)
    return Workload(one.group, Lengths.fixed(prompt), Lengths.fixed(output), arrivals, count)


def _model(one: Published) -> ModelConfig:
    label = one.fields["weight_dtype"]
    named = one.fields["model"].lower().endswith("-fp8")
    model = model_of(one.fields["model"], "" if named else PRECISIONS.get(label, label))
    if one.fields["kv_dtype"] == "fp8" or one.flags.get("kv-cache-dtype", "").startswith("fp8"):
        model = override(model, kv="fp8")
    tokens = sum(_lengths(one))
    return replace(model, max_context=tokens) if 0 < model.max_context < tokens else model


def _engine(one: Published) -> Engine:
    name = one.fields["engine"]
    engine = replace(engine_of(ENGINES.get(name, name)), expert_parallel="any")
    fraction = one.flags.get("mem-fraction-static") or one.flags.get("gpu-memory-utilization")
    return engine.with_memory_fraction(float(fraction)) if fraction else engine


def _limits(engine: Engine, one: Published, share: float) -> Limits:
    """Default limits of one rank as the published flags change them."""
    gpu, flags = system_of(GPUS.get(one.fields["gpu"], one.fields["gpu"])).gpu, one.flags
    default, dp = engine.budget(gpu.hbm_bytes, gpu.arch), int(_number(one.fields["dp"]))
    seqs = int(flags.get("max-num-seqs", default.max_num_seqs))
    seqs = int(flags["max-running-requests"]) // dp if "max-running-requests" in flags else seqs
    stated = flags.get("chunked-prefill-size") or flags.get("max-num-batched-tokens")
    tokens = int(stated) if stated else default.max_batched_tokens
    tokens //= dp if engine.divides_prefill_by_attention_dp else 1
    seqs, tokens = max(1, int(seqs * share)), max(1, int(tokens * share))
    return Limits(seqs, max(seqs, tokens))


def _lengths(one: Published) -> tuple[int, int]:
    prompt, output = (max(1, round(_number(one.fields[key]))) for key in ("isl_mean", "osl_mean"))
    return prompt, output


def _number(text: str) -> float:
    """A field as a number; 0 where it is empty, infinite rates included."""
    value = float(text) if text else 0.0
    return value if np.isfinite(value) else 0.0


def _first(error: Exception) -> str:
    return " ".join(str(error).split()).split(": did you mean")[0].split(" are known")[0][:160]


def replay_all(runs: Sequence[Published], workers: int | None = None) -> dict[str, Outcome]:
    """Outcome of every run by its group, on several processes."""
    skipped = repeated(runs)
    todo = [one for one in runs if one.group not in skipped]
    cores = workers or min(4, os.cpu_count() or 1)
    if cores == 1:
        outcomes = [replay(one) for one in todo]
    else:
        with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
            outcomes = list(pool.map(replay, todo, chunksize=4))
    found = {one.group: outcome for one, outcome in zip(todo, outcomes, strict=True)}
    return found | {group: Outcome({}, reason) for group, reason in skipped.items()}
