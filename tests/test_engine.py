from __future__ import annotations

import pytest

from planner.engine import Engine, engine, engines
from planner.errors import InputError


def test_bundled_engines_have_sources_and_dates() -> None:
    assert engines() == ("sglang", "trtllm", "vllm")
    for name in engines():
        profile = engine(name)
        assert profile.source and profile.as_of >= "2026"
        assert list(profile.graph_sizes) == sorted(set(profile.graph_sizes))


def test_unknown_engine_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="did you mean trtllm, vllm"):
        engine("vlm")


def test_vllm_graph_list_and_padding(vllm: Engine) -> None:
    assert vllm.graph_sizes[:6] == (1, 2, 4, 8, 16, 24)
    assert [vllm.padded_batch(n) for n in (1, 3, 9, 256, 257, 512, 513)] == [1, 4, 16, 256, 272, 512, 513]
    assert vllm.num_graphs(8) == 4


def test_vllm_budget_follows_device_memory(vllm: Engine) -> None:
    assert vllm.budget(191e9).max_batched_tokens == 16384
    assert vllm.budget(85e9).max_batched_tokens == 8192
    assert vllm.budget(85e9, "Ampere").max_batched_tokens == 2048
    assert vllm.budget(24e9).max_num_seqs == 256
