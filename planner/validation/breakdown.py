"""What the mean TTFT and TPOT of a replayed point are made of: their slope in every parameter of a calibration.

A request waits for the steps that run between its queue and its first token, and pays for those until its last. So a
mean latency is a sum over steps of (requests in that phase) x step time, and a step time is a sum over operations.
Slopes are taken in a run with some calibration; what longer steps do to queues is left to the next replay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.calibration import CLASS_OF, PARAMETERS
from planner.cost import StepCost
from planner.records import StepTable
from planner.simulation import Simulation
from planner.steptime import bilinear

Floats = NDArray[np.float64]
_UNSCALED = ("lm_head", "sampling", "host", "prompt_launches")
"""Operations of a step with prompts that `Calibration.prompts` does not multiply."""
_CONTEXT_STEPS = 8.0
"""Steps whose contexts differ by less than this part of an octave are taken as one kind."""


@dataclass(frozen=True, slots=True, eq=False)
class Breakdown:
    """Slopes [s per unit] of mean TTFT and TPOT by parameter, in the order of PARAMETERS; operations [s] by label.

    `at` are the values of the parameters in the run, `[parameters]`.
    """

    at: Floats
    ttft: Floats
    tpot: Floats
    ttft_terms: Mapping[str, float]
    tpot_terms: Mapping[str, float]


def break_down(simulation: Simulation, cost: StepCost, weights: Floats) -> Breakdown:
    """Breakdown of the means over the requests of `simulation`, weighted, whose steps took what `cost` says."""
    requests, steps = simulation.requests, simulation.steps
    known = ~np.isnan(requests.first_token_s) & ~np.isnan(requests.finish_s)
    weights = np.where(known, weights, 0.0)
    spans = requests.output_tokens - 1
    later = np.where(spans > 0, weights, 0.0)
    finish_s = np.where(known, requests.finish_s, 0.0)
    first_s = np.where(known, requests.first_token_s, 0.0)
    queued_s = np.minimum(np.where(known, requests.arrival_s, 0.0) + _frontend_s(simulation), first_s)
    group = requests.rank // simulation.spec.ranks_per_group
    waiting = _overlap(steps, group, queued_s, first_s, weights / weights.sum())
    decoding = _overlap(steps, group, first_s, finish_s, later / np.maximum(spans, 1) / max(later.sum(), 1e-300))
    terms, unscaled_s, which = _terms(steps, cost)
    share = 1.0 / np.sum(list(terms.values()), axis=0)
    scaled = 1.0 - (unscaled_s * share)[which]
    prompt_tokens = float(np.average(requests.prompt_tokens, weights=weights))
    slopes, sums = [], []
    for overlap in (waiting, decoding):
        seconds = {label: overlap * (values * share)[which] for label, values in terms.items()}
        slopes.append(_slopes(seconds, overlap / steps.step_s, steps, cost))
        with_prompts = steps.prefill_tokens > 0
        slopes[-1]["prompts"] = float((overlap * scaled)[with_prompts].sum()) / cost.calibration.prompts
        sums.append({label: float(values.sum()) for label, values in seconds.items()})
    slopes[0]["frontend_s"] = slopes[0]["unassisted_frontend_s"] = 1.0
    slopes[0]["frontend_s_per_token"] = prompt_tokens
    if cost.engine.frontend_workers:
        slopes[0]["unassisted_frontend_s"] = 0.0
    ttft, tpot = (np.array([found.get(name, 0.0) for name in PARAMETERS]) for found in slopes)
    at = np.array([getattr(cost.calibration, name) for name in PARAMETERS])
    return Breakdown(at, ttft, tpot, *sums)


def _frontend_s(simulation: Simulation) -> Floats:
    """Seconds each request spent in front ends, one tokenising after the other in each."""
    spec, requests = simulation.spec, simulation.requests
    free_s = [0.0] * spec.num_frontends
    waits = []
    pairs = zip(requests.arrival_s.tolist(), requests.prompt_tokens.tolist(), strict=True)
    for index, (arrival_s, tokens) in enumerate(pairs):
        turn = index % spec.num_frontends
        free_s[turn] = max(free_s[turn], arrival_s) + spec.frontend_s_per_token * tokens
        waits.append(free_s[turn] - arrival_s + spec.frontend_s)
    return np.array(waits)


def _overlap(steps: StepTable, group: NDArray[np.int64], begin_s: Floats, end_s: Floats, weights: Floats) -> Floats:
    """Weighted seconds that each step shares with the spans from `begin_s` to `end_s` of the requests of its group."""
    shared_s = np.zeros(len(steps))
    for index in np.unique(steps.group):
        own, sent = steps.group == index, group == index
        start_s, step_s = steps.start_s[own], steps.step_s[own]
        shared_s[own] = _overlap_of(start_s, start_s + step_s, begin_s[sent], end_s[sent], weights[sent])
    return shared_s


def _overlap_of(from_s: Floats, to_s: Floats, begin_s: Floats, end_s: Floats, weights: Floats) -> Floats:
    times = np.concatenate([begin_s, end_s])
    order = np.argsort(times, kind="stable")
    times, signed = times[order], np.concatenate([weights, -weights])[order]
    active = np.concatenate([[0.0], np.cumsum(signed)])
    moment = np.concatenate([[0.0], np.cumsum(signed * times)])

    def until(moments: Floats) -> Floats:
        place = np.searchsorted(times, moments, side="right")
        return np.asarray(active[place] * moments - moment[place])

    return np.maximum(until(to_s) - until(from_s), 0.0)


def _terms(steps: StepTable, cost: StepCost) -> tuple[dict[str, Floats], Floats, NDArray[np.int64]]:
    """Seconds by operation of every kind of step, those that `prompts` does not multiply, and the kind of each step."""
    ranks = cost.layout.attention_dp
    seqs = np.round(steps.decode_seqs / ranks)
    context = steps.context_tokens / np.maximum(steps.decode_seqs, 1)
    octave = np.round(np.log2(np.maximum(context, 1.0)) * _CONTEXT_STEPS)
    keys = np.stack([np.round(steps.prefill_tokens / ranks, -1), seqs, octave], axis=1)
    kinds, which = np.unique(keys, axis=0, return_inverse=True)
    chunk, batch, length = kinds.T.copy()
    length = 2.0 ** (length / _CONTEXT_STEPS)
    terms: dict[str, Floats] = {}
    has_prompt, has_decode = chunk > 0, batch > 0
    one, unscaled_s = np.ones(len(kinds)), np.zeros(len(kinds))
    for chosen in (has_prompt & has_decode, has_prompt & ~has_decode, ~has_prompt):
        if not chosen.any():
            continue
        tokens, running, each = np.maximum(chunk[chosen], 1), np.maximum(batch[chosen], 1), length[chosen]
        if not has_prompt[chosen][0]:
            step = cost.decode(running, each)
        elif has_decode[chosen][0]:
            step = cost.mixed(tokens, 0 * tokens, ranks * one[chosen], running, each)
        else:
            step = cost.prefill(tokens)
        for label, seconds in step.terms.items():
            terms.setdefault(label, np.zeros(len(kinds)))[chosen] += seconds
            if label in _UNSCALED:
                unscaled_s[chosen] += seconds
        if has_prompt[chosen][0] and has_decode[chosen][0]:
            mixers = np.sum(list(cost.decode_table.terms.values()), axis=0)
            unscaled_s[chosen] += bilinear(running, each, mixers)
    return terms, unscaled_s, which.ravel()


def _slopes(seconds: Mapping[str, Floats], times: Floats, steps: StepTable, cost: StepCost) -> dict[str, float]:
    """Slope by parameter, front end and `prompts` apart: `seconds` by operation [steps], `times` each step counts."""
    has_prompt = steps.prefill_tokens > 0
    layers = cost.model.num_layers
    found = dict.fromkeys(PARAMETERS, 0.0)
    for label, values in seconds.items():
        if label in CLASS_OF:
            found[CLASS_OF[label]] += float(values.sum()) / cost.calibration.factor(label)
    found["step_s"] = float(times.sum())
    found["layer_s"] = layers * float(times[~has_prompt].sum() + cost.calibration.prompts * times[has_prompt].sum())
    found["prompt_layer_s"] = layers * float(times[has_prompt].sum())
    found["sequence_s"] = float((times * (steps.decode_seqs / cost.layout.attention_dp + has_prompt)).sum())
    return found
