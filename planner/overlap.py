"""Exchange behind compute: two half batches that take turns, or shared experts under the dispatch.

A MoE layer is attention and all before the exchange, dispatch, experts, combine. Two half batches alternate on one
compute stream and one communication stream, in order: while one half is on the wire the other computes. Each half
costs what a batch of its size costs, and halving a batch does not halve compute: weights are read twice. That is why
the overlap loses with few tokens (handbook serving 1.2, 2.7).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from planner.engine import Engine
from planner.errors import InputError, nearest
from planner.hardware import Gpu
from planner.layout import Layout

Seconds = TypeVar("Seconds", float, Any)
Kind = Literal["tbo", "shared"]
_NAMES = {"tbo": "two-batch overlap", "shared": "shared experts under dispatch"}
_EXCHANGE_SMS = 20
"""SMs that DeepEP's normal kernels hold while they run; the low-latency ones hold none (handbook serving 2.7)."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """How an engine overlaps. A step is split when every rank has the tokens: the thresholds are per rank.

    `decode_tokens` is asked of ranks that only decode, `prefill_tokens` of those with prompts; whether ranks without
    tokens stand in the way says `idle_agrees`.
    """

    kind: Kind
    decode_tokens: int
    prefill_tokens: int
    idle_agrees: bool
    source: str

    @property
    def is_two_batch(self) -> bool:
        """Two half batches."""
        return self.kind == "tbo"

    def __str__(self) -> str:
        return _NAMES[self.kind]

    def check(self, layout: Layout, backend: str) -> None:
        """InputError unless `layout` has an exchange that can be overlapped."""
        if not self.applies(layout, backend):
            raise InputError(
                f"--overlap {self.kind}: {layout} over {backend} has no exchange to hide: engines overlap DeepEP only. "
                "Use --backend deepep with attention_dp and ep, such as attention_dp=8,ep=8."
            )

    @staticmethod
    def applies(layout: Layout, backend: str) -> bool:
        """True where tokens go to experts and back through DeepEP."""
        return backend == "deepep" and layout.attention_dp > 1 and layout.ep > 1


_ENGINES: dict[str, dict[Kind, tuple[int, int, bool, str]]] = {
    "vllm": {
        "tbo": (
            32,
            512,
            False,
            "vLLM --enable-dbo, thresholds 32 and 512 tokens, all ranks or none (docs/design/dbo.md)",
        ),
        "shared": (1, 1, True, "vLLM runs shared experts beside DeepEP's dispatch (handbook serving 1.2)"),
    },
    "sglang": {
        "tbo": (
            2,
            2,
            True,
            "SGLang --enable-two-batch-overlap splits every batch of two or more (handbook serving 2.7)",
        ),
        "shared": (1, 1, True, "SGLang runs shared experts beside DeepEP's dispatch (handbook serving 1.2)"),
    },
}
"""Least tokens of a rank that decodes and of one with prompts, whether idle ranks agree, and where that is written."""


def parse_overlap(text: str | None, engine: Engine) -> Overlap | None:
    """The overlap called `text` in `engine`; InputError on another name or an engine without it."""
    if text is None:
        return None
    if text not in get_args(Kind):
        raise InputError(f"--overlap {text}: {nearest(text, get_args(Kind))}")
    if engine.name not in _ENGINES:
        known = " or ".join(_ENGINES)
        raise InputError(f"--overlap {text}: {engine.name} does not offer it. Use --engine {known}.")
    kind: Kind = "tbo" if text == "tbo" else "shared"
    return Overlap(kind, *_ENGINES[engine.name][kind])


def compute_share(gpu: Gpu, phase: str) -> float:
    """Share of the SMs that compute keeps while tokens are on the wire: all of them in low-latency decode.

    InputError where the number of SMs is unknown.
    """
    if phase == "decode":
        return 1.0
    if gpu.num_sms is None:
        raise InputError(f"--overlap: gpu.num_sms of {gpu.name} is unknown. Add it to the profile with its source.")
    return (gpu.num_sms - _EXCHANGE_SMS) / gpu.num_sms


def two_batch_s(
    attention_s: Seconds,
    dispatch_s: Seconds,
    experts_s: Seconds,
    combine_s: Seconds,
    num_layers: int,
    kept: float = 1.0,
    most: Callable[[Seconds, Seconds], Seconds] = max,
) -> Seconds:
    """Seconds of `num_layers` MoE layers as two half batches; the arguments are those of one half and layer.

    With both streams in order, a layer passes through four stages, each as long as the longer of its two operations:
    dispatch beside the other half's attention, experts beside dispatch, combine beside experts, the next attention
    beside combine. The first attention and the last combine stand alone. So 2 (a + e) and 2 (d + c) per layer are
    lower bounds and their sum is an upper one. Compute runs at the share `kept` while tokens are on the wire.

    Floats, or arrays with `most` = np.maximum.

    >>> two_batch_s(2.0, 1.0, 3.0, 1.0, 10)
    101.0
    """
    lost = 1.0 - kept
    before, after = attention_s + lost * dispatch_s, experts_s + lost * dispatch_s
    stages = most(before, dispatch_s) + most(after, dispatch_s) + most(experts_s + lost * combine_s, combine_s)
    last = most(attention_s + lost * combine_s, combine_s)
    return attention_s + num_layers * stages + (num_layers - 1) * last + combine_s
