"""What a user may choose about experts and pools, as typed; `planner.options` and the commands make settings of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ExpertChoices:
    """How experts are picked, placed and limited.

    Parameters
    ----------
    skew
        Popularity of experts: mixed, single-domain, aux-balanced-8-experts, uniform, lognormal:0.5, zipf:1,
        dirichlet:3, powerlaw:1.2@8192, hash, or a routing record (`moeplan experts inspect` reads the same files).
    placement
        contiguous, round-robin, greedy, greedy-swaps, eplb, eplb-global, node-limited, random, or in `simulate` a
        placement file of `moeplan experts place --out`, SGLang or vLLM.
    capacity_factor
        Drop tokens beyond this factor; `off` serves every token. Switch, GLaM, GShard and NLLB have their own.
    capacity_rule
        Whose rule the factor follows: mesh-tf, flax, lingvo, megatron, deepspeed, tutel or vmoe.
    top_k
        Experts per token instead of the model's; `6~1.5` lets them vary by 1.5 from token to token.
    rebalance_steps
        Place the experts anew every so many steps.
    rebalance_async
        Ranks do not wait for experts to move.
    residency
        Where experts live that do not fit: lru (SGLang), stream (vLLM), prefetch (MoE-Infinity), cpu (KTransformers),
        cpu-layers (llama.cpp); static-hot, lfu or cpu-or-fetch, which no serving engine has.
    resident
        Experts per layer to keep in GPU memory; as many as fit otherwise. With residency.
    reuse
        How routing repeats itself while generating: records (of prompts, cautious), decode-reports (what caches
        counted), or a routing record with token ids (.npz).
    dram
        Host memory of a node that is free for experts, such as 128GB; the profile's otherwise.
    nvme
        Drive space of a node that is free for experts, and its rate, such as 2TB or 2TB@7GB/s.
    peer
        Memory of other GPUs on the scale-up link that is free for experts, such as 40GB per node.
    host
        Host whose memory rate and cores count: desktop-ddr5, xeon-ddr5-1s, xeon-ddr5-2s, epyc-ddr5-2s; the profile's
        otherwise, else a desktop up to 256 GB and a one-socket server beyond.
    gpus_per_root
        GPUs that share one link to the host.
    drift_half_life
        Steps after which the popularity of experts is half forgotten.
    drift_switch
        Steps after which the dominant task changes.
    """

    skew: str | None = None
    placement: str = "contiguous"
    capacity_factor: str | None = None
    capacity_rule: str | None = None
    top_k: str | None = None
    rebalance_steps: int | None = None
    rebalance_async: bool = False
    residency: str | None = None
    resident: int | None = None
    reuse: str = "records"
    dram: str | None = None
    nvme: str | None = None
    peer: str | None = None
    host: str | None = None
    gpus_per_root: int = 1
    drift_half_life: float | None = None
    drift_switch: int | None = None


@dataclass(frozen=True)
class TacticChoices:
    """What the engine does beyond plain batching.

    Parameters
    ----------
    speculative
        Draft tokens and verify them together: mtp:1 (the model's own MTP layer, one draft), draft:MODEL:4 (a draft
        model), ngram:3 (look-up in the text).
    acceptance
        Chance that a draft is accepted when those before it were: 0.85, or one per draft such as 0.85,0.7,0.6. For
        mtp published numbers are assumed otherwise.
    overlap
        Hide the exchange of attention-DP ranks behind compute: tbo (two half batches take turns: SGLang two-batch
        overlap, vLLM DBO) or shared (dispatch behind shared experts). Over DeepEP.
    """

    speculative: str | None = None
    acceptance: str | None = None
    overlap: Literal["tbo", "shared"] | None = None


@dataclass(frozen=True)
class PoolChoices:
    """Prefill and decode in two pools, each with a layout of its own.

    Parameters
    ----------
    prefill_layout
        Layout of the pool that computes prompts, such as tp=8,replicas=2.
    decode_layout
        Layout of the pool that generates answers, such as attention_dp=16,ep=16.
    decode_cluster
        GPUs of the decode pool where they are not part of the cluster, such as h20:2x8.
    prefill_max_num_seqs
        Sequences at once per scheduler rank of the prefill pool.
    decode_max_num_seqs
        Sequences at once per scheduler rank of the decode pool.
    prefill_max_batched_tokens
        Tokens per step per scheduler rank of the prefill pool.
    decode_max_batched_tokens
        Tokens per step per scheduler rank of the decode pool.
    prefill_backend
        How attention-DP ranks of the prefill pool exchange tokens with experts.
    decode_backend
        How attention-DP ranks of the decode pool exchange tokens with experts.
    kv_reserve
        When KV room is taken on the decode side: on arrival (SGLang) or when the prompt is computed (vLLM,
        TensorRT-LLM); the engine's own otherwise.
    kv_send
        What travels at once: the whole prompt's KV (vLLM, TensorRT-LLM), chunks (SGLang) or layers while the prompt is
        computed; the engine's own otherwise.
    reserved_decode_tokens
        KV tokens that the decode side keeps free per request, SGLang's --num-reserved-decode-tokens; the engine's own
        otherwise.
    """

    prefill_layout: str | None = None
    decode_layout: str | None = None
    decode_cluster: str | None = None
    prefill_max_num_seqs: int | None = None
    decode_max_num_seqs: int | None = None
    prefill_max_batched_tokens: int | None = None
    decode_max_batched_tokens: int | None = None
    prefill_backend: Literal["allgather_reducescatter", "deepep"] | None = None
    decode_backend: Literal["allgather_reducescatter", "deepep"] | None = None
    kv_reserve: Literal["arrival", "prefilled"] | None = None
    kv_send: Literal["whole", "chunks", "layers"] | None = None
    reserved_decode_tokens: int | None = None
