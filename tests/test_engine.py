from __future__ import annotations

import pytest

from planner.engine import Engine, engine, engines, padding, versions
from planner.errors import InputError


def test_bundled_engines_have_sources_and_dates() -> None:
    assert engines() == ("generic", "llamacpp", "sglang", "trtllm", "vllm")
    for name in versions():
        profile = engine(name)
        assert name == f"{profile.name}-{profile.version}"
        assert profile.source and profile.as_of >= "2026"


def test_unknown_engine_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="did you mean trtllm, vllm"):
        engine("vlm")


def test_vllm_graph_list_and_padding(vllm: Engine) -> None:
    sizes = vllm.graphs.sizes(1024, "sm90")
    assert sizes[:6] == (1, 2, 4, 8, 16, 24)
    padded = padding(sizes, 1024)
    assert [padded[n] for n in (0, 1, 3, 9, 256, 257, 512, 513)] == [0, 1, 4, 16, 256, 272, 512, 513]
    # max = min(2 x max_num_seqs, 512), and max_num_seqs itself is captured
    assert vllm.graphs.sizes(20) == (1, 2, 4, 8, 16, 20, 24, 32, 40)
    assert padding(vllm.graphs.sizes(20), 20)[17] == 20


def test_blackwell_captures_up_to_1024(vllm: Engine) -> None:
    for arch in ("sm100", "sm103"):
        assert vllm.graphs.sizes(1024, arch)[-1] == 1024
        assert padding(vllm.graphs.sizes(1024, arch), 1024)[513] == 528
    assert vllm.graphs.sizes(1024, "sm120")[-1] == 512  # workstation Blackwell is no data-centre part


def test_sglang_and_trtllm_graph_lists() -> None:
    assert engine("sglang").graphs.sizes(512)[:9] == (1, 2, 4, 8, 12, 16, 24, 32, 40)
    assert engine("sglang").graphs.sizes(512)[-2:] == (496, 512)
    # blog 20: doubling above 128 pads 130 to 256
    assert padding(engine("trtllm").graphs.sizes(2048), 2048)[130] == 256


def test_vllm_budget_follows_device_memory(vllm: Engine) -> None:
    assert vllm.budget(191e9, "sm100").max_batched_tokens == 16384
    assert vllm.budget(85e9, "sm90").max_batched_tokens == 8192
    assert vllm.budget(85e9, "sm80").max_batched_tokens == 2048  # A100
    assert vllm.budget(128e9, "sm121").max_num_seqs == 256  # GB10
    assert vllm.budget(24e9).max_num_seqs == 256
