"""A plausible shape for a model of which only total and active parameters are known.

Every layer is alike: grouped-query attention with heads of 128 and experts (or a dense MLP) with three
matrices. Hidden width and depth are searched so that both totals are met and hidden / layers stays near 100,
where published models lie (Llama-2-70B 102, DeepSeek-V3 117, Mixtral-8x7B 128; their config.json).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from planner.errors import ModelConfigError

HEAD_DIM = 128
NUM_KV_HEADS = 8
DEFAULT_VOCAB = 131_072
ASPECT = 100.0
DENSE_RATIO = 3.5
"""Inner width over hidden of dense layers (Llama-3: 3.5)."""
EXPERT_RATIO = 0.5
"""Inner width over hidden of experts: Mixtral 3.5, gpt-oss 1.0, Qwen3 0.375, DeepSeek-V3 0.29; the middle."""
TOLERANCE = 0.02
_ROUTING = ((8, 2), (16, 2), (16, 4), (32, 4), (64, 4), (64, 8), (128, 8), (256, 8), (384, 8))
"""Expert counts and top-k of published models, tried when the file names none."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Widths and counts of a model; None where they are to be found. `width` is the expert's or the MLP's."""

    hidden: int | None = None
    num_layers: int | None = None
    vocab: int | None = None
    num_experts: int | None = None
    top_k: int | None = None
    width: int = 0
    tied: bool = False
    num_heads: int = 0
    num_kv_heads: int = NUM_KV_HEADS
    head_dim: int = HEAD_DIM

    def params(self) -> tuple[int, int]:
        """Total and active parameters, embeddings included."""
        hidden, layers, vocab = self.hidden or 0, self.num_layers or 0, self.vocab or 0
        experts, top_k = self.num_experts or 1, self.top_k or 1
        attention = 2 * hidden * self.head_dim * (self.num_heads + self.num_kv_heads)
        fixed = attention + 2 * hidden + (hidden * experts if self.num_experts else 0)
        outer = vocab * hidden * (1 if self.tied else 2) + hidden
        one = 3 * hidden * self.width
        return outer + layers * (fixed + experts * one), outer + layers * (fixed + top_k * one)


def solve(total_params: float, active_params: float, given: Shape) -> tuple[Shape, tuple[str, ...]]:
    """Shape with `total_params` and `active_params` within 2 %, keeping what `given` fixes, and notes about it.

    Raises `ModelConfigError` when no shape of the family has those totals.
    """
    given = replace(given, vocab=given.vocab or DEFAULT_VOCAB)
    best: tuple[float, Shape] | None = None
    for routed in _routings(total_params, active_params, given):
        for shape in _candidates(total_params, active_params, routed):
            score = _score(shape, total_params, active_params)
            if best is None or score < best[0]:
                best = (score, shape)
    if best is None or max(_errors(best[1], total_params, active_params)) > TOLERANCE:
        raise ModelConfigError(_no_shape(total_params, active_params, given))
    return best[1], _notes(best[1], total_params, active_params)


def _routings(total: float, active: float, given: Shape) -> Iterator[Shape]:
    if given.num_experts is not None or total == active:
        yield given
        return
    for experts, top_k in _ROUTING:
        yield replace(given, num_experts=experts, top_k=top_k)


def _candidates(total: float, active: float, given: Shape) -> Iterator[Shape]:
    """Shapes over hidden widths in steps of 128 whose depth and width follow from the totals."""
    experts, top_k = given.num_experts, given.top_k
    vocab = given.vocab or DEFAULT_VOCAB
    per_expert = (total - active) / (experts - top_k) if experts and top_k and experts > top_k else 0.0
    for hidden in [given.hidden] if given.hidden else range(512, 32_769, 128):
        heads = max(1, hidden // HEAD_DIM)
        base = replace(given, hidden=hidden, num_heads=heads, num_kv_heads=math.gcd(heads, NUM_KV_HEADS))
        outer = vocab * hidden * (1 if given.tied else 2)
        attention = 2 * hidden * HEAD_DIM * (heads + base.num_kv_heads) + hidden * (experts or 0)
        if per_expert:
            depth = (active - outer - (top_k or 0) * per_expert) / attention
        else:
            depth = (total - outer) / (attention + 3 * hidden * DENSE_RATIO * hidden)
        for layers in [given.num_layers] if given.num_layers else {math.floor(depth), math.ceil(depth)}:
            if not 1 <= layers <= 1000:
                continue
            one = per_expert / layers if per_expert else (total - outer) / layers - attention
            if given.num_experts and not per_expert:
                one /= given.num_experts
            width = _rounded(one / (3 * hidden))
            if width > 0:
                yield replace(base, num_layers=layers, width=width)


def _rounded(width: float) -> int:
    """`width` as a multiple of 16, or of less where that would move it by more than 1 %."""
    step = max(1, min(16, int(width / 64)))
    return round(width / step) * step


def _errors(shape: Shape, total: float, active: float) -> tuple[float, float]:
    found_total, found_active = shape.params()
    return abs(found_total / total - 1), abs(found_active / active - 1)


def _score(shape: Shape, total: float, active: float) -> float:
    """Distance from the usual depth, KV heads and inner width, with errors of the totals weighing far more."""
    aspect = abs(math.log((shape.hidden or 1) / (shape.num_layers or 1) / ASPECT))
    heads = 0.3 * math.log2(NUM_KV_HEADS / shape.num_kv_heads)
    ratio = EXPERT_RATIO if shape.num_experts else DENSE_RATIO
    width = 0.2 * abs(math.log2(shape.width / (shape.hidden or 1) / ratio))
    return aspect + heads + width + 30.0 * max(_errors(shape, total, active))


def _no_shape(total: float, active: float, given: Shape) -> str:
    routing = f" with {given.num_experts} experts top-{given.top_k}" if given.num_experts else ""
    return (
        f"no shape has {total:.4g} parameters of which {active:.4g} are active{routing}; raise active_params, "
        "lower experts.top_k, raise experts.num, or give hidden, num_layers and widths"
    )


def _notes(shape: Shape, total: float, active: float) -> tuple[str, ...]:
    found_total, found_active = shape.params()
    ffn = f"{shape.num_experts} experts top-{shape.top_k} of width" if shape.num_experts else "dense MLP of width"
    return (
        f"assumed shape: {shape.num_layers} layers of hidden {shape.hidden}, {shape.num_heads} heads of "
        f"{shape.head_dim} with {shape.num_kv_heads} KV heads, {ffn} {shape.width}, vocabulary {shape.vocab}",
        f"assumed shape has {found_total:.4g} parameters ({100 * (found_total / total - 1):+.2f} % of the stated "
        f"total) and {found_active:.4g} active ({100 * (found_active / active - 1):+.2f} %)",
    )
