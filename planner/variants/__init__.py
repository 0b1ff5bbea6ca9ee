"""What-ifs on a model: the same ledger and the same step costs, with one thing changed.

ranking    which experts are popular: from a skew law or from counts
decode     Variant, and its decode step on given GPUs: the best layout for each batch
precision  hot experts in one format, cold ones in another
pruning    keep n of E experts
lora       adapters on attention, shared experts, routed experts, routers
dense      the dense model of the same active parameters, or of a given size
"""

from __future__ import annotations

from planner.variants.decode import DecodePoint, Variant, decode_points, most_seqs, placed, roomiest_kv_tokens
from planner.variants.dense import dense_of_active, dense_of_size, equivalent_params
from planner.variants.lora import Adapter, adapter_bytes, adapters_that_fit, parse_targets, with_adapters
from planner.variants.precision import Mix, expert_bytes_read, mixed, parse_mix, split_formats
from planner.variants.pruning import prune, pruned, traffic_kept
from planner.variants.ranking import moe_of, ranked_picks

__all__ = [
    "Adapter",
    "DecodePoint",
    "Mix",
    "Variant",
    "adapter_bytes",
    "adapters_that_fit",
    "decode_points",
    "dense_of_active",
    "dense_of_size",
    "equivalent_params",
    "expert_bytes_read",
    "mixed",
    "moe_of",
    "most_seqs",
    "parse_mix",
    "parse_targets",
    "placed",
    "prune",
    "pruned",
    "ranked_picks",
    "roomiest_kv_tokens",
    "split_formats",
    "traffic_kept",
    "with_adapters",
]
