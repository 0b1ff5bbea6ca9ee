"""Which expert every token goes to, the same on every process.

Draws come from a counter-based generator keyed by (seed, rank), so each rank can compute the choices of all others
without sending them (handbook serving 6.9).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

SIGMA = 0.48
"""Log-normal sigma of expert popularity: middle of 0.38 to 0.58, mixed traffic on fine-grained MoE models (handbook
routing section 6; DeepSeek-V2-Lite records of deepseek-ai/ESFT @579a7711)."""
_SEED = 7


def expert_ids(distribution: str, num_tokens: int, top_k: int, num_experts: int, rank: int = 0) -> Ids:
    """Experts of each token of one rank: [tokens, top_k], distinct within a token.

    `balanced` deals experts round in turn, `lognormal` draws them from a log-normal popularity shared by all ranks,
    `one_hot` sends every token to the first top_k experts.
    """
    if distribution == "balanced":
        first = (np.arange(num_tokens) + rank * num_tokens)[:, None] * top_k
        return np.asarray((first + np.arange(top_k)) % num_experts, dtype=np.int64)
    if distribution == "one_hot":
        return np.tile(np.arange(top_k, dtype=np.int64), (num_tokens, 1))
    popularity = SIGMA * np.random.Generator(np.random.Philox(key=[_SEED, 2**32])).standard_normal(num_experts)
    gumbel = np.random.Generator(np.random.Philox(key=[_SEED, rank])).gumbel(size=(num_tokens, num_experts))
    return np.argpartition(-(popularity + gumbel), top_k - 1, axis=1)[:, :top_k].astype(np.int64)


def send_counts(ids: Ids, num_experts: int, num_gpus: int) -> Ids:
    """Rows that one rank sends to each rank, experts placed contiguously: [num_gpus]."""
    return np.bincount(ids.ravel() // (num_experts // num_gpus), minlength=num_gpus)
