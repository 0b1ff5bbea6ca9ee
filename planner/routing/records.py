"""Recorded routing: which experts real tokens went to, as counts per layer or token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import WorkloadError
from planner.routing.experts import Floats

Ids = NDArray[np.unsignedinteger[Any]]
Ints = NDArray[np.int64]
MAX_COUNT = 2.0**53
"""Assignments of one expert up to which whole numbers are exact; a year of 1e8 tokens/s is less."""
MAX_EXPERTS = 65536
"""Expert ids are kept in at most two bytes; the largest published model has 2,048 experts (Switch-C)."""


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """Assignments of tokens to experts in the MoE layers of one model.

    An assignment is one token-expert pair, so a token of a top-k layer makes k of them. Build it with
    `record_from_counts` or `record_from_ids`, which check their input.

    Attributes
    ----------
    counts
        [layers, experts], assignments.
    layers
        [layers], number of each layer in the model, counted from 0.
    source
        File, group or task it came from.
    top_k
        Experts per token, None where counts alone do not tell.
    expert_ids
        [layers, tokens, top_k], experts of each token in time order within a sequence; None for counts alone.
    sequence_lengths
        [sequences], tokens of each request, summing to the tokens of `expert_ids`; None where unknown.
    windows
        [windows, layers, experts], assignments of successive stretches of time; None where unknown.
    """

    counts: Floats
    layers: Ints
    source: str
    top_k: int | None = None
    expert_ids: Ids | None = None
    sequence_lengths: Ints | None = None
    windows: Floats | None = None

    @property
    def num_layers(self) -> int:
        """Recorded MoE layers."""
        return int(self.counts.shape[0])

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer."""
        return int(self.counts.shape[1])

    @property
    def num_tokens(self) -> float | None:
        """Tokens behind the counts (mean over layers), None without `top_k`."""
        return None if self.top_k is None else float(self.counts.sum(axis=1).mean() / self.top_k)


def record_from_counts(
    counts: ArrayLike,
    source: str,
    layers: ArrayLike | None = None,
    top_k: int | None = None,
    windows: Floats | None = None,
) -> Record:
    """Record of `counts` [layers, experts]; raises WorkloadError on NaN, negative or missing assignments."""
    found = np.asarray(counts, dtype=float)
    if found.ndim != 2 or not found.size:
        raise WorkloadError(
            f"{source}: counts of shape {found.shape}; give [layers, experts] with at least one of each"
        )
    numbers = np.arange(found.shape[0]) if layers is None else np.asarray(layers, dtype=np.int64)
    if numbers.shape != (found.shape[0],) or len(set(numbers.tolist())) < numbers.size or numbers.min() < 0:
        raise WorkloadError(
            f"{source}: layer numbers {numbers.tolist()} for {found.shape[0]} rows of counts; "
            "number every row once, from 0 on"
        )
    wrong = np.argwhere(~((found >= 0) & (found <= MAX_COUNT)))
    if wrong.size:
        layer, expert = wrong[0]
        raise WorkloadError(
            f"{source}: layer {numbers[layer]}, expert {expert}: {found[layer, expert]:g} assignments; "
            f"a count is a number from 0 to {MAX_COUNT:.1e}"
        )
    idle = np.flatnonzero(found.sum(axis=1) == 0)
    if idle.size:
        raise WorkloadError(f"{source}: layer {numbers[idle[0]]} has no assignments; leave out layers without experts")
    return Record(found, numbers, source, top_k, windows=windows)


def record_from_ids(
    expert_ids: ArrayLike,
    num_experts: int,
    source: str,
    layers: ArrayLike | None = None,
    sequence_lengths: ArrayLike | None = None,
) -> Record:
    """Record of `expert_ids` [layers, tokens, top_k].

    Raises WorkloadError on a wrong shape, an id outside 0..num_experts - 1, an expert that one token takes twice,
    and sequence lengths that do not sum to the tokens.
    """
    ids = np.asarray(expert_ids)
    if ids.ndim != 3 or not ids.size or ids.dtype.kind not in "iu":
        raise WorkloadError(
            f"{source}: expert ids of shape {ids.shape} and type {ids.dtype}; give integers [layers, tokens, top_k]"
        )
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise WorkloadError(f"{source}: {num_experts} experts; this reads 1 to {MAX_EXPERTS}")
    if int(ids.min()) < 0 or int(ids.max()) >= num_experts:
        wrong = int(ids.min()) if int(ids.min()) < 0 else int(ids.max())
        raise WorkloadError(
            f"{source}: expert {wrong} of a model with {num_experts} experts (0 to {num_experts - 1}); "
            "name the model that made the record, or export logical ids without fused shared experts"
        )
    small: Ids = ids.astype(np.uint8 if num_experts <= 256 else np.uint16)
    _check_distinct(small, source)
    lengths = None if sequence_lengths is None else _lengths(sequence_lengths, small.shape[1], source)
    counts = np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in small])
    plain = record_from_counts(counts, source, layers, small.shape[2])
    return Record(plain.counts, plain.layers, source, plain.top_k, small, lengths)


