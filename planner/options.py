"""Command-line values as planner objects: precisions, demand, clusters. Shared by the commands and the dashboard."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from planner.calibration import calibrations
from planner.capacity import CapacityLimit, default_limit
from planner.capacity import rule as capacity_rule
from planner.choices import ExpertChoices
from planner.compare.question import Demand
from planner.engine import Engine
from planner.engine import engine as load_engine
from planner.errors import InputError, nearest
from planner.experts import ExpertSettings
from planner.hardware import Cluster, parse_cluster
from planner.layout import Layout
from planner.model import ModelConfig, load
from planner.model.precision import override
from planner.placement import PLACEMENTS, Placement, read_placement
from planner.residency import REUSES, Residency, Reuse, calibrate
from planner.residency.hosts import Host
from planner.residency.hosts import host as named_host
from planner.routing import Law, LogNormal, Measured, named_skew
from planner.routing.drift import Drift
from planner.routing.formats import read_record
from planner.routing.records import Record, check_model
from planner.routing.statistics import request_concentration
from planner.units import format_bytes, whole_number
from planner.workload import Slo, Workload, load_workload, parse_slo
from planner.workload.demand import MIN_REQUESTS

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(TB|GB|MB|TiB|GiB|MiB)\s*", re.IGNORECASE)
_SCALE = {"tb": 1e12, "gb": 1e9, "mb": 1e6, "tib": 2.0**40, "gib": 2.0**30, "mib": 2.0**20}
DEFAULT_RATE_PER_S = 1.0
_TYPICAL_TPOT_S = 0.05
_GENERATIONS = 5
_MAX_REQUESTS = 20_000
_MAX_OVERSUBSCRIPTION = 64.0
_UNSEEN = 0.5
"""Assignments added to every expert of a record, so that those never picked keep a chance."""
_PARTS = ("experts", "attention", "dense")
_ALSO = ("rate", "concurrency", "workload", "slo", "weights")


def precision(model: str | ModelConfig, weights: str | None, kv: str | None) -> ModelConfig:
    """`model`, or that of this name, with formats `weights` (`fp8`, `experts=nvfp4,attention=bf16`) and `kv`."""
    chosen: dict[str, str] = {}
    for item in weights.split(",") if weights else ():
        part, equals, fmt = item.strip().partition("=")
        if not equals:
            chosen |= dict.fromkeys(_PARTS, part)
        elif part in _PARTS:
            chosen[part] = fmt
        else:
            raise InputError(f"--weights {weights}: {part!r} is not one of {', '.join(_PARTS)}")
    return override(load(model) if isinstance(model, str) else model, kv=kv, **chosen)


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
    for a p95, 20,000 at most. With conversations, five generations of those.
    """
    workload = demand(text, rate, concurrency, num_requests)
    if num_requests is not None or workload.arrivals.kind not in ("poisson", "gamma"):
        return workload
    tpot_s = (slo.limits_s() if slo else {}).get("tpot", _TYPICAL_TPOT_S)
    sojourn_s = workload.mean_output_tokens * tpot_s * workload.mean_turns + workload.conversation_think_s
    overlapping = workload.arrivals.rate_per_s * sojourn_s
    return workload.with_num_requests(int(min(max(_GENERATIONS * overlapping, MIN_REQUESTS), _MAX_REQUESTS)))


def also(text: str) -> Demand:
    """A model of a fleet with its demand from `MODEL rate=3 workload=rag slo=tpot_p95=80ms` (or `concurrency=40`)."""
    name, *settings = text.split() or [""]
    if not name:
        raise InputError('--also names no model: write it like --also "mixtral-8x7b rate=3 workload=rag"')
    given = dict(item.split("=", 1) for item in settings if "=" in item)
    for setting in settings:
        key, equals, _ = setting.partition("=")
        if key not in _ALSO:
            raise InputError(f"--also {text!r}: {setting!r}: {nearest(key, _ALSO)}")
        if not equals:
            raise InputError(f"--also {text!r}: {key} has no value: write {key}=...")
    slo = parse_slo(given.get("slo", "ttft_p95=2s,tpot_p95=50ms"))
    numbers = {key: _number(f"--also {key}", given[key]) for key in ("rate", "concurrency") if key in given}
    users = numbers.get("concurrency")
    workload = plan_demand(
        given.get("workload", "chat"), numbers.get("rate"), None if users is None else int(users), None, slo
    )
    return Demand(precision(name, given.get("weights"), None), workload, slo)


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{option}={text}: is not a number") from None


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


