"""Speculative decoding: how many tokens a step yields, who drafts them, and what the drafter holds in memory.

A drafter proposes n tokens, the model verifies them with its own next token in one pass of n + 1 tokens per sequence,
and the sequence advances by the accepted ones and one more. With acceptance a_i of position i, given that the ones
before it were accepted, a step yields 1 + a_1 + a_1 a_2 + ... tokens; (1 - a^(n+1)) / (1 - a) for a constant a
(handbook serving 2.8).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul
from typing import Literal

import numpy as np

from planner.errors import InputError
from planner.layout import Layout, layout_problem
from planner.model import ModelConfig, load
from planner.model.config import Attention, DenseFfn, Layer
from planner.model.precision import override
from planner.units import whole_number

Method = Literal["mtp", "draft", "ngram"]
MAX_DRAFTS = 16
_FORMS = "mtp:1, draft:MODEL:4 or ngram:3"
_MTP_LENGTHS = {
    1: (1.85, "DeepSeek-V3 report: 85-90 % of second tokens accepted, the lower end"),
    2: (2.18, "SGLang, DeepSeek-V3, window of 3 tokens: 2.18 accepted (lmsys.org blog 2025-07-17)"),
    3: (2.44, "SGLang, DeepSeek-V3, window of 4 tokens: 2.44 accepted (lmsys.org blog 2025-07-17)"),
}
"""Published tokens per step of MTP by number of drafts. SGLang's window counts the token that is not drafted."""
_WALK_STEPS = 1 << 16


@dataclass(frozen=True, slots=True)
class Speculation:
    """`acceptance[i]` is the chance that draft i is accepted when all before it were; `source` says who measured it.

    `is_assumed` marks acceptance that the user did not give. `draft` is the drafter as a model: the MTP module as a
    model of one layer, a draft model, or None for n-gram look-up, which costs no GPU time.
    """

    method: Method
    acceptance: tuple[float, ...]
    source: str
    is_assumed: bool = False
    draft: ModelConfig | None = None

    @property
    def num_drafts(self) -> int:
        """Tokens drafted per step and sequence."""
        return len(self.acceptance)

    @property
    def query_tokens(self) -> int:
        """Tokens of a sequence that the model verifies in one step: the drafts and its own next token."""
        return self.num_drafts + 1

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens by which a sequence advances in one step.

        >>> round(Speculation("ngram", (0.85,), "").tokens_per_step, 3)
        1.85
        >>> round(Speculation("ngram", (0.8,) * 3, "").tokens_per_step, 3)
        2.952
        """
        return expected_tokens(self.acceptance)

    def __str__(self) -> str:
        named = f"draft {self.draft.name}" if self.method == "draft" and self.draft else self.method.upper()
        return f"{named} x{self.num_drafts}"

    def draft_layout(self, layout: Layout) -> Layout:
        """How the drafter is cut: over the GPUs of `layout`, on its last pipeline stage.

        A draft model follows the attention of `layout`; its experts, if any, are cut by width unless EP divides them.
        """
        if self.method == "mtp" or self.draft is None:
            return replace(layout, pp=1)
        moe, stage = self.draft.moe, layout.stage_gpus
        ep = layout.ep if moe is not None and moe.num_experts % layout.ep == 0 else 1
        return replace(layout, pp=1, ep=ep, moe_tp=stage // ep, redundant_experts=0)

    def problem(self, layout: Layout) -> str | None:
        """Why the drafter cannot be cut as `layout` asks, None when it can."""
        if self.method != "draft" or self.draft is None:
            return None
        problem = layout_problem(self.draft, self.draft_layout(layout))
        return f"{self.draft.name} cannot draft on {layout}: {problem}" if problem else None

    def serving(self, model: ModelConfig) -> Speculation:
        """This for a variant of the model with other precisions: its MTP module, or a cache of its KV format."""
        if self.draft is None or self.draft.kv_format == model.kv_format:
            return self
        if self.method == "mtp":
            return replace(self, draft=mtp_model(model))
        return replace(self, draft=override(self.draft, kv=model.kv_format))


def expected_tokens(acceptance: Sequence[float]) -> float:
    """Mean tokens per step: 1 plus the chance of reaching every position."""
    return 1.0 + math.fsum(accumulate(acceptance, mul))


def constant_acceptance(tokens_per_step: float, num_drafts: int) -> float:
    """The acceptance, equal at every position, with which `num_drafts` drafts yield `tokens_per_step`; bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens([middle] * num_drafts) < tokens_per_step else (low, middle)
    return low


