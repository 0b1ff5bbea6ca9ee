"""Capacity rules against the code they come from, limits, defaults of published models, buffers, `experts drops`."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.calibration import OFF
from planner.capacity import (
    POLICIES,
    QUALITY_NOTE,
    RULES,
    CapacityLimit,
    buffer_limit,
    caution,
    default_limit,
    published,
    rule,
)
from planner.cli.experts_drops import count_drops, drops_text
from planner.cost import StepCost
from planner.deployment import deploy
from planner.engine import Limits, engine
from planner.errors import Infeasible, InputError, LayoutError, ModelConfigError, WorkloadError
from planner.facts.capacity import Step, drops_facts
from planner.hardware import parse_cluster
from planner.layout import Layout
from planner.model import ModelConfig, load
from planner.steptime import Sum

STACKS = ("mesh-tf", "flax", "lingvo", "megatron", "deepspeed", "tutel", "vmoe")
RECORDS = Path("/work/shared/data/routing")


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "factor", "slots"),
    [
        (1024, 8, 2, 1.0, (128, 128, 128, 256, 256, 256, 256)),
        (1000, 64, 2, 1.25, (19, 20, 20, 40, 40, 40, 40)),
        (100, 64, 1, 1.0, (4, 4, 4, 2, 4, 2, 4)),
        (4096, 256, 8, 1.0, (16, 16, 16, 128, 128, 128, 128)),
        (100, 64, 8, 1.25, (4, 4, 4, 16, 16, 16, 16)),
    ],
)
def test_capacities_are_those_of_the_stacks(
    tokens: int, experts: int, top_k: int, factor: float, slots: tuple[int, ...]
) -> None:
    """The 35 integers of handbook serving 4.2."""
    found = [int(CapacityLimit(name, factor).capacity(tokens, experts, top_k)) for name in STACKS]
    assert found == list(slots)


@pytest.mark.parametrize(("factor", "megatron", "deepspeed"), [(1.1, 441, 440), (1.2, 480, 481)])
def test_number_types_decide_by_one(factor: float, megatron: int, deepspeed: int) -> None:
    """Megatron multiplies Python floats, DeepSpeed takes the ceiling of a float32 tensor."""
    assert int(rule("megatron", 1).slots(3200, 8, 1, factor)) == megatron
    assert int(rule("deepspeed", 1).slots(3200, 8, 1, factor)) == deepspeed


def test_deepspeed_is_torch_to_the_last_bit() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    for _ in range(500):
        tokens, experts, top_k = (int(rng.integers(1, most)) for most in (20_000, 513, 9))
        factor = round(float(rng.uniform(0.1, 4.0)), 2)
        theirs = int(torch.ceil((tokens / experts) * torch.tensor(factor * top_k)).to(torch.int64))
        assert int(rule("deepspeed", top_k).slots(tokens, experts, top_k, factor)) == max(theirs, 4)


def test_capacity_is_vectorised_over_tokens() -> None:
    tokens = np.array([0, 1, 100, 1000, 4096])
    for name in STACKS:
        limit = CapacityLimit(name, 1.25)
        assert limit.capacity(tokens, 64, 2).tolist() == [int(limit.capacity(int(t), 64, 2)) for t in tokens]


def test_minimum_multiple_and_rounding_follow_the_stack_or_the_user() -> None:
    assert int(CapacityLimit("deepspeed", 1.0, minimum=8).capacity(100, 64, 1)) == 8
    assert int(CapacityLimit("tutel", 1.0, multiple=16).capacity(1000, 64, 2)) == 32
    assert int(CapacityLimit("flax", 1.0).capacity(8 * 64 + 32, 64, 1)) == 8  # 8.5 rounds to even, as Python does
    assert int(CapacityLimit("mesh-tf", 2.0).capacity(4, 2, 2)) == 4  # never more than the group has


def test_deepspeed_changes_with_the_number_of_choices() -> None:
    assert [rule("deepspeed", k).policies[0] for k in (1, 2, 3, 8)] == ["random", "position", "probs", "probs"]
    assert [rule("deepspeed", k).gates for k in (1, 2, 6)] == ["unchanged", "after", "after"]
    assert [rule("deepspeed", k).choices_first for k in (1, 2, 6)] == [False, True, False]


def test_tutel_follows_the_need() -> None:
    tutel = rule("tutel", 2)
    assert int(tutel.slots(1000, 64, 2, 0.0, needed=57)) == 57
    assert int(tutel.slots(1000, 64, 2, -1.25, needed=57)) == 40
    assert int(tutel.slots(1000, 64, 2, -1.25, needed=33)) == 33
    drops = CapacityLimit("tutel", 0.0).apply([[30.0, 10.0], [20.0, 20.0]], 40, 1)
    assert drops.capacity.tolist() == [30, 20] and (drops.drop_rate == 0).all()
    assert drops.slot_utilisation == pytest.approx([40 / 60, 1.0])


def test_budgets_hold_for_the_whole_device() -> None:
    limit = CapacityLimit("device-budget", 1.0)
    assert int(limit.capacity(1024, 160, 6, num_sources=8)) == 768
    assert int(CapacityLimit("rank-budget", 1.5, multiple=128).capacity(1000, 64, 2, num_sources=8)) == 384
    drops = limit.apply([30.0, 30.0, 10.0, 10.0], 80, 1, num_sources=2)
    assert drops.kept == pytest.approx([20, 20, 10, 10]) and float(drops.drop_rate) == pytest.approx(0.25)
    with pytest.raises(LayoutError, match=r"7 devices do not divide 64 experts\. Use 8\."):
        limit.apply(np.ones(64), 64, 1, num_sources=7)


def test_groups_split_large_batches() -> None:
    limit = CapacityLimit("mesh-tf", 2.0, group_tokens=1024)
    assert limit.blocks(4096).tolist() == [1024] * 4
    assert int(limit.capacity(4096, 64, 1)) == int(CapacityLimit("mesh-tf", 2.0).capacity(1024, 64, 1)) == 32
    assert CapacityLimit("megatron", 1.0).blocks(10, 4).tolist() == [3, 3, 2, 2]


def test_every_rule_says_where_it_comes_from() -> None:
    assert set(STACKS) < set(RULES) and set(RULES["megatron"].policies) <= set(POLICIES)
    for one in RULES.values():
        assert one.source and one.lost and one.policies[0] in POLICIES


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_a_factor_must_leave_room(factor: float) -> None:
    with pytest.raises(InputError, match="capacity factor"):
        CapacityLimit("vmoe", factor)
    if math.isfinite(factor):
        CapacityLimit("tutel", factor)


def test_wrong_limits_are_refused() -> None:
    with pytest.raises(InputError, match=r"'tutle'.*tutel"):
        CapacityLimit("tutle", 1.0)
    with pytest.raises(InputError, match=r"'first'.*position"):
        CapacityLimit("tutel", 1.0, "first")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="turns dropping off in Megatron"):
        CapacityLimit("megatron", -1.0)
    with pytest.raises(InputError, match="multiple 0"):
        CapacityLimit("megatron", 1.0, multiple=0)
    with pytest.raises(WorkloadError, match="finite"):
        CapacityLimit("megatron", 1.0).apply([1.0, math.nan], 2, 1)
    assert hash(CapacityLimit("flax", 1.25)) == hash(CapacityLimit("flax", 1.25))


def test_published_models_keep_their_factors(deepseek: ModelConfig) -> None:
    switch, nllb, glam = (load(name) for name in ("google/switch-c-2048", "facebook/nllb-moe-54b", "glam-64b"))
    assert default_limit(switch) == CapacityLimit("mesh-tf", 2.0, group_tokens=1024)
    assert default_limit(glam) == CapacityLimit("lingvo", 2.0)
    known = published(switch)
    assert known is not None and known.trained_factor == 1.25 and "2101.03961" in known.source
    limit = default_limit(nllb)
    assert limit is not None and limit.capacity([1, 77, 1024], 128, 2).tolist() == [1, 77, 1024]
    for name in ("mixtral-8x7b", "Qwen/Qwen3-30B-A3B", "openai/gpt-oss-120b", "meta-llama/Llama-3.1-8B"):
        assert default_limit(load(name)) is None
    assert default_limit(deepseek) is None and published(deepseek) is None


def test_a_toml_factor_counts_slots_over_the_even_share(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    text = (Path(__file__).parents[1] / "planner/model/configs/glam-64b.toml").read_text()
    file.write_text(text.replace('name = "glam-64b"', 'name = "own"') + "capacity_factor = 1.5\n")
    limit = default_limit(load(str(file)))
    assert limit is not None and int(limit.capacity(640, 64, 2)) == 30


def test_drops_on_dropless_models_are_flagged(deepseek: ModelConfig) -> None:
    red = caution(deepseek, CapacityLimit("megatron", 1.25))
    assert red is not None and red.level == "red" and "never" in red.text
    assert caution(deepseek, None) is None and caution(deepseek, CapacityLimit("tutel", 0.0)) is None
    switch = load("google/switch-c-2048")
    assert caution(switch, default_limit(switch)) is None
    tight = caution(switch, CapacityLimit("mesh-tf", 1.0))
    assert tight is not None and tight.level == "amber" and "1.25" in tight.text
    glam = load("glam-64b")
    assert caution(glam, CapacityLimit("lingvo", 2.0)) is None and caution(glam, CapacityLimit("megatron", 1.0)) is None
    assert "-1.561" in QUALITY_NOTE and "Table 1" in QUALITY_NOTE


def test_beyond_a_buffer_engines_chunk_stop_or_change_over() -> None:
    vllm, sglang = buffer_limit(engine("vllm")), buffer_limit(engine("sglang"))
    assert vllm.passes([0, 256, 257, 1000]).tolist() == [1, 1, 2, 4] and not vllm.falls_back(1000)
    vllm.check(1000)
    sglang.check(128)
    with pytest.raises(Infeasible, match="200 tokens per rank exceed") as stopped:
        sglang.check(200)
    assert "--max-num-seqs 128" in stopped.value.remedies[0]
    assert "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK=200" in stopped.value.remedies[1]
    assert "1024 only" in sglang.remedies(2000)[1]
    fallback = buffer_limit(engine("trtllm"), 64)
    assert fallback.passes(100).tolist() == 1 and fallback.falls_back([64, 65]).tolist() == [False, True]
    assert "all-gather" in fallback.explain(100) and "fit" in fallback.explain(64)
    with pytest.raises(InputError):
        buffer_limit(engine("sglang"), 4096)


def test_steps_beyond_the_buffer_cost_passes_or_are_refused(deepseek: ModelConfig) -> None:
    where, layout = parse_cluster("h200-sxm:2x8"), Layout(attention_dp=16, ep=16)
    tokens = np.array([256.0, 512.0, 513.0]) * 16

    def exchange(name: str, backend: str = "deepep") -> Any:
        tables_only = replace(engine(name), calibrations=OFF)
        routed = StepCost(deepseek, layout, where, tables_only, backend).routed
        total = Sum(tokens.shape)
        routed._add_exchange(total, deepseek.moe, 1, "decode", np.ones(3), tokens)  # type: ignore[arg-type]
        return total.terms["dispatch"]

    once, twice, thrice = exchange("vllm")
    assert twice == pytest.approx(2 * once) and thrice > twice
    gathered = exchange("trtllm", "allgather_reducescatter")
    assert exchange("trtllm")[0] == pytest.approx(once) and exchange("trtllm")[1:] == pytest.approx(gathered[1:])
    deploy(deepseek, where, layout, engine("sglang"), Limits(128, 4096), "deepep", 1000)
    deploy(deepseek, where, layout, engine("sglang"), Limits(129, 4096), "allgather_reducescatter", 1000)
    with pytest.raises(Infeasible, match="129 tokens per rank exceed the dispatch buffer of sglang"):
        deploy(deepseek, where, layout, engine("sglang"), Limits(129, 4096), "deepep", 1000)


def drops(capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    asked = {"experts": 64, "top_k": 1, "tokens": 1024, "capacity_factor": 1.0, "rule": "mesh-tf"} | options
    count_drops(**asked, json=True)
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_command_agrees_with_the_closed_form(capsys: pytest.CaptureFixture[str]) -> None:
    """Handbook serving 4.3: a mean of 16 tokens per expert drops about 10 % at factor 1, 128 about 3.5 %."""
    few, many = drops(capsys), drops(capsys, tokens=8192)
    assert {"capacity", "drop_rate", "fully_dropped_rate", "slot_utilisation"} <= set(few)
    assert (few["capacity"], many["capacity"]) == (16, 128)
    assert few["drop_rate"] == pytest.approx(0.0992, abs=0.005) and many["drop_rate"] == pytest.approx(0.035, abs=0.002)
    assert few["fully_dropped_rate"] == pytest.approx(few["drop_rate"])
    assert few["slot_utilisation"] == pytest.approx(1 - few["drop_rate"])
    low, high = few["interval"]["drop_rate"]
    assert low < few["drop_rate"] < high and few["interval"]["batches"] >= 8
    assert few["if_skewed"]["drop_rate"] > 1.5 * few["drop_rate"]
    assert few == drops(capsys)


def test_command_reads_counts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """An expert of popularity p x mean keeps 1 / p of its tokens at factor 1 (handbook serving 4.3)."""
    file = tmp_path / "counts.csv"
    rows = [f"{layer},{expert},{30 if expert == layer else 10}" for layer in (3, 4) for expert in range(8)]
    file.write_text("\n".join(["layer,expert,assignments", *rows]) + "\n")
    found = drops(capsys, experts=8, tokens=20_000, counts=file, rule="vmoe")
    assert found["drop_rate"] == pytest.approx(0.3 - 0.125, abs=0.01)
    assert [row["layer"] for row in found["per_layer"]] == [3, 4] and found["if_skewed"] is None
    with pytest.raises(InputError, match=r"8 experts, not 64: give --experts 8"):
        drops(capsys, counts=file)


@pytest.mark.skipif(not RECORDS.exists(), reason="needs the routing records")
def test_command_reads_recorded_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    record = RECORDS / "deepseek_v2_lite_law.npz"
    found = drops(capsys, top_k=6, tokens=512, counts=record, rule="megatron")
    assert len(found["per_layer"]) == 26 and found["drop_rate"] > 0.15
    with pytest.raises(InputError, match="give --top-k 6"):
        drops(capsys, top_k=2, counts=record)


def test_command_options_reach_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    plain = drops(capsys, top_k=2, rule="megatron", sources=4)
    assert (plain["policy"], plain["padded"], plain["capacity"]) == ("probs", False, 8)
    assert plain["processed_rows"] == pytest.approx(2048 * (1 - plain["drop_rate"]))
    padded = drops(capsys, top_k=2, rule="megatron", sources=4, pad=True, policy="random", min_capacity=16)
    assert padded["processed_rows"] == 16 * 64 * 4 and any("what-if" in note for note in padded["note"])
    moved = drops(capsys, top_k=2, rule="megatron", reroute=True)
    assert moved["drop_rate"] < 0.1 * moved["rerouted_rate"] and moved["if_skewed"] is None
    assert drops(capsys, rule="tutel", capacity_factor=0.0)["drop_rate"] == 0
    assert any("factor of 2" in note for note in drops(capsys, top_k=2)["note"])
    assert any("--sources 4" in note for note in drops(capsys, tokens=4096)["note"])
    assert drops(capsys, rule="device-budget", sources=8)["capacity_scope"].startswith("per device")


def test_command_text_answers_first() -> None:
    counts = np.tile(np.arange(1.0, 9.0), (2, 1))
    facts = drops_facts(Step(8, 2, 512), CapacityLimit("deepspeed", 1.0), record=("log", [0, 1], counts))
    lines = drops_text(facts).splitlines()
    assert lines[0].endswith("128 slots per expert at factor 1 (deepspeed, position)") and " % of assign" in lines[0]
    assert any(line.startswith("Layers that drop most") for line in lines)
    assert lines[-1].startswith("Source microsoft/DeepSpeed")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": 0}, InputError, "--tokens 0"),
        ({"sources": 2000}, InputError, "--sources 2000"),
        ({"top_k": 65}, ModelConfigError, "top_k=65"),
        ({"capacity_factor": 0.0}, InputError, "capacity factor 0 is no capacity for mesh-tf"),
        ({"tokens": 10**9}, InputError, "at most 3,125,000"),
        ({"counts": Path("/nope.csv")}, WorkloadError, "nope"),
        ({"skew": "mixd"}, WorkloadError, "mixed"),
    ],
)
def test_command_refuses_bad_input(
    capsys: pytest.CaptureFixture[str], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        drops(capsys, **options)
