"""Dense and mixture-of-experts feed-forward blocks and the norms around them."""

from __future__ import annotations

from planner.errors import ModelConfigError
from planner.model.blocks import Weights, matrix, vector
from planner.model.config import DenseFfn, Moe, Part


def dense(
    hidden: int, width: int, *, num_matrices: int = 3, bias: bool = False, prefix: str = "mlp", part: Part = "dense_ffn"
) -> tuple[DenseFfn, Weights]:
    """Dense feed-forward: gated (3 matrices, gate and up in one weight) or plain (2)."""
    return DenseFfn(width, num_matrices), _mlp(hidden, width, num_matrices, bias, prefix, part)


def _mlp(hidden: int, width: int, num_matrices: int, bias: bool, prefix: str, part: Part) -> Weights:
    fused = num_matrices - 1
    up = "gate_up_proj" if fused == 2 else "up_proj"
    return (
        *matrix(f"{prefix}.{up}", fused * width, hidden, part, "column", fused=fused, bias=bias),
        *matrix(f"{prefix}.down_proj", hidden, width, part, "row", bias=bias),
    )


def moe(
    hidden: int,
    block: Moe,
    *,
    prefix: str = "mlp",
    shared: str = "shared_experts",
    router: str = "gate",
    router_bias: bool = False,
    router_fmt: str | None = None,
    shared_gate: bool = False,
    expert_bias: bool = False,
    trained_correction: bool = False,
) -> tuple[Moe, Weights]:
    """Router, routed experts and shared experts of `block`.

    `shared_gate` is Qwen's sigmoid gate [hidden -> 1]; `trained_correction` counts the router's correction bias
    as a parameter (ERNIE, Ling), where other families keep it in a buffer.
    """
    if block.top_k > block.num_experts + block.identity_experts:
        raise ModelConfigError(
            f"top_k {block.top_k} exceeds the {block.num_experts} experts; lower num_experts_per_tok"
        )
    candidates = block.num_experts + block.identity_experts
    weights = matrix(f"{prefix}.{router}", candidates, hidden, "router", "replicated", bias=router_bias, fmt=router_fmt)
    if trained_correction:
        weights += (vector(f"{prefix}.{router}.e_score_correction_bias", candidates, "router", fmt="fp32"),)
    if block.expert_hidden != hidden:
        weights += matrix(f"{prefix}.fc1_latent_proj", block.expert_hidden, hidden, "dense_ffn", "replicated")
        weights += matrix(f"{prefix}.fc2_latent_proj", hidden, block.expert_hidden, "dense_ffn", "replicated")
    weights += _experts(block, f"{prefix}.experts", expert_bias)
    if block.shared_width:
        weights += _mlp(hidden, block.shared_width, block.num_matrices, False, f"{prefix}.{shared}", "shared_expert")
    if shared_gate:
        name = f"{prefix}.{shared}_gate"
        weights += matrix(name, 1, hidden, "shared_expert", "replicated", quantizable=False)
    return block, weights


def _experts(block: Moe, prefix: str, bias: bool) -> Weights:
    fused, count = block.num_matrices - 1, block.num_experts
    up = "gate_up_proj" if fused == 2 else "up_proj"
    rows, width = fused * block.expert_width, block.expert_hidden
    return (
        *matrix(f"{prefix}.{up}", rows, width, "expert", "expert", copies=count, fused=fused, bias=bias),
        *matrix(f"{prefix}.down_proj", width, block.expert_width, "expert", "expert", copies=count, bias=bias),
    )


def norms(hidden: int, count: int = 2, *, bias: bool = False) -> Weights:
    """`count` norms over the residual stream; `bias` for LayerNorm."""
    return (vector("norms", count * hidden * (2 if bias else 1), "norm"),)
