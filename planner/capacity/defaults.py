"""Which published models were made to drop tokens, with their factors, and what drops would mean for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.capacity.limit import CapacityLimit
from planner.model import ModelConfig, Moe


@dataclass(frozen=True, slots=True)
class Published:
    """Capacity of a model family as published.

    `limit` applies when it serves, None where every token is served then. `trained_factor` is the training factor per
    pick (slots over the even share), None where the paper gives none.
    """

    limit: CapacityLimit | None
    trained_factor: float | None
    source: str


@dataclass(frozen=True, slots=True)
class Caution:
    """Why a limit is doubtful for a model: `red` is outside what it was trained for, `amber` tighter than trained."""

    level: Literal["red", "amber"]
    text: str


QUALITY_NOTE = (
    "Published effect of the training factor, a risk indicator and no prediction: after 100k steps Switch-Base reaches "
    "a negative log perplexity of -1.554, -1.553 and -1.561 at factors 2.0, 1.25 and 1.0, top-2 MoE-Base -1.547, "
    "-1.559 and -1.572 (Switch Transformers, arXiv 2101.03961, Table 1)."
)
"""What is published about quality under capacity limits (handbook serving 4.4)."""

_SWITCH = Published(
    CapacityLimit("mesh-tf", 2.0, group_tokens=1024),
    1.25,
    "Mesh-TensorFlow defaults: factor 1.25 in training, 2.0 in evaluation, groups of 1,024 tokens (moe.py); "
    "arXiv 2101.03961 trains at 1.0 to 2.0. The expert_capacity 64 of the Hugging Face config is that port's own cap",
)
_GSHARD = Published(
    CapacityLimit("lingvo", 2.0),
    1.0,
    "GShard, arXiv 2006.16668: 2N/(G E) slots per expert for top-2 routing",
)
_GLAM = Published(
    CapacityLimit("lingvo", 2.0),
    1.0,
    "GLaM, arXiv 2112.06905, routes with GShard's top-2 gating and publishes no factor of its own: 2N/(G E)",
)
_ARCTIC = Published(
    None,
    1.0,
    "config.json: moe_train_capacity_factor 1, moe_token_dropping true; serving engines route it without drops",
)


def published(model: ModelConfig) -> Published | None:
    """Published capacity of `model`, None for dropless families. A model TOML may set its own factor."""
    name, moe = f"{model.architecture} {model.name}".lower(), routed(model)
    if moe is None:
        return None
    if "switch" in name:
        return _SWITCH
    if "nllb" in name:
        return _nllb(moe)
    for family, entry in (("glam", _GLAM), ("gshard", _GSHARD), ("arctic", _ARCTIC)):
        if family in name:
            return entry
    if moe.capacity_factor is None:
        return None
    # A TOML's factor counts slots over the even share of all picks; Mesh-TensorFlow counts them over tokens.
    own = CapacityLimit("mesh-tf", moe.capacity_factor * moe.top_k)
    return Published(own, moe.capacity_factor, f"capacity_factor of {model.source}")


def default_limit(model: ModelConfig) -> CapacityLimit | None:
    """The limit `model` is served with unless the user says otherwise; None serves every token."""
    found = published(model)
    return None if found is None else found.limit


def caution(model: ModelConfig, limit: CapacityLimit | None) -> Caution | None:
    """What to tell a user who serves `model` under `limit`; None where the model was made for it."""
    moe = routed(model)
    if limit is None or moe is None or limit.factor == 0:
        return None
    known = published(model)
    if known is None:
        return Caution(
            "red",
            f"{model.name} was published to serve every token; under a capacity limit it meets dropped tokens it never "
            "saw. vLLM, SGLang and TensorRT-LLM never drop: there a limit is a buffer",
        )
    trained, factor = known.trained_factor, per_pick(limit, moe.top_k)
    if trained is not None and factor < trained:
        return Caution(
            "amber",
            f"{factor:g} slots per even share is tighter than the {trained:g} {model.name} was trained with "
            f"({known.source})",
        )
    return None


def per_pick(limit: CapacityLimit, top_k: int) -> float:
    """Slots over the even share of all picks, whichever way the rule counts its factor."""
    factor = abs(limit.factor)
    return factor if limit.rule_for(top_k).factor_per_pick else factor / top_k


def routed(model: ModelConfig) -> Moe | None:
    """The first block of routed experts of `model`, None for a dense model."""
    return next((layer.moe for layer in model.layers if layer.moe is not None), None)


def _nllb(moe: Moe) -> Published:
    # The config gives the share of all tokens an expert takes at evaluation; 1.0 means that no token is ever lost.
    factor = 1.0 if moe.capacity_factor is None else moe.capacity_factor
    return Published(
        CapacityLimit("nllb", factor),
        1.0,
        "NLLB-MoE config.json: moe_eval_capacity_token_fraction of all tokens per expert; "
        "2 ceil(tokens / experts) in training (transformers modeling_nllb_moe.py)",
    )