def mixture(records: Sequence[Record], source: str = "mixture") -> Record:
    """All tokens of `records` together, in their order; one record is returned as it is.

    Token ids and sequences are kept if every record has them. Raises WorkloadError unless the records have the
    same layers and experts.
    """
    if not records:
        raise WorkloadError("no routing record; name at least one file")
    first = records[0]
    for other in records[1:]:
        if other.num_experts != first.num_experts or other.layers.tolist() != first.layers.tolist():
            raise WorkloadError(
                f"{other.source} has {_shape(other)}, but {first.source} has {_shape(first)}; "
                "mix records of one model and the same layers"
            )
        if None not in (other.top_k, first.top_k) and other.top_k != first.top_k:
            raise WorkloadError(
                f"{other.source} has {other.top_k} experts per token, but {first.source} has {first.top_k}; "
                "mix records of one model"
            )
    if len(records) == 1:
        return first
    ids = [r.expert_ids for r in records if r.expert_ids is not None]
    lengths = [r.sequence_lengths for r in records if r.sequence_lengths is not None]
    return Record(
        np.sum([r.counts for r in records], axis=0),
        first.layers,
        source,
        next((r.top_k for r in records if r.top_k is not None), None),
        np.concatenate(ids, axis=1) if len(ids) == len(records) else None,
        np.concatenate(lengths) if len(lengths) == len(ids) == len(records) else None,
    )


def check_model(record: Record, num_experts: int, num_moe_layers: int, top_k: int, model: str = "the model") -> None:
    """Raise WorkloadError unless `record` can be of a model of that size; a record may leave layers out."""
    remedy = "name the model that made the record"
    if record.num_experts != num_experts:
        raise WorkloadError(
            f"{record.source} counts {record.num_experts} experts, but {model} has {num_experts}; {remedy}"
        )
    if record.num_layers > num_moe_layers:
        raise WorkloadError(
            f"{record.source} has {record.num_layers} MoE layers, but {model} has {num_moe_layers}; {remedy}"
        )
    if record.top_k is not None and record.top_k != top_k:
        raise WorkloadError(
            f"{record.source} has {record.top_k} experts per token, but {model} picks {top_k}; {remedy}"
        )
    share = record.counts / record.counts.sum(axis=1, keepdims=True)
    if share.max() > (1 + 1e-9) / top_k:
        layer, expert = np.unravel_index(int(share.argmax()), share.shape)
        raise WorkloadError(
            f"{record.source}: expert {expert} of layer {record.layers[layer]} has {share.max():.1%} of the "
            f"assignments; at top-{top_k} no expert of {model} can exceed {1 / top_k:.1%}. "
            f"If this is the file of one rank, give those of all ranks; otherwise {remedy}"
        )


def _shape(record: Record) -> str:
    return f"{record.num_layers} layers from {record.layers[0]} of {record.num_experts} experts"


def _check_distinct(ids: Ids, source: str) -> None:
    for layer, chosen in enumerate(ids):
        ordered = np.sort(chosen, axis=1)
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if twice.any():
            token = int(twice.argmax())
            raise WorkloadError(
                f"{source}: token {token} takes an expert twice in row {layer} ({chosen[token].tolist()}); "
                "check the order of the axes: [layers, tokens, top_k]"
            )


def _lengths(sequence_lengths: ArrayLike, num_tokens: int, source: str) -> Ints:
    lengths = np.asarray(sequence_lengths)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or lengths.min(initial=1) < 1 or lengths.sum() != num_tokens:
        raise WorkloadError(
            f"{source}: sequence lengths sum to {lengths.sum():g} for {num_tokens} tokens; "
            "give one positive length per sequence, together the number of tokens"
        )
    return lengths.astype(np.int64)