def engine(name: str, no_prefix_cache: bool = False, calibration: str | None = None) -> Engine:
    """The engine profile of that name, without its prefix cache if wished.

    `calibration` is a file of `moeplan calibrate --out`, `off`, or None for the shipped ones.
    """
    profile = load_engine(name)
    profile = replace(profile, prefix_caching=False) if no_prefix_cache else profile
    return profile if calibration is None else replace(profile, calibrations=calibrations(calibration))


def experts(model: ModelConfig, chosen: ExpertChoices, layout: Layout | None = None) -> ExpertSettings:
    """Settings of the experts of `model` from the options of a command; a placement file needs its `layout`.

    Raises InputError on an unknown name, an impossible number, or a routing record of another model.
    """
    if chosen.placement == "exact":
        raise InputError(
            "--placement exact takes minutes: run `moeplan experts place --policy exact --out FILE` and give the file"
        )
    if Path(chosen.placement).suffix and layout is None:
        raise InputError(
            f"--placement {chosen.placement}: a file fits one layout, a plan tries many. Simulate its layout, or plan "
            "with a policy such as eplb."
        )
    if not Path(chosen.placement).suffix and chosen.placement not in PLACEMENTS:
        raise InputError(f"--placement {chosen.placement}: {nearest(chosen.placement, PLACEMENTS)}")
    check_positive(gpus_per_root=chosen.gpus_per_root)
    top_k, spread = _experts_per_token(model, chosen.top_k)
    reuse, dram = _reuse(model, chosen.reuse), None if chosen.dram is None else parse_bytes("--dram", chosen.dram)
    drive_bytes, drive_rate = (0.0, None) if chosen.nvme is None else parse_drives(chosen.nvme)
    drifts = chosen.drift_half_life is not None or chosen.drift_switch is not None
    return ExpertSettings(
        skew=_skew(model, chosen.skew),
        placement=_placement(model, chosen.placement, layout),
        limit=_capacity_limit(model, chosen.capacity_factor, chosen.capacity_rule),
        top_k=top_k,
        top_k_spread=spread,
        drift=Drift(chosen.drift_half_life, chosen.drift_switch) if drifts else None,
        rebalance_steps=chosen.rebalance_steps,
        rebalance_async=chosen.rebalance_async,
        residency=_residency(model, chosen, reuse),
        dram_bytes=dram,
        nvme_bytes=drive_bytes,
        nvme_bytes_per_s=drive_rate,
        peer_bytes=0.0 if chosen.peer is None else parse_bytes("--peer", chosen.peer),
        gpus_per_root=chosen.gpus_per_root,
        host=_host(chosen.host, dram),
        reuse=reuse,
    )


def _residency(model: ModelConfig, chosen: ExpertChoices, reuse: Reuse) -> Residency | None:
    if chosen.residency is None:
        if chosen.resident is not None:
            raise InputError(f"--resident {chosen.resident} needs --residency, such as lru")
        return None
    if model.moe is None:
        raise InputError(f"--residency {chosen.residency}: {model.name} is dense and has no experts to keep elsewhere")
    return Residency(chosen.residency, chosen.resident, reuse)


def _reuse(model: ModelConfig, text: str) -> Reuse:
    """A preset, or the reuse of a routing record of `model` with token ids."""
    if not Path(text).suffix:
        if text not in REUSES:
            raise InputError(f"--reuse {text}: {nearest(text, REUSES)} Or give a routing record with token ids.")
        return REUSES[text]
    if model.moe is None:
        raise InputError(f"--reuse {text}: {model.name} is dense and routes nothing")
    record = _record(model, text)
    if record.expert_ids is None:
        raise InputError(f"--reuse {text}: the record has counts only; give one with token ids, such as an .npz")
    lengths = [record.expert_ids.shape[1]] if record.sequence_lengths is None else record.sequence_lengths
    return calibrate(record.expert_ids, lengths, record.num_experts)


def _host(text: str | None, dram_bytes: float | None) -> Host | None:
    """The bundled host of that name; InputError where it cannot take `dram_bytes`."""
    if text is None:
        return None
    found = named_host(text)
    if dram_bytes is not None and dram_bytes > found.dram_max_bytes:
        raise InputError(
            f"--host {text} takes at most {format_bytes(found.dram_max_bytes)} of memory, --dram asks for "
            f"{format_bytes(dram_bytes)}: use a larger host"
        )
    return found