def parse_speculation(text: str | None, acceptance: str | None, model: ModelConfig) -> Speculation | None:
    """Speculation for `model` from `--speculative` (`mtp:1`, `draft:MODEL:4`, `ngram:3`) and `--acceptance`.

    Raises InputError on another form, on MTP of a model without such a module, on an acceptance outside [0, 1] or of
    the wrong length, and where none is given and none is published.
    """
    if text is None:
        if acceptance is not None:
            raise InputError(f"--acceptance {acceptance} needs --speculative, such as mtp:1")
        return None
    method, _, rest = text.partition(":")
    name, _, number = rest.rpartition(":") if method == "draft" else ("", "", rest)
    count = whole_number(number)
    if method not in ("mtp", "draft", "ngram") or count is None or (method == "draft" and not name):
        raise InputError(f"--speculative {text}: give who drafts and how many tokens, such as {_FORMS}")
    if not 1 <= count <= MAX_DRAFTS:
        raise InputError(f"--speculative {text}: {count} drafts; 1 to {MAX_DRAFTS} can be drafted per step")
    given = None if acceptance is None else _acceptance(acceptance, count)
    if method == "mtp":
        chances, source = (given, "given") if given else _published(count)
        return Speculation("mtp", chances, source, given is None, mtp_model(model))
    if given is None:
        raise InputError(
            f"--speculative {text} needs --acceptance, such as 0.7 or {','.join(['0.7'] * count)}: how often drafts of "
            "this kind are right depends on models and texts, and no number is published that would do for all"
        )
    if method == "ngram":
        return Speculation("ngram", given, "given")
    draft = load(name)
    if draft.vocab != model.vocab and abs(draft.vocab - model.vocab) > 0.01 * model.vocab:
        raise InputError(
            f"--speculative {text}: {draft.name} has {draft.vocab:,} tokens and {model.name} {model.vocab:,}; a draft "
            "model must share the tokenizer. Choose one of the same family."
        )
    return Speculation("draft", given, "given", False, draft)


def _acceptance(text: str, count: int) -> tuple[float, ...]:
    try:
        values = [float(item) for item in text.split(",")]
    except ValueError:
        raise InputError(f"--acceptance {text}: one share such as 0.85, or one per draft such as 0.85,0.7") from None
    if any(not 0.0 <= value <= 1.0 for value in values):
        raise InputError(f"--acceptance {text}: shares of accepted drafts lie in [0, 1], such as 0.85")
    if len(values) not in (1, count):
        raise InputError(f"--acceptance {text}: {len(values)} shares for {count} drafts; give 1 or {count}")
    return tuple(values if len(values) == count else values * count)


def _published(count: int) -> tuple[tuple[float, ...], str]:
    """Published acceptance of MTP; beyond the longest window, that of the longest at every position."""
    known = min(count, max(_MTP_LENGTHS))
    length, source = _MTP_LENGTHS[known]
    constant = round(constant_acceptance(length, known), 4)
    return (constant,) * count, source if count == known else f"{source}, held for later drafts too"


def mtp_model(model: ModelConfig) -> ModelConfig:
    """The multi-token-prediction module of `model` as a model of one layer that shares embedding and head.

    Engines load the checkpoint's module once and run it n times for n drafts (vLLM `v1/spec_decode`, sglang PR 3582).
    Its KV cache is one layer. Raises InputError where the checkpoint has none.
    """
    if not model.mtp:
        raise InputError(
            f"--speculative mtp: {model.name} has no multi-token-prediction layer (num_nextn_predict_layers). "
            "Use a draft model (draft:MODEL:4) or ngram:3."
        )
    modules = max(1, sum(weight.name.endswith("eh_proj") for weight in model.mtp))
    weights = model.mtp[: len(model.mtp) // modules]
    own = tuple(weight for weight in weights if weight.part not in ("embedding", "lm_head"))
    attentions = [m for layer in model.layers for m in layer.mixers if isinstance(m, Attention) and not m.is_cross]
    # Of a model with compressed or windowed layers, the module attends like the last plain one.
    plain = [m for m in attentions if m.compress_ratio == 1] or attentions
    has_experts = any(weight.shard == "expert" for weight in own)
    layer = Layer(
        mixers=(plain[-1],) if any(weight.part == "attention" for weight in own) else (),
        ffns=(model.moe,) if has_experts and model.moe else (DenseFfn(0),),
        weights=own,
    )
    return replace(
        model,
        name=f"{model.name} MTP",
        layers=(layer,),
        weights=tuple(w for w in model.weights if w.part in ("embedding", "lm_head")),
        mtp=(),
        router_bias_buffers=model.mtp_router_bias_buffers // modules,
        mtp_router_bias_buffers=0,
    )


class AcceptanceWalk:
    """Seeded independent steps of accepted tokens, of which requests take successive stretches.

    The steps to produce some tokens are a search in the cumulated tokens: no work per step, none per token.
    """

    __slots__ = ("_acceptance", "_at", "_cumulated", "_rng")

    def __init__(self, acceptance: Sequence[float], seed: int | Sequence[int]) -> None:
        self._acceptance = np.cumprod(np.asarray(acceptance, dtype=float))
        self._rng = np.random.default_rng(seed)
        self._cumulated: list[int] = [0]
        self._at = 0

    def steps(self, tokens: int) -> int:
        """Steps that the next request needs to produce `tokens`; what the last one yields beyond them is dropped."""
        cumulated = self._cumulated
        while cumulated[-1] - cumulated[self._at] < tokens:
            cumulated = self._extend()
        start = self._at
        self._at = bisect_left(cumulated, cumulated[start] + tokens, start + 1)
        return self._at - start

    def _extend(self) -> list[int]:
        """Forget the steps that were taken and draw as many again, or more."""
        left = self._cumulated[self._at :]
        reached = self._rng.random(_WALK_STEPS)[:, None] < self._acceptance
        drawn = left[-1] + np.cumsum(1 + reached.sum(axis=1))
        self._cumulated, self._at = left + drawn.tolist(), 0
        return self._cumulated
