"""What a model is, as plain facts: layers, weight matrices, cached values per token.

Every parameter is one `Weight`; totals, active parameters, stored bytes, GEMM shapes and
sharding are all derived from the same list, so they cannot disagree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from planner.model.precision import FP32_BYTES, kv_bytes_per_layer, stored_bytes

Part = Literal["embedding", "lm_head", "attention", "router", "expert", "shared_expert", "dense_ffn", "norm"]
"""What a weight belongs to; precision is chosen per part."""

Shard = Literal["column", "row", "kv_column", "vocab", "expert", "replicated"]
"""How tensor parallelism cuts a weight.

`column`: rows (output features) over TP; `row`: cols (input features) over TP; `kv_column`: rows over
min(TP, KV heads), copied beyond; `vocab`: rows over TP; `expert`: copies over EP, width over MoE-TP;
`replicated`: whole on every rank."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight matrix [rows = output features, cols = input features], or `copies` equal ones.

    Vectors (norms, biases, sinks) have `cols` = 1 and `is_matrix` False; they cost memory but no GEMM.
    `fused` matrices are stacked in `rows` (gate and up: 2) but stored apart, each with its own scales.
    `fmt` is the format the checkpoint gives this weight when it differs from the model's for the part;
    `is_quantizable` is False for matrices that stay 16-bit in every published quantisation.
    """

    name: str
    rows: int
    cols: int
    part: Part
    shard: Shard = "replicated"
    copies: int = 1
    is_matrix: bool = True
    fused: int = 1
    fmt: str | None = None
    is_quantizable: bool = True

    @property
    def params(self) -> int:
        """Number of parameters over all copies."""
        return self.rows * self.cols * self.copies


@dataclass(frozen=True, slots=True)
class Attention:
    """Softmax attention that keeps a cache.

    `kv_values` is the number of values cached per token in this layer over all KV heads (0 when the layer
    reuses another layer's cache); `window` is the sliding-window or chunk length in tokens, None for full.
    For MLA `num_kv_heads` is 1, `qk_head_dim` = nope + rope, `kv_values` = kv_lora_rank + qk_rope_head_dim
    (+ indexer key width for sparse attention). A layer that reuses the previous layer's selection has
    `index_topk` > 0 and `index_heads` = 0. `compress_ratio` tokens share one cache entry (DeepSeek-V4);
    `kv_values` is per token and already divided by it. `is_cross` caches `kv_values` per source token.
    """

    kind: Literal["gqa", "mla"]
    num_heads: int
    num_kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    kv_values: int
    window: int | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    index_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0
    compress_ratio: int = 1
    is_cross: bool = False


@dataclass(frozen=True, slots=True)
class Recurrent:
    """Linear attention or state-space mixer: a fixed state per sequence instead of a cache.

    `state_values` and `conv_values` are values per sequence in this layer (state usually fp32).
    `num_k_heads`, `num_v_heads`, `k_head_dim`, `v_head_dim` describe the recurrence (0 where unused).
    """

    kind: Literal["gated_delta", "kda", "lightning", "mamba1", "mamba2"]
    state_values: int
    conv_values: int = 0
    num_k_heads: int = 0
    num_v_heads: int = 0
    k_head_dim: int = 0
    v_head_dim: int = 0


@dataclass(frozen=True, slots=True)
class DenseFfn:
    """Dense feed-forward of `width`; `num_matrices` 3 for gated (SwiGLU), 2 otherwise."""

    width: int
    num_matrices: int = 3


@dataclass(frozen=True, slots=True)
class Moe:
    """Routed experts of one layer.

    `expert_hidden` is the width experts read and write (the model's hidden size unless latent MoE);
    `shared_width` the total width of always-on shared experts or residual dense MLP in the same block;
    `identity_experts` are zero-computation picks (LongCat); `capacity_factor` is the published limit of
    capacity-limited families (Switch, GLaM, NLLB), None for dropless.
    """

    num_experts: int
    top_k: int
    expert_width: int
    expert_hidden: int
    num_matrices: int = 3
    shared_width: int = 0
    num_groups: int = 1
    top_groups: int = 1
    identity_experts: int = 0
    capacity_factor: float | None = None

    @property
    def active_experts(self) -> float:
        """Expected experts with weights per token: `top_k` less the picks that fall on identity experts.

        Uniform picks are assumed for identity experts (LongCat: 12 x 512 / 768 = 8, its README's average).
        """
        return self.top_k * self.num_experts / (self.num_experts + self.identity_experts)


Mixer = Attention | Recurrent
Ffn = DenseFfn | Moe


@dataclass(frozen=True, slots=True)
class Layer:
    """One transformer block. Equal layers compare equal, so cost and memory are computed once per kind."""

    mixers: tuple[Mixer, ...]
    ffns: tuple[Ffn, ...]
    weights: tuple[Weight, ...]
    stack: Literal["decoder", "encoder"] = "decoder"

    @property
    def moe(self) -> Moe | None:
        """The routed-expert block of this layer, if any."""
        return next((f for f in self.ffns if isinstance(f, Moe)), None)


@dataclass(frozen=True)
class ModelConfig:
    """A model: its layers, its weights outside the layers, and how the checkpoint stores them.

    `formats` maps each part to a weight format of `planner.model.precision`; `kv_format` is the cache's.
    `mtp` holds the weights of multi-token-prediction modules (not in `total_params`). Router correction
    biases (`router_bias_buffers` values, fp32) are buffers: in `weight_bytes`, not in `total_params`.
    `notes` are assumptions and warnings for the reader, `source` says where the description comes from.
    """

    name: str
    architecture: str
    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    weights: tuple[Weight, ...]
    formats: tuple[tuple[Part, str], ...]
    kv_format: str = "bf16"
    tied: bool = False
    max_context: int = 0
    mtp: tuple[Weight, ...] = ()
    router_bias_buffers: int = 0
    mtp_router_bias_buffers: int = 0
    notes: tuple[str, ...] = ()
    source: str = ""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Layers are many, and models key most caches."""
        return hash((self.name, self.layers, self.weights, self.formats, self.kv_format))

    def format_of(self, part: Part) -> str:
        """Weight format in which the checkpoint stores `part`."""
        return dict(self.formats)[part]

    def all_weights(self) -> Iterator[Weight]:
        """Every weight of the model, layers first; MTP excluded."""
        for layer in self.layers:
            yield from layer.weights
        yield from self.weights

    @cached_property
    def layer_kinds(self) -> tuple[tuple[Layer, int], ...]:
        """Distinct layers with their counts, in order of first appearance."""
        return tuple(Counter(self.layers).items())

    @cached_property
    def layer_order(self) -> tuple[int, ...]:
        """Index into `layer_kinds` of every layer."""
        index = {layer: kind for kind, (layer, _) in enumerate(self.layer_kinds)}
        return tuple(index[layer] for layer in self.layers)

    @cached_property
    def moe(self) -> Moe | None:
        """The first routed-expert block, or None for a dense model."""
        return next((layer.moe for layer in self.layers if layer.moe), None)

    @property
    def num_layers(self) -> int:
        """Transformer blocks (encoder and decoder)."""
        return len(self.layers)

    @property
    def num_moe_layers(self) -> int:
        """Blocks with routed experts."""
        return sum(1 for layer in self.layers if layer.moe)

    @property
    def num_experts(self) -> int:
        """Routed experts per MoE layer, 0 for dense."""
        return self.moe.num_experts if self.moe else 0

    @property
    def top_k(self) -> int:
        """Routed experts per token, 0 for dense."""
        return self.moe.top_k if self.moe else 0

    @cached_property
    def total_params(self) -> int:
        """All parameters, MTP and router-bias buffers excluded (transformers' `parameters()` count)."""
        return _params(self.all_weights())

    @cached_property
    def active_params_with_embeddings(self) -> int:
        """Parameters one token uses, both embeddings counted whole (Mixtral 12.9B, DBRX 36B, Qwen3 3.3B)."""
        return sum(_active(layer) for layer in self.layers) + _params(self.weights)

    @property
    def active_params_without_input_embedding(self) -> int:
        """Active parameters with the head but not the input lookup (gpt-oss 5.13B); the one FLOP follow.

        A tied matrix is used as the head, so it stays counted.
        """
        parts = self.params_by_part()
        return self.active_params_with_embeddings - (0 if self.tied else parts["embedding"])

    @property
    def active_params_without_embeddings(self) -> int:
        """Active parameters with neither embedding nor head (GLM-4.5 32B, MiniMax-M1 45.9B)."""
        parts = self.params_by_part()
        return self.active_params_with_embeddings - parts["embedding"] - parts["lm_head"]

    def params_by_part(self) -> dict[str, int]:
        """Parameters of each part; sums to `total_params`."""
        totals = dict.fromkeys(get_args(Part), 0)
        for weight in self.all_weights():
            totals[weight.part] += weight.params
        return totals

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the checkpoint's tensors without MTP, quantisation scales included."""
        return self._stored(self.all_weights()) + FP32_BYTES * self.router_bias_buffers

    @property
    def mtp_params(self) -> int:
        """Parameters of the multi-token-prediction modules, duplicated embeddings included."""
        return _params(self.mtp)

    @property
    def mtp_bytes(self) -> int:
        """Bytes of the multi-token-prediction modules' tensors."""
        return self._stored(self.mtp) + FP32_BYTES * self.mtp_router_bias_buffers

    def _stored(self, weights: Iterable[Weight]) -> int:
        formats = dict(self.formats)
        counted = Counter(weights)
        return sum(stored_bytes(weight, formats[weight.part]) * count for weight, count in counted.items())

    def caches(self) -> Iterator[Attention]:
        """Attention mixers that cache the tokens being processed; cross-attention excluded."""
        for layer in self.layers:
            if layer.stack == "decoder":
                yield from (m for m in layer.mixers if isinstance(m, Attention) and not m.is_cross)

    @property
    def kv_bytes_per_token(self) -> int:
        """Cache bytes of one token inside every window, all layers."""
        return sum(kv_bytes_per_layer(cache, self.kv_format) for cache in self.caches())

    @property
    def kv_growing_bytes_per_token(self) -> int:
        """Cache bytes per token of the layers without window, which grow with the whole context."""
        return sum(kv_bytes_per_layer(cache, self.kv_format) for cache in self.caches() if cache.window is None)

    @property
    def kv_bytes_per_source_token(self) -> int:
        """Cross-attention cache bytes per encoder token (encoder-decoder models, else 0)."""
        mixers = (m for layer in self.layers for m in layer.mixers if isinstance(m, Attention) and m.is_cross)
        return sum(kv_bytes_per_layer(mixer, self.kv_format) for mixer in mixers)

    @property
    def state_bytes_per_sequence(self) -> int:
        """Recurrent state of one sequence: state in fp32, convolution tail in 16 bits (handbook models.md 5)."""
        mixers = [m for layer in self.layers for m in layer.mixers if isinstance(m, Recurrent)]
        return sum(FP32_BYTES * m.state_values + 2 * m.conv_values for m in mixers)


def _params(weights: Iterable[Weight]) -> int:
    return sum(w.params for w in weights)


def _active(layer: Layer) -> int:
    moe = layer.moe
    if moe is None:
        return _params(layer.weights)
    candidates = moe.num_experts + moe.identity_experts
    return sum(w.params * moe.top_k // candidates if w.shard == "expert" else w.params for w in layer.weights)
