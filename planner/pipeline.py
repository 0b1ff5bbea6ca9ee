"""Pipeline stages: how long a batch spends in each, and how batches in flight follow each other through them.

A replica with p stages keeps p batches in flight, one per scheduler slot. A batch enters a stage when it has left the
one before and the batch ahead has left this one, so with every slot busy the longest stage sets the pace, with fewer
batches than stages the others idle, and a long prompt holds up everybody behind it (handbook serving 6.8).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from planner.cost import StepCost
from planner.engine import Engine
from planner.experts import ExpertSettings
from planner.hardware import Cluster
from planner.layout import Layout
from planner.model import ModelConfig
from planner.scheduler import Rank, RankWork

Floats = NDArray[np.float64]
T = TypeVar("T")

_SIZES: Floats = np.exp2(np.arange(15.0))
"""Sequences or prompt tokens of a rank at which the split is tabulated."""
_CONTEXT = 2048.0
"""KV tokens per sequence where it is: the context hardly moves layers against each other."""
_HEAD = ("lm_head", "sampling")
_ONCE = (*_HEAD, "host")


@dataclass(frozen=True, slots=True)
class StageSplit:
    """Share of a step that each stage takes, by phase and size: [15 powers of two][stages], each row sums to 1."""

    decode: tuple[tuple[float, ...], ...]
    prefill: tuple[tuple[float, ...], ...]

    @property
    def num_stages(self) -> int:
        """Pipeline depth."""
        return len(self.decode[0])

    def shares(self, works: Sequence[RankWork]) -> tuple[float, ...]:
        """Shares of the step that does `works`."""
        tokens = max(work.prefill_tokens for work in works)
        table, size = (self.prefill, tokens) if tokens else (self.decode, max(work.decode_seqs for work in works))
        return table[min(max(size, 1).bit_length() - 1, len(table) - 1)]


def stage_layers(layers: Sequence[T], num_stages: int) -> list[tuple[T, ...]]:
    """Layers or their kinds of each stage: as even in number as can be, the first stages one more, as engines cut."""
    bounds = np.array_split(np.arange(len(layers)), num_stages)
    return [tuple(layers[int(i)] for i in stage) for stage in bounds]


def stage_split(cost: StepCost) -> StageSplit:
    """How the step of `cost` divides over its stages: layers differ (dense ones are cheaper), the last has the head.

    Encoder-decoder models are split evenly.
    """
    stages = cost.layout.pp
    if cost.has_encoder:
        even = tuple(tuple([1.0 / stages] * stages) for _ in _SIZES)
        return StageSplit(even, even)
    return StageSplit(*(_rows(stage_seconds(cost, phase)) for phase in ("decode", "prefill")))


@lru_cache(maxsize=16)
def stage_seconds(cost: StepCost, phase: str) -> Floats:
    """Seconds of each stage in steps of `phase`, decode or prefill [15, stages], without transfers between stages."""
    found = np.zeros((len(_SIZES), cost.layout.pp))
    order = cost.model.layer_order
    alone_on = replace(cost.layout, pp=1, replicas=1)
    fixed = (cost.model, alone_on, cost.cluster, cost.engine, cost.backend, cost.experts, phase)
    alone = [_terms(kind, *fixed) for kind in range(len(cost.model.layer_kinds))]
    for stage, kinds in enumerate(stage_layers(order, cost.layout.pp)):
        for kind, count in Counter(kinds).items():
            found[:, stage] += count * sum(v for k, v in alone[kind].items() if k not in _ONCE)
    found[:, -1] += sum(v for k, v in alone[order[-1]].items() if k in _HEAD)
    return found


@lru_cache(maxsize=256)
def _terms(
    kind: int,
    model: ModelConfig,
    stage: Layout,
    cluster: Cluster,
    engine: Engine,
    backend: str,
    experts: ExpertSettings,
    phase: str,
) -> Mapping[str, Floats]:
    """Seconds by operation of a step of one layer of a kind and the head, on one stage; any number have such stages."""
    layer, _ = model.layer_kinds[kind]
    of = StepCost(replace(model, layers=(layer,)), stage, cluster, engine, backend, experts)
    step = of.decode(_SIZES, np.full_like(_SIZES, _CONTEXT)) if phase == "decode" else of.prefill(_SIZES)
    return step.terms


def _rows(seconds: Floats) -> tuple[tuple[float, ...], ...]:
    shares = seconds / seconds.sum(axis=1, keepdims=True)
    return tuple(tuple(row) for row in shares.tolist())


def unevenness(cost: StepCost, batch: Floats) -> Floats:
    """The longest stage over the mean one in decode steps of `batch` sequences; 1 without a pipeline."""
    if cost.layout.pp == 1 or cost.has_encoder:
        return np.ones_like(batch)
    seconds = stage_seconds(cost, "decode")
    ratio = seconds.max(axis=1) / seconds.mean(axis=1)
    return np.asarray(np.interp(np.log2(np.maximum(batch, 1.0)), np.arange(len(_SIZES)), ratio))


class Pipeline:
    """Stages of one replica, first come first served; O(stages) per step, no event of its own."""

    __slots__ = ("free_s", "split")

    def __init__(self, split: StageSplit) -> None:
        self.split = split
        self.free_s = [0.0] * split.num_stages

    def clear(self) -> None:
        """Nothing is in flight any more."""
        self.free_s = [0.0] * self.split.num_stages

    def pass_s(self, now_s: float, step_s: float, ranks: Sequence[Rank]) -> float:
        """Seconds until the slot of a batch that is ready at `now_s` may send its next one.

        That is when the batch has left the last stage, waiting for the batches ahead. A batch of one unfinished
        prompt makes no token: its next chunk follows as soon as the first stage is free, so m chunks alone take
        m + p - 1 stage times.
        """
        shares = self.split.shares([rank.work for rank in ranks])
        free_s, at_s = self.free_s, now_s
        first_s = now_s
        for stage, share in enumerate(shares):
            if free_s[stage] > at_s:
                at_s = free_s[stage]
            at_s += share * step_s
            free_s[stage] = at_s
            if not stage:
                first_s = at_s
        return (first_s if all(_makes_nothing(rank) for rank in ranks) else at_s) - now_s


def _makes_nothing(rank: Rank) -> bool:
    """True if the step of `rank` is part of one prompt, or nothing at all."""
    work = rank.work
    return not work.decode_seqs and (not work.num_prefills or (work.num_prefills == 1 and rank.partial is not None))


def pipelines(split: StageSplit | None, num_groups: int) -> list[Pipeline]:
    """Pipeline of each group; the groups of a replica are neighbours and share one. Empty without `split`."""
    if split is None:
        return []
    shared = [Pipeline(split) for _ in range(num_groups // split.num_stages)]
    return [shared[group // split.num_stages] for group in range(num_groups)]