def _placement(model: ModelConfig, text: str, layout: Layout | None) -> str | Placement:
    """A policy, or the placement in a file for `layout`."""
    if layout is None or not Path(text).suffix:
        return text
    if model.moe is None:
        raise InputError(f"--placement {text}: {model.name} is dense and has no experts to place")
    numbers = [number for number, layer in enumerate(model.layers) if layer.moe]
    return read_placement(Path(text), model.moe.num_experts, layout.ep, layers=numbers)


def _skew(model: ModelConfig, text: str | None) -> Law | None:
    """A named law, or the loads of a routing record of `model`."""
    if text is None or not Path(text).suffix or ":" in text:
        return None if text is None else named_skew(text)
    if model.moe is None:
        raise InputError(f"--skew {text}: {model.name} is dense and routes nothing")
    record = _record(model, text)
    return Measured(text, record.counts + _UNSEEN, _prompt_spread(record))


def _record(model: ModelConfig, text: str) -> Record:
    """The routing record of that file, which must be of `model`."""
    assert model.moe is not None
    record = read_record(Path(text), num_experts=model.moe.num_experts)
    check_model(record, model.moe.num_experts, model.num_moe_layers, model.moe.top_k, model.name)
    return record


def _prompt_spread(record: Record) -> LogNormal | None:
    """How far prompts stray from their record, None if it has counts only.

    Prompts with Dirichlet popularity of concentration kappa scatter with CV^2 = E / kappa around the mean expert.
    """
    concentration = request_concentration(record)
    if concentration is None:
        return None
    spread = np.sqrt(np.log1p(record.num_experts / concentration))
    low, high = np.clip(np.quantile(spread, (0.05, 0.95)), 0.0, 3.0)
    return LogNormal("prompts of the record", float(low), float(high))


def _capacity_limit(model: ModelConfig, factor: str | None, rule: str | None) -> CapacityLimit | None:
    own = default_limit(model)
    if factor == "off":
        return None
    if factor is None:
        if rule is not None:
            raise InputError(f"--capacity-rule {rule} needs --capacity-factor, such as 1.25")
        return own
    try:
        number = float(factor)
    except ValueError:
        raise InputError(f"--capacity-factor {factor}: a number such as 1.25, or off") from None
    if model.moe is None:
        raise InputError(f"--capacity-factor {factor}: {model.name} is dense and has no experts to limit")
    if own is not None and rule in (None, own.rule):
        return replace(own, factor=number)
    # Factors of Megatron count slots over the even share of all picks, which is what users of top-k models mean.
    name = rule or "megatron"
    return CapacityLimit(name, number, group_tokens=capacity_rule(name, model.moe.top_k).group_tokens)


def _experts_per_token(model: ModelConfig, text: str | None) -> tuple[int | None, float]:
    if text is None:
        return None, 0.0
    mean, _, spread = text.partition("~")
    most = model.moe.num_experts if model.moe else 0
    count = whole_number(mean)
    if count is None or not 1 <= count <= most:
        raise InputError(f"--top-k {text}: experts per token from 1 to {most}, such as 6 or 6~1.5")
    try:
        width = float(spread or 0)
    except ValueError:
        raise InputError(f"--top-k {text}: {spread!r} is not a number") from None
    if not 0.0 <= width <= count / 2:
        raise InputError(f"--top-k {text}: let the experts per token vary by at most half their mean, {count / 2:g}")
    return count, width


def parse_bytes(option: str, text: str) -> float:
    """Bytes of `128GB`, `1.5 TB` or `64GiB`; InputError naming `option` otherwise."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InputError(f"{option} {text}: give a size with its unit, such as 128GB or 2TB")
    return float(match[1]) * _SCALE[match[2].lower()]


def parse_drives(text: str) -> tuple[float, float | None]:
    """Bytes and bytes per second of `2TB@7GB/s`, None for a rate that is not given; InputError otherwise."""
    space, at, rate = text.partition("@")
    if not at:
        return parse_bytes("--nvme", space), None
    if not rate.lower().endswith("/s"):
        raise InputError(f"--nvme {text}: give a rate after the @, such as 2TB@7GB/s")
    match = _SIZE.fullmatch(rate[:-2])
    bytes_per_s = float(match[1]) * _SCALE[match[2].lower()] if match else 0.0
    if bytes_per_s <= 0:
        raise InputError(f"--nvme {text}: give drives a rate above 0, not {rate!r}, such as 2TB@7GB/s")
    return parse_bytes("--nvme", space), bytes_per_s


def check_positive(**values: int | None) -> None:
    """InputError naming the option when a given value is below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: a positive whole number is needed")
