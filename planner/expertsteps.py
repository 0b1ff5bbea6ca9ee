"""What the router did in the steps of a run: the cached draws that the steps used, as columns and as means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.loads import KNOTS, NUM_DRAWS, LoadTable, on_knots
from planner.records import StepTable

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertSteps:
    """Mean over MoE layers for every step; each column is [num_steps].

    `max_over_mean` is the load served by the busiest rank over the even share of all assignments, `active_experts` the
    most experts of a rank whose weights are read, `drop_rate` the share of assignments beyond capacity,
    `fully_dropped_rate` the share of tokens that lost all of theirs, `slot_utilisation` the used share of the slots of
    a capacity limit. `hit_rate` is the share of needed experts found in HBM, `miss_bytes` what the step fetched of the
    others, `cpu_bytes` what the CPU read of them to compute them itself (all layers). `worst_layer_drop_rate` is one
    number: the layer that drops most, over all steps.
    """

    max_over_mean: Floats
    active_experts: Floats
    drop_rate: Floats
    fully_dropped_rate: Floats
    slot_utilisation: Floats
    hit_rate: Floats
    miss_bytes: Floats
    cpu_bytes: Floats
    worst_layer_drop_rate: float

    def columns(self) -> dict[str, Floats]:
        """The columns by name."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "worst_layer_drop_rate"}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the steps of one phase lie in tables [epochs, knots, draws]: between two knots, in the same draw."""

    epoch: Ints
    low: Ints
    share: Floats
    draw: Ints

    def read(self, table: Floats) -> Floats:
        """`table` at the steps, linear between the knots."""
        below, above = table[self.epoch, self.low, self.draw], table[self.epoch, self.low + 1, self.draw]
        return np.asarray(below + (above - below) * self.share)


def tokens_of(steps: StepTable, tokens_per_seq: int) -> StepTable:
    """`steps` with decoding sequences counted as the tokens they send to the router, `tokens_per_seq` each."""
    return steps if tokens_per_seq == 1 else replace(steps, decode_seqs=steps.decode_seqs * tokens_per_seq)


def expert_steps(
    loads: Sequence[Mapping[str, LoadTable]],
    misses: Mapping[str, Mapping[str, Floats]],
    steps: StepTable,
    encoder_share: float = 0.0,
) -> ExpertSteps:
    """Columns for `steps`, whose draws count through the epochs of `loads` (each prefill and decode).

    `misses` are those of `planner.routedcost.RoutedCost.misses`, empty where all experts are in HBM. With an encoder,
    prompts pass its share of the MoE layers and generated tokens the others; without, all layers see both.
    """
    has_prompt = steps.prefill_tokens > 0
    epoch, draw = np.divmod(steps.draw, NUM_DRAWS)
    prompt = _place(steps.prefill_tokens + (0 if encoder_share else steps.decode_seqs), epoch, draw)
    decode = _place(steps.decode_seqs, epoch, draw)
    weight = has_prompt.astype(float)
    if encoder_share:
        parts = encoder_share * has_prompt, (1 - encoder_share) * (steps.decode_seqs > 0)
        weight = parts[0] / np.maximum(parts[0] + parts[1], 1e-12)
    columns = {}
    for name in _summary(loads[0]["decode"]):
        tables = {p: np.array([_summary(e[p])[name] for e in loads]) for p in ("decode", "prefill")}
        columns[name] = weight * prompt.read(tables["prefill"]) + (1 - weight) * decode.read(tables["decode"])
    columns |= {"hit_rate": np.ones(len(steps)), "miss_bytes": np.zeros(len(steps)), "cpu_bytes": np.zeros(len(steps))}
    if misses:
        still = np.zeros_like(epoch)
        for name in ("hit_rate", "miss_bytes", "cpu_bytes"):
            in_prompt = replace(prompt, epoch=still).read(misses["prefill"][name][None])
            in_decode = replace(decode, epoch=still).read(misses["decode"][name][None])
            columns[name] = weight * in_prompt + (1 - weight) * in_decode
    return ExpertSteps(**columns, worst_layer_drop_rate=_worst_layer(loads[0], prompt, decode, has_prompt))


def _worst_layer(
    loads: Mapping[str, LoadTable], prompt: _Place, decode: _Place, has_prompt: NDArray[np.bool_]
) -> float:
    """Drop rate of the layer that drops most, averaged over the sizes of the steps."""
    by_layer = np.zeros(loads["decode"].drop_rate.shape[2])
    for phase, place, rows in (("prefill", prompt, has_prompt), ("decode", decode, ~has_prompt)):
        table = on_knots(loads[phase].drop_rate.mean(axis=1), loads[phase].question.knots)
        by_layer += np.bincount(place.low[rows], minlength=len(KNOTS)) @ table
    return float(by_layer.max() / max(len(has_prompt), 1))


def _place(tokens: Ints, epoch: Ints, draw: Ints) -> _Place:
    position = np.interp(np.log(np.maximum(tokens, 1)), np.log(KNOTS), np.arange(len(KNOTS)))
    low = np.minimum(position.astype(np.int64), len(KNOTS) - 2)
    return _Place(epoch, low, position - low, draw)


def _summary(table: LoadTable) -> dict[str, Floats]:
    """Layer means [KNOTS, draws]."""
    question = table.question
    even = np.array(question.knots, dtype=float)[:, None] * question.selection.top_k / question.num_ranks
    found = {
        "max_over_mean": table.max_load.mean(axis=-1) / even,
        "active_experts": table.max_active.mean(axis=-1),
        "drop_rate": table.drop_rate.mean(axis=-1),
        "fully_dropped_rate": table.fully_dropped_rate.mean(axis=-1),
        "slot_utilisation": table.slot_utilisation.mean(axis=-1),
    }
    return {name: on_knots(values, question.knots) for name, values in found.items()}
