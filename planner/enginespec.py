"""What the event simulation must know of a deployment: how many ranks, their limits and rules."""

from __future__ import annotations

from dataclasses import dataclass

from planner.engine import BatchWait, PrefillBalance, TokenRatio
from planner.errors import InputError, nearest

POLICIES = ("mixed", "prefill_first")
"""What a step may hold: prompts and decodes together (vLLM), or prompts alone whenever there are any (SGLang)."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What the simulator must know of one deployment.

    `num_groups` groups step independently of each other (replicas x pipeline slots); the `ranks_per_group`
    attention-data-parallel ranks of a group step together. Everything else is per rank: `kv_tokens_per_rank` is its
    KV pool [tokens], handed out in blocks of `block_tokens`; `max_num_seqs` and `max_batched_tokens` bound one step.
    `policy` is one of `POLICIES`.

    `admission_reserve` is the share of their still unwritten KV blocks that admission keeps free for running
    requests: 0 is vLLM (optimistic, preempts), 1 is TensorRT-LLM's GUARANTEED_NO_EVICT; `token_ratio` is SGLang's rule
    instead (`planner.retraction`). `prefill_balance` and `batch_wait` are `planner.lockstep`'s. `rank_router` spreads
    the requests of a group over its ranks (`planner.balancer`). No request takes more than `max_request_tokens` of KV,
    0 for the pool. Of the `groups_per_node` groups of a node `groups_per_link` neighbours fetch experts over one host
    link, 0 for none.

    A request reaches its queue `frontend_s` after one of `num_frontends` has tokenised it (HTTP, handing over).
    Tokenising takes `frontend_s_per_token` x prompt tokens, one request after the other. The scheduler looks for new
    ones every `receive_interval` decode steps.

    With speculative decoding `acceptance` is the chance that each draft is accepted when those before it were.
    `prefix_caching` keeps the blocks of finished requests for prompts that begin alike.
    """

    num_groups: int
    ranks_per_group: int
    kv_tokens_per_rank: int
    block_tokens: int = 16
    max_num_seqs: int = 256
    max_batched_tokens: int = 8192
    policy: str = "mixed"
    admission_reserve: float = 0.0
    groups_per_link: int = 0
    groups_per_node: int = 1
    frontend_s: float = 0.0
    frontend_s_per_token: float = 0.0
    receive_interval: int = 1
    num_frontends: int = 1
    token_ratio: TokenRatio | None = None
    prefill_balance: PrefillBalance | None = None
    batch_wait: BatchWait | None = None
    rank_router: str = ""
    max_request_tokens: int = 0
    acceptance: tuple[float, ...] = ()
    prefix_caching: bool = False

    def __post_init__(self) -> None:
        counts = ("num_groups", "ranks_per_group", "block_tokens", "max_num_seqs", "max_batched_tokens")
        for name in (*counts, "receive_interval", "num_frontends"):
            if getattr(self, name) < 1:
                raise InputError(f"engine: {name} = {getattr(self, name)} must be at least 1.")
        if self.kv_tokens_per_rank < self.block_tokens:
            raise InputError(
                f"engine: a KV pool of {self.kv_tokens_per_rank} tokens holds no block of {self.block_tokens} tokens. "
                "Free memory for KV: more GPUs, a smaller precision or a smaller batch."
            )
        each = 1 + len(self.acceptance)
        if self.max_num_seqs * each > self.max_batched_tokens:
            raise InputError(
                f"engine: max_num_seqs {self.max_num_seqs} exceeds max_batched_tokens {self.max_batched_tokens}, but "
                f"every running sequence needs {'one token' if each == 1 else f'{each} tokens'} per step. Lower the "
                "first or raise the second."
            )
        if self.policy not in POLICIES:
            raise InputError(f"engine: unknown policy {self.policy!r} ({nearest(self.policy, POLICIES)})")
        if not 0 <= self.admission_reserve <= 1:
            raise InputError(f"engine: admission_reserve {self.admission_reserve:g} must lie in [0, 1].")

    @property
    def kv_blocks_per_rank(self) -> int:
        """Whole KV blocks of one rank."""
        return self.kv_tokens_per_rank // self.block_tokens

    @property
    def largest_request_tokens(self) -> int:
        """KV tokens of the largest request that a rank takes."""
        return self.max_request_tokens or self.kv_blocks_per_rank * self.block_tokens
