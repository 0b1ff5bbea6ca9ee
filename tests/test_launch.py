"""Launch commands: their flags make the GPUs of the layout, node by node, and what no flag can say is said."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.deployment import Deployment, deploy
from planner.engine import Limits, engine
from planner.experts import ExpertSettings
from planner.hardware import Cluster, parse_cluster
from planner.launch import Launch, gpus_per_node, launch
from planner.layout import Layout, parse_layout
from planner.model import ModelConfig, load
from planner.tactics import parse_tactics

_POWERS = st.sampled_from([1, 2, 4, 8])
_SIZES = st.sampled_from([1, 2, 3, 4, 8, 16])


@pytest.fixture(scope="module")
def base() -> Deployment:
    cluster = parse_cluster("h200-sxm:2x8")
    fixed = (load("deepseek-ai/DeepSeek-V3"), cluster, parse_layout("tp=8,ep=8"), engine("vllm"))
    return deploy(*fixed, Limits(256, 8192), "all_reduce", 1024)


def with_layout(base: Deployment, layout: Layout, name: str = "vllm", cluster: Cluster | None = None) -> Deployment:
    backend = "allgather_reducescatter" if layout.attention_dp > 1 else "all_reduce"
    cluster = cluster or base.cluster
    return replace(base, layout=layout, engine=engine(name), backend=backend, cluster=cluster)


def flags(text: str) -> dict[str, str]:
    """Values of the flags of a command, `--a b` as {"a": "b"}, switches as ""."""
    words = shlex.split(text.splitlines()[-1])
    pairs = zip(words, [*words[1:], "--"], strict=True)
    return {
        word.lstrip("-").replace("_", "-"): "" if following.startswith("--") else following
        for word, following in pairs
        if word.startswith("--")
    }


def gpus_of(name: str, given: dict[str, str]) -> int:
    """GPUs of one replica as the engine multiplies its flags."""
    names = {
        "vllm": ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size"),
        "sglang": ("tp-size", "pp-size"),
        "trtllm": ("tp-size", "pp-size"),
    }[name]
    product = 1
    for flag in names:
        product *= int(given.get(flag, "1"))
    return product


@settings(deadline=None, derandomize=True, max_examples=70)
@given(
    name=st.sampled_from(["vllm", "sglang", "trtllm"]),
    tp=_POWERS,
    dp=_SIZES,
    pp=st.integers(1, 4),
    replicas=st.integers(1, 5),
    spread=st.booleans(),
    system=st.sampled_from(["h200-sxm:8x8", "gb200-nvl72:18x4", "l40s:4x4"]),
)
def test_flags_make_the_gpus_of_the_layout(
    base: Deployment, name: str, tp: int, dp: int, pp: int, replicas: int, spread: bool, system: str
) -> None:
    ep = tp * dp if spread else 1
    layout = Layout(tp=tp, pp=pp, ep=ep, attention_dp=dp, moe_tp=tp * dp // ep, replicas=replicas)
    deployment = with_layout(base, layout, name, parse_cluster(system))
    found = launch(deployment)
    assert found.num_gpus == layout.num_gpus
    assert found.replicas == replicas
    per_node = gpus_per_node(deployment)
    assert per_node <= deployment.cluster.gpus_per_node
    nodes = layout.replica_gpus // per_node
    for command in found.commands:
        assert gpus_of(name, flags(command.text)) == layout.replica_gpus
    if name == "trtllm":
        _starts_all_ranks(found, nodes, per_node)
    else:
        _starts_each_node(found, nodes, per_node)


def _starts_each_node(found: Launch, nodes: int, per_node: int) -> None:
    assert [command.num_gpus for command in found.commands] == [per_node] * nodes
    ranks = [flags(command.text).get("node-rank") for command in found.commands]
    assert ranks == ([None] if nodes == 1 else [str(rank) for rank in range(nodes)])
    assert {flags(command.text).get("nnodes", "1") for command in found.commands} == {str(nodes)}


def _starts_all_ranks(found: Launch, nodes: int, per_node: int) -> None:
    (command,) = found.commands
    assert command.num_gpus == nodes * per_node
    asked = re.search(r"srun --nodes (\d+) --ntasks (\d+) --ntasks-per-node (\d+)", command.text)
    assert (asked is None) == (nodes == 1)
    assert asked is None or [int(n) for n in asked.groups()] == [nodes, nodes * per_node, per_node]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(tp=_POWERS, dp=_POWERS, pp=st.integers(1, 4))
def test_vllm_can_place_its_ranks_on_the_nodes(base: Deployment, tp: int, dp: int, pp: int) -> None:
    """The rules of ParallelConfig.nnodes_within_dp and the multiprocessing executor of vLLM 0.33."""
    layout = Layout(tp=tp, pp=pp, ep=1, attention_dp=dp, moe_tp=tp * dp)
    per_node = gpus_per_node(with_layout(base, layout))
    nodes, per_rank = layout.replica_gpus // per_node, tp * pp
    if nodes > 1:
        local_ranks = max(per_node // per_rank, 1)
        assert dp % local_ranks == 0
        groups = dp // local_ranks
        assert nodes % groups == 0
        assert per_rank % (nodes // groups) == 0


def test_vllm_flags(base: Deployment) -> None:
    layout = Layout(tp=1, ep=16, attention_dp=16)
    model: ModelConfig = replace(base.model, kv_format="fp8")
    deployment = replace(with_layout(base, layout), model=model, backend="deepep")
    given = flags(launch(deployment).commands[1].text)
    assert given["data-parallel-size"] == "16" and "enable-expert-parallel" in given and "headless" in given
    assert given["all2all-backend"] == "deepep_low_latency"
    assert given["kv-cache-dtype"] == "fp8" and given["max-num-seqs"] == "256"
    assert given["max-num-batched-tokens"] == "8192" and given["nnodes"] == "2" and given["node-rank"] == "1"


def test_sglang_limits_are_of_all_attention_ranks(base: Deployment) -> None:
    given = flags(launch(with_layout(base, Layout(tp=1, ep=8, attention_dp=8), "sglang")).commands[0].text)
    assert (given["tp-size"], given["attn-dp-size"], given["ep-size"]) == ("8", "8", "8")
    assert (given["max-running-requests"], given["chunked-prefill-size"]) == (str(256 * 8), str(8192 * 8))


def test_what_no_flag_says_is_said(base: Deployment) -> None:
    experts = ExpertSettings(top_k=4)
    deployment = replace(with_layout(base, Layout(tp=4, ep=4, attention_dp=2, moe_tp=2), "sglang"), experts=experts)
    assert "4 experts per token" in launch(deployment).note
    assert "Unverified" in launch(deployment).note
    renamed = replace(base, model=replace(base.model, name="my/own; rm -rf /"))
    found = launch(renamed)
    assert "'my/own; rm -rf /'" in found.commands[0].text and "where the checkpoint" in found.note
    other = launch(with_layout(base, base.layout, "trtllm", parse_cluster("mi300x:1x8")))
    assert "trtllm for AMD may take other flags" in other.note
    none = launch(with_layout(base, Layout(tp=8, moe_tp=8), "llamacpp"))
    assert none.commands == () and none.note.startswith("No command")


def test_tactics_and_copies_have_flags(base: Deployment) -> None:
    tactics = parse_tactics("mtp:1", None, None, base.model, base.engine)
    copies = replace(base.layout, redundant_experts=16)
    deployment = replace(base, tactics=tactics, layout=copies)
    given = flags(launch(deployment).commands[0].text)
    assert '"num_speculative_tokens": 1' in given["speculative-config"]
    assert "enable-eplb" in given and '"num_redundant_experts": 16' in given["eplb-config"]
    other = flags(launch(replace(deployment, engine=engine("sglang"))).commands[0].text)
    assert other["speculative-num-draft-tokens"] == "2" and other["ep-num-redundant-experts"] == "16"
    yaml = launch(replace(deployment, engine=engine("trtllm"))).commands[0].text
    assert "num_slots: 272" in yaml and "max_draft_len: 1" in yaml


@pytest.mark.parametrize(("role", "flag"), [("prefill", "kv_producer"), ("decode", "kv_consumer")])
def test_pools_have_roles(base: Deployment, role: str, flag: str) -> None:
    assert flag in launch(base, role).commands[0].text  # type: ignore[arg-type]
    sglang = flags(launch(replace(base, engine=engine("sglang")), role).commands[0].text)  # type: ignore[arg-type]
    assert sglang["disaggregation-mode"] == role
