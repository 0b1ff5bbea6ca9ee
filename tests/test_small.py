"""Small machines against published runs, and the command that compares policies."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from planner.cli.experts_residency import show_residency
from planner.errors import DoesNotFit, InputError
from planner.hardware import Link, System, system
from planner.model import ModelConfig, load
from planner.model.config import Moe
from planner.model.precision import override
from planner.options import parse_bytes
from planner.residency import POLICIES, Residency
from planner.residency.hosts import LLAMA_SHARE, Host, host
from planner.small import Estimate, Machine, compare, estimate

DESKTOP, XEON, XEONS, EPYCS = (host(name) for name in ("desktop-ddr5", "xeon-ddr5-1s", "xeon-ddr5-2s", "epyc-ddr5-2s"))
Q4: dict[str, Any] = {"experts": "int4_g32", "attention": "int4_g32", "dense": "int4_g32"}
"""Q4_K_M is taken as 4.5 bits per weight, as handbook serving 5B.3 does; its files are about 7 % larger."""
PLENTY = 3e12


def model(name: str, top_k: int | None = None, **formats: Any) -> ModelConfig:
    found = override(load(name), **formats)
    if top_k is None:
        return found

    def fewer(ffns: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(replace(ffn, top_k=top_k) if isinstance(ffn, Moe) else ffn for ffn in ffns)

    layers = tuple(replace(layer, ffns=fewer(layer.ffns)) for layer in found.layers)  # type: ignore[arg-type]
    return replace(found, layers=layers)


def card(hbm_bytes: float, hbm_bytes_per_s: float, link_bytes_per_s: float = 3.2e10) -> System:
    """A GPU of the Ada or older generation with other memory; its compute does not matter for one token."""
    base = system("rtx-4090")
    gpu = replace(base.gpu, hbm_bytes=hbm_bytes, hbm_bytes_per_s=hbm_bytes_per_s)
    generation = "PCIe 4 x16" if link_bytes_per_s > 2e10 else "PCIe 3 x16"
    return replace(base, gpu=gpu, pcie=Link(generation, link_bytes_per_s, None, 1))


RTX4090, RTX5090 = system("rtx-4090"), system("rtx-5090")
A5000 = card(25.4e9, 7.68e11)
RTX3090 = card(25.3e9, 9.36e11)
RTX2080 = card(12e9, 4.48e11, 1.2e10)  # 8 GB in truth: llama.cpp keeps the token embedding on the host
I9_X = replace(DESKTOP, dram_bytes_per_s=1.02e11, llama_share=LLAMA_SHARE)
EPYC_9355 = replace(XEON, dram_bytes_per_s=12 * 8 * 6.4e9)  # nominal, one socket; the report does not say
EPYC_9374F = replace(XEON, dram_bytes_per_s=12 * 8 * 4.8e9, llama_share=LLAMA_SHARE)
V3, QWEN = "deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-30B-A3B"

PUBLISHED = {
    # KTransformers V0.2, doc/en/DeepseekR1_V3_tutorial.md @034a116: eight and six experts, one and two sockets.
    "kt one socket": (model(V3, **Q4), RTX4090, XEON, Residency("cpu", 0), 8.73, 0.06),
    "kt one socket 6 experts": (model(V3, 6, **Q4), RTX4090, XEON, Residency("cpu", 0), 10.303, 0.06),
    "kt two sockets": (model(V3, **Q4), RTX4090, XEONS, Residency("cpu", 0), 12.208, 0.08),
    "kt two sockets 6 experts": (model(V3, 6, **Q4), RTX4090, XEONS, Residency("cpu", 0), 13.69, 0.08),
    # Not used for the fit: V0.2.1 on the same machine, two EPYC 9135 (issue 797), V0.5 on an EPYC 9355 (issue 1914).
    "kt 0.2.1": (model(V3, **Q4), RTX4090, XEONS, Residency("cpu", 0), 13.5, 0.08),
    "kt epyc": (model(V3, **Q4), RTX4090, EPYCS, Residency("cpu", 0), 17.3, 0.09),
    "kt 0.5": (model(QWEN, experts="bf16"), RTX5090, EPYC_9355, Residency("cpu", 28), 51.6, 0.45),
    # llama.cpp --n-cpu-moe: AlexsJones/llmfit pull requests 755 and 775; an i9-14900K (gokawiil.com/article/74814).
    "llama qwen3": (model(QWEN, **Q4), RTX2080, I9_X, Residency("cpu-layers", 32), 36.7, 0.26),
    "llama gpt-oss-20b": (model("openai/gpt-oss-20b"), RTX2080, I9_X, Residency("cpu-layers", 16), 36.4, 0.25),
    "llama gpt-oss-120b": (model("openai/gpt-oss-120b"), RTX3090, DESKTOP, Residency("cpu-layers", 0), 25.62, 0.03),
    # ggml-org/llama.cpp pull request 23346: V3.2 in Q8_0, one byte per weight here, 8.5 bits there.
    "llama deepseek": (model(V3), system("rtx-pro-6000"), EPYC_9374F, Residency("cpu-layers", 0), 10.91, 0.27),
    # Mixtral bf16 on an RTX A5000: MoE-Infinity 0.735 and vLLM 2.137 s per token (handbook serving 5B.3).
    "moe-infinity": (model("mistralai/Mixtral-8x7B-v0.1"), A5000, XEON, Residency("lru"), 1 / 0.735, 0.08),
    "vllm offload": (model("mistralai/Mixtral-8x7B-v0.1"), A5000, XEON, Residency("stream"), 1 / 2.137, 0.36),
}


@pytest.mark.parametrize("run", PUBLISHED)
def test_published_decode_rates(run: str) -> None:
    config, gpu, found_host, residency, tok_per_s, tolerance = PUBLISHED[run]
    found = estimate(config, Machine(gpu, 1, PLENTY, host=found_host), residency, context=1024)
    assert found.decode_tok_per_s == pytest.approx(tok_per_s, rel=tolerance)


def test_deepseek_on_one_gpu_and_512_gb() -> None:
    """Order of the published 8 to 12 tok/s decode; prefill 54 tok/s on one socket and 255 with AMX on two."""
    found = compare(model(V3, **Q4), Machine(RTX4090, 1, 512e9), context=1024)
    best = found.estimates[0]
    assert best.residency.policy.startswith("cpu") and best.bound == "CPU and its memory"
    assert 8 < best.decode_tok_per_s < 12.5
    by_policy = {answer.residency.policy: answer for answer in found.estimates}
    assert by_policy["lru"].decode_tok_per_s < 0.4 * best.decode_tok_per_s
    assert by_policy["stream"].decode_tok_per_s < 0.1
    amx = estimate(model(V3, **Q4), Machine(RTX4090, 1, 1.024e12, host=XEONS), Residency("cpu"), context=2048)
    assert amx.prefill_tok_per_s == pytest.approx(255.26, rel=0.25)
    assert 0.6 < amx.origin_share["extrapolated"] < 0.95


def answers(name: str, gpu: System, batch: int = 1, dram_bytes: float = 128e9, **formats: Any) -> dict[str, Estimate]:
    found = compare(model(name, **formats), Machine(gpu, 1, dram_bytes), batch=batch)
    assert found.estimates == tuple(sorted(found.estimates, key=lambda e: -e.decode_tok_per_s))
    return {answer.residency.policy: answer for answer in found.estimates}


@pytest.mark.parametrize(("gpu", "low", "high"), [(RTX4090, 18, 45), (RTX5090, 30, 80)])
def test_gpt_oss_on_one_consumer_gpu(gpu: System, low: float, high: float) -> None:
    """A user reports 37.9 to 41 tok/s with experts partly on the host (serving 5B.3; the machine is not named)."""
    alone, four = (answers("openai/gpt-oss-120b", gpu, batch) for batch in (1, 4))
    assert set(alone) == set(POLICIES) - {"all-resident"}
    assert low < next(iter(alone.values())).decode_tok_per_s < high
    assert alone["lru"].hit_rate > alone["static-hot"].hit_rate > alone["cpu-layers"].hit_rate
    for policy in ("lru", "cpu"):
        assert four[policy].hit_rate < alone[policy].hit_rate
        assert four[policy].decode_tok_per_s < 2 * alone[policy].decode_tok_per_s  # a batch needs other experts
    for answer in (*alone.values(), *four.values()):
        assert sum(answer.terms.values()) == pytest.approx(answer.decode_s)
        assert sum(answer.origin_share.values()) == pytest.approx(1.0)
        assert answer.bytes_by_tier["hbm"] + answer.other_hbm_bytes < gpu.gpu.hbm_bytes
        assert 0 <= answer.hit_rate <= 1


def test_larger_prompt_chunks_spread_the_transfer() -> None:
    """ubatch 512 to 2048 made prefill about three times faster (serving 5B.3); an i9-14900K reads 134 tok/s at 512."""
    small, large = (
        estimate(
            model("openai/gpt-oss-120b"),
            Machine(RTX3090, 1, 96e9, host=DESKTOP),
            Residency("cpu-layers", 0),
            chunk=chunk,
        ).prefill_tok_per_s
        for chunk in (512, 2048)
    )
    assert 2.5 < large / small < 4.1
    assert 100 < small < 280


def test_what_fits_needs_no_policy() -> None:
    fits = answers(QWEN, RTX4090, **Q4)
    assert list(fits) == ["all-resident"]
    assert fits["all-resident"].bytes_by_tier["dram"] == 0 and fits["all-resident"].hit_rate == 1.0
    assert fits["all-resident"].decode_tok_per_s > 5 * next(iter(answers(QWEN, RTX4090).values())).decode_tok_per_s


def test_mixtral_int4_in_24_gb() -> None:
    found = answers("mistralai/Mixtral-8x7B-v0.1", RTX4090, experts="int4_g128", attention="int4_g128")
    assert 6 <= found["lru"].held.resident < 8
    assert next(iter(found.values())).decode_tok_per_s > 20


def test_two_dgx_spark() -> None:
    one, two = (Machine(system("dgx-spark"), gpus) for gpus in (1, 2))
    gpt_oss = model("openai/gpt-oss-120b")
    rates = [compare(gpt_oss, machine).estimates[0].decode_tok_per_s for machine in (one, two)]
    # vLLM on one: 33 to 59.5 tok/s (NVIDIA/dgx-spark-playbooks issue 79, spark-arena/recipe-registry issue 17).
    assert 30 < rates[0] < 60 and 1.3 < rates[1] / rates[0] < 2
    large = model("Qwen/Qwen3-235B-A22B", experts="nvfp4", attention="nvfp4", dense="nvfp4")
    assert compare(large, two).estimates[0].residency.policy == "all-resident"
    with pytest.raises(DoesNotFit, match="nothing") as caught:
        compare(large, one)
    assert caught.value.remedies[0] == "more GPUs"


def test_drives_are_the_last_resort() -> None:
    config = model(V3, **Q4)
    with pytest.raises(DoesNotFit, match=r"359 GB must lie behind.*there is 128 GB of DRAM") as caught:
        compare(config, Machine(RTX4090, 1, 128e9))
    assert any("NVMe" in remedy for remedy in caught.value.remedies)
    slow = compare(config, Machine(RTX4090, 1, 128e9, nvme_bytes=1e12))
    assert slow.estimates[0].bound == "NVMe drives"
    assert 0.2 < slow.estimates[0].decode_tok_per_s < 3
    assert all(answer.bytes_by_tier["nvme"] > 0 for answer in slow.estimates)


def test_bad_questions() -> None:
    with pytest.raises(InputError, match="dense"):
        compare(load("Qwen/Qwen3-8B"), Machine(RTX4090))
    with pytest.raises(DoesNotFit, match="even without its experts") as caught:
        compare(load(V3), Machine(RTX4090, 1, 2e12), context=100_000, batch=4)
    assert "--context" in caught.value.remedies[1]
    with pytest.raises(InputError, match="positive whole"):
        compare(load(QWEN), Machine(RTX4090, 1, 1e11), batch=0)
    with pytest.raises(InputError, match="9 GPUs of rtx-4090"):
        compare(load(QWEN), Machine(RTX4090, 9, 1e11))
    with pytest.raises(DoesNotFit, match="only .* of 128"):
        estimate(load(QWEN), Machine(RTX4090, 1, 1e11), Residency("all-resident"))


def test_the_command_ranks_policies(capsys: pytest.CaptureFixture[str]) -> None:
    show_residency("openai/gpt-oss-120b", gpu="rtx-4090", dram="128GB", nvme="2TB@7GB/s")
    text = capsys.readouterr().out
    assert text.startswith("openai/gpt-oss-120b on 1 x rtx-4090:")
    for word in ("cpu-layers", "static-hot", "bound by", "DRAM", "NVME", "How sure", "Left out  all-resident"):
        assert word in text
    show_residency(
        "openai/gpt-oss-120b", gpu="rtx-4090", dram="128GB", policy="prefetch", prefetch_accuracy=0.5, json=True
    )
    facts = json.loads(capsys.readouterr().out)
    only = facts["policies"][0]
    assert only["policy"] == "prefetch" and len(facts["policies"]) == 1
    assert sum(only["decode_terms_s"].values()) == pytest.approx(only["decode_s"])
    assert only["decode_tok_per_s"] == pytest.approx(1 / only["decode_s"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dram": "lots"}, "--dram lots"),
        ({"dram": "-1GB"}, "--dram -1GB"),
        ({"dram": "128GB", "nvme": "2TB@fast"}, "a rate after the @"),
        ({"dram": "128GB", "nvme": "2TB@0GB/s"}, "a rate above 0"),
        ({"dram": "512GB", "host": "desktop-ddr5"}, "takes at most 256 GB"),
        ({"dram": "128GB", "num_gpus": 16}, "Use 1 to 8"),
        ({"dram": "128GB", "reuse": "decode"}, "did you mean"),
        ({"dram": "128GB", "skew": "zipff:1"}, "zipff"),
        ({"dram": "128GB", "top_k": "200"}, "from 1 to 128"),
        ({"dram": "128GB", "policy": "all-resident", "resident": 60}, "keeps every expert"),
        ({"dram": "128GB", "policy": "lur"}, "did you mean"),
        ({"dram": "128GB", "host": "laptop"}, "host 'laptop'"),
        ({"dram": "128GB", "resident": 200}, "0 to 128"),
        ({"dram": "128GB", "prefetch_accuracy": 2.0}, "accuracy 2"),
        ({"dram": "128GB", "batch": 0}, "--batch 0"),
    ],
)
def test_the_command_names_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        show_residency("openai/gpt-oss-120b", gpu="rtx-4090", **options)


def test_without_host_memory_the_remedy_is_named() -> None:
    with pytest.raises(DoesNotFit, match="there is nothing") as caught:
        show_residency("openai/gpt-oss-120b", gpu="rtx-4090")
    assert caught.value.exit_code == 3 and "--dram" in caught.value.remedies[0]


def test_sizes() -> None:
    assert (parse_bytes("--dram", "128GB"), parse_bytes("--dram", "1.5 tb")) == (128e9, 1.5e12)
    assert parse_bytes("--dram", "1GiB") == 2**30


def test_hosts_can_be_described() -> None:
    mine = Host("mine", "my box", 2e11, 1e12, 3e12)
    slow, fast = (
        estimate(load(QWEN), Machine(RTX4090, 1, 128e9, host=found), Residency("cpu")).decode_tok_per_s
        for found in (DESKTOP, mine)
    )
    assert fast > slow
