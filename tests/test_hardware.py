"""Profiles: every bundled file, the checks on a user's file, and cluster strings."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import ProfileError
from planner.hardware import Cluster, Gpu, measured_engines, parse_cluster, profile_path, schema, system, systems
from planner.hardware.plausibility import DENSE_BF16_FLOP_PER_S, implausible

PROFILES = Path(__file__).parents[1] / "hardware_profiles"
REQUIRED = {
    "a100-80-sxm",
    "a100-40-sxm",
    "a100-80-pcie",
    "h100-sxm",
    "h100-pcie",
    "h100-nvl",
    "h200-sxm",
    "h800-sxm",
    "h20",
    "b200-sxm",
    "b300-sxm",
    "gb200-nvl72",
    "gb300-nvl72",
    "l4",
    "l40s",
    "rtx-4090",
    "rtx-5090",
    "rtx-pro-6000",
    "mi300x",
    "mi325x",
    "mi355x",
    "gaudi-3",
    "tpu-v5e",
    "tpu-v5p",
    "tpu-v6e",
    "tpu-v7x",
    "trainium2",
    "m3-ultra",
    "dgx-spark",
}
SLOWER_PARTS = {"h20", "h20-141", "l4", "rtx-4090", "rtx-5090"}
"""Twice their rate is still below the fastest part of the same architecture."""

MINIMAL = """
title = "Box"
[gpu]
name = "L40S"
vendor = "NVIDIA"
arch = "sm89"
hbm_bytes = { value = 47_663_399_567, source = "driver, 2026-11-20" }
hbm_bytes_per_s = { value = 8.64e11, source = "data sheet, 2023" }
[gpu.flop_per_s]
bf16 = { value = 3.62e14, source = "data sheet, 2023" }
fp8 = { value = 7.33e14, source = "data sheet, 2023" }
[node]
gpus = { value = 4, source = "our rack" }
[pcie]
name = "PCIe 4 x16"
bytes_per_s = { value = 3.2e10, source = "PCIe 4.0" }
"""


@pytest.fixture(params=systems())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write(tmp_path: Path, text: str, stem: str = "box") -> str:
    path = tmp_path / f"{stem}.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def faults(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(ProfileError) as caught:
        system(write(tmp_path, text))
    return str(caught.value).splitlines()


def test_the_promised_systems_are_there() -> None:
    assert set(systems()) >= REQUIRED
    assert len(systems()) >= 25
    assert systems() == tuple(sorted(systems()))


def test_every_bundled_profile_is_complete(name: str) -> None:
    found = system(name)
    assert found.name == name == profile_path(name).stem
    gpu = found.gpu
    assert gpu.peak_flop_per_s("bf16") > 0
    assert 16e9 <= gpu.hbm_bytes <= 600e9
    assert 0.2e12 <= gpu.hbm_bytes_per_s <= 10e12
    assert 30 <= gpu.peak_flop_per_s("bf16") / gpu.hbm_bytes_per_s <= 800
    assert 0.4 <= gpu.hbm_efficiency <= 1.0
    assert found.gpus_per_node in (1, 2, 4, 8, 16)
    assert found.scale_up.size >= found.gpus_per_node
    assert found.scale_out is None or found.scale_out.bytes_per_s <= 2 * found.scale_up.bytes_per_s
    assert found.pcie is None or found.pcie.bytes_per_s < gpu.hbm_bytes_per_s


def test_every_number_has_a_source_and_every_price_a_date(name: str) -> None:
    found = system(name)
    for path in ("gpu.hbm_bytes", "gpu.hbm_bytes_per_s", "gpu.hbm_efficiency", "node.gpus", "scale_up.bytes_per_s"):
        assert found.source(path)
    for fmt, _ in found.gpu.flop_per_s:
        assert found.source(f"gpu.flop_per_s.{fmt}")
    assert all(len(text) > 8 for _, text in found.sources)
    for price in found.prices:
        assert price.source.strip() and price.provider.strip()
        assert re.fullmatch(r"20\d\d(-\d\d(-\d\d)?)?", price.as_of) and price.as_of <= "2026-11-22"
        assert price.usd < 30 if price.basis == "rental" else price.usd > 1_000


@pytest.mark.parametrize(
    ("name", "fmt", "tflop_per_s"),
    [
        ("h100-sxm", "fp8", 1979),
        ("h200-sxm", "fp8", 1979),
        ("l40s", "fp8", 733),
        ("mi355x", "fp8", 5000),
        ("mi355x", "fp4", 10100),
        ("b200-sxm", "fp4", 9000),
        ("gb300-nvl72", "fp4", 15000),
        ("a100-80-sxm", "bf16", 312),
        ("rtx-4090", "bf16", 165.2),
        ("trainium2", "fp8", 1299),
        ("gaudi-3", "fp8", 1677),
    ],
)
def test_rates_are_dense(name: str, fmt: str, tflop_per_s: float) -> None:
    assert system(name).gpu.peak_flop_per_s(fmt) == pytest.approx(tflop_per_s * 1e12)


@pytest.mark.parametrize(("name", "tokens"), [("h100-sxm", 295), ("h200-sxm", 206), ("b200-sxm", 281), ("h20", 37)])
def test_g2_fp8_ridge(name: str, tokens: int) -> None:
    assert round(system(name).gpu.ridge_tokens("fp8", weight_bytes=1.0)) == tokens


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("h100-sxm", 84.94), ("h200-sxm", 150.1), ("b200-sxm", 191.5), ("gb200-nvl72", 197.9), ("mi300x", 206.1)],
)
def test_memory_is_what_the_runtime_reports(name: str, gigabytes: float) -> None:
    assert system(name).gpu.hbm_bytes / 1e9 == pytest.approx(gigabytes, rel=1e-3)


def test_narrow_formats_fall_back_to_the_next_wider_one() -> None:
    a100, h100, b200 = (system(n).gpu for n in ("a100-80-sxm", "h100-sxm", "b200-sxm"))
    assert [a100.compute_format(f) for f in ("fp8", "fp8_block", "nvfp4", "int4")] == ["bf16"] * 4
    assert [h100.compute_format(f) for f in ("fp8_block", "mxfp4", "int8", "fp16")] == ["fp8", "fp8", "int8", "bf16"]
    assert b200.peak_flop_per_s("nvfp4") == b200.peak_flop_per_s("mxfp4") == 9e15
    with pytest.raises(ProfileError, match=r"fp7.*unknown"):
        h100.peak_flop_per_s("fp7")
    unrated = Gpu("X", "V", "a", None, 1e9, 1e12, (), (), 0.8, None)
    with pytest.raises(ProfileError, match=r"FLOP/s for fp8 are unknown.*flop_per_s.bf16"):
        unrated.peak_flop_per_s("fp8")


def test_matmul_ceiling_says_whether_it_was_measured(name: str) -> None:
    gpu = system(name).gpu
    for fmt in ("bf16", "fp8", "nvfp4", "int8"):
        ceiling, measured = gpu.matmul_ceiling_flop_per_s(fmt)
        peak = gpu.peak_flop_per_s(fmt)
        assert 0.4 * peak <= ceiling <= peak
        assert measured == (gpu.compute_format(fmt) in dict(gpu.matmul_flop_per_s))
        assert measured or ceiling == pytest.approx(0.7 * peak)


def test_streaming_efficiency_is_measured_or_flagged() -> None:
    b200, h100, mi325x = (system(n) for n in ("b200-sxm", "h100-sxm", "mi325x"))
    assert b200.gpu.hbm_efficiency == 0.85 and "measured" in str(b200.source("gpu.hbm_efficiency"))
    assert h100.gpu.hbm_efficiency == 0.80 and "default" in str(h100.source("gpu.hbm_efficiency"))
    assert mi325x.gpu.hbm_efficiency == 0.65
    assert "AMD's is used" in str(system("tpu-v5e").source("gpu.hbm_efficiency"))


@pytest.mark.parametrize(
    ("text", "canonical", "gpus", "scale_up"),
    [
        ("h200-sxm:2x8", "h200-sxm:2x8", 16, 8),
        ("h200-sxm:8", "h200-sxm:1x8", 8, 8),
        ("h200-sxm", "h200-sxm:1x8", 8, 8),
        ("H200-SXM:4", "h200-sxm:1x4", 4, 4),
        ("gb200-nvl72:18x4", "gb200-nvl72:18x4", 72, 72),
        ("gb200-nvl72:72", "gb200-nvl72:18x4", 72, 72),
        ("gb200-nvl72:2x4", "gb200-nvl72:2x4", 8, 8),
        ("gb200-nvl72:36x4", "gb200-nvl72:36x4", 144, 72),
        ("l40s:2x4", "l40s:2x4", 8, 4),
        ("dgx-spark:2x1", "dgx-spark:2x1", 2, 1),
    ],
)
def test_cluster_strings(text: str, canonical: str, gpus: int, scale_up: int) -> None:
    cluster = parse_cluster(text)
    assert (cluster.name, cluster.num_gpus, cluster.scale_up_gpus) == (canonical, gpus, scale_up)
    assert str(cluster) == canonical and cluster.gpu is cluster.system.gpu


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h100:8", "did you mean h100-nvl, h100-pcie, h100-sxm"),
        ("", "names no system"),
        (":8", "names no system"),
        ("h200-sxm:", "is not a size"),
        ("h200-sxm:axb", "'axb' is not a size"),
        ("h200-sxm:2x", "is not a size"),
        ("h200-sxm:-1x8", "is not a size"),
        ("h200-sxm:0x8", "has no GPUs"),
        ("h200-sxm:2x0", "has no GPUs"),
        ("h200-sxm:2x16", "Write h200-sxm:4x8"),
        ("h200-sxm:16", "Write h200-sxm:2x8"),
        ("gb200-nvl72:73", "Write gb200-nvl72:19x4"),
        ("gb200-nvl72:6", "Write gb200-nvl72:2x4"),
        ("l4:2x8", "needs a network.*scale_out"),
        ("nowhere/mine.toml:1x4", "no such file"),
    ],
)
def test_bad_cluster_strings_name_the_remedy(text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        parse_cluster(text)


@given(st.text(max_size=20))
@settings(deadline=None, derandomize=True)
def test_any_text_is_a_cluster_or_a_profile_error(text: str) -> None:
    try:
        assert parse_cluster(text).num_gpus >= 1
    except ProfileError as error:
        assert str(error)


@given(st.sampled_from(("h200-sxm", "gb300-nvl72", "mi355x", "tpu-v5p")), st.integers(1, 500), st.integers(1, 16))
@settings(deadline=None, derandomize=True)
def test_clusters_survive_their_own_name(name: str, nodes: int, gpus: int) -> None:
    found = system(name)
    text = f"{name}:{nodes}x{gpus}"
    if gpus > found.gpus_per_node:
        with pytest.raises(ProfileError):
            parse_cluster(text)
        return
    cluster = parse_cluster(text)
    assert cluster == Cluster(found, nodes, gpus) == parse_cluster(cluster.name)
    assert 1 <= cluster.scale_up_gpus <= min(cluster.num_gpus, found.scale_up.size)


def test_a_user_file_works_like_a_bundled_one(tmp_path: Path) -> None:
    cluster = parse_cluster(write(tmp_path, MINIMAL) + ":1x4")
    box = cluster.system
    assert (box.name, box.gpu.name, cluster.num_gpus) == ("box", "L40S", 4)
    assert (box.scale_up.name, box.scale_up.bytes_per_s, box.scale_up.size) == ("PCIe 4 x16", 3.2e10, 4)
    assert box.source("gpu.hbm_bytes") == "driver, 2026-11-20"
    assert (box.scale_out, box.node_power_w, box.gpu.tdp_w, box.prices) == (None, None, None, ())
    assert box.rental_usd_per_gpu_hour() is None and box.purchase_usd_per_gpu() is None


def test_user_directories_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, MINIMAL, "l40s")
    write(tmp_path, MINIMAL, "ours")
    monkeypatch.setenv("MOEPLAN_PROFILES", str(tmp_path))
    assert "ours" in systems() and "h200-sxm" in systems()
    assert system("l40s").gpus_per_node == 4
    monkeypatch.setenv("MOEPLAN_PROFILES", str(tmp_path / "gone"))
    with pytest.raises(ProfileError, match=r"MOEPLAN_PROFILES.*not a directory"):
        systems()


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert system(path).title == "Box"
    write(tmp_path, MINIMAL.replace('"Box"', '"Bigger box"'))
    os.utime(path, ns=(1, 1))
    assert system(path).title == "Bigger box"


def test_all_faults_of_a_file_come_together(tmp_path: Path) -> None:
    broken = (
        MINIMAL.replace("hbm_bytes = {", "hbm_byts = {")
        .replace('8.64e11, source = "data sheet, 2023"', '864, source = "data sheet, 2023"')
        .replace("7.33e14", "1.466e15")
        .replace(', source = "our rack"', "")
    )
    lines = faults(tmp_path, broken)
    assert all(line.startswith("box.toml: ") for line in lines)
    assert "box.toml: gpu.hbm_bytes: missing" in lines
    assert "box.toml: gpu.hbm_byts: unknown key (did you mean hbm_bytes?)" in lines
    assert any(line.startswith("box.toml: node.gpus.source: missing") for line in lines)
    assert any("gpu.hbm_bytes_per_s: 864 bytes/s" in line and "x 1e+09" in line for line in lines)
    assert any("gpu.flop_per_s.fp8" in line and "4.05 x bf16" in line and "sparse" in line for line in lines)
    assert len(lines) == 5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[pcie]", "[pci]", "pci: unknown key (did you mean pcie?)"),
        ("[pcie]", "[scale_up]\nbandwidth = 3\n[pcie]", "scale_up.bandwidth: unknown key"),
        ('{ value = 4, source = "our rack" }', "4", 'node.gpus: 4 has no source. Write { value = ..., source = "'),
        ('"our rack"', '" "', "node.gpus.source: "),
        ("value = 4,", "value = 4.5,", "node.gpus.value: "),
        ("value = 4,", "value = 0,", "node.gpus: 0 GPUs is outside"),
        ("3.62e14", "'3.62e14'", "gpu.flop_per_s.bf16.value: Input should be a valid number, got '3.62e14'"),
        ("3.62e14", "-3.62e14", "gpu.flop_per_s.bf16.value: "),
        ("3.62e14", "nan", "gpu.flop_per_s.bf16.value: "),
        ("3.62e14", "362", "gpu.flop_per_s.bf16: 362 FLOP/s is outside 1e+12 to 2e+17: check the unit; 362 x 1e+12"),
        ("3.62e14", "7.33e14", "gpu.flop_per_s.bf16: 7.33e+14 FLOP/s, and the fastest sm89 part has 3.66e+14 dense"),
        ("47_663_399_567", "48", "gpu.hbm_bytes: 48 bytes is outside"),
        ("3.2e10", "32", "pcie.bytes_per_s: 32 bytes/s is outside"),
        ("3.2e10", "3.2e13", "pcie.bytes_per_s: 3.2e+13 bytes/s is outside"),
        ('arch = "sm89"', "arch = 89", "gpu.arch: Input should be a valid string"),
        (
            "[node]",
            '[gpu.matmul_flop_per_s]\nbf16 = { value = 5e14, source = "mine, 2026" }\n[node]',
            "gpu.matmul_flop_per_s.bf16: measured 5e+14 FLOP/s exceeds the peak",
        ),
    ],
)
def test_one_fault_one_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert MINIMAL.count(old) == 1
    assert any(line.startswith(f"box.toml: {message}") for line in faults(tmp_path, MINIMAL.replace(old, new)))


@pytest.mark.parametrize(
    ("price", "message"),
    [
        ('basis = "rental"\nusd = 28000', "price.0.usd: $28000 per GPU-hour is outside"),
        ('basis = "purchase"\nusd = 3000000', "price.0.usd: $3e+06 per GPU is outside"),
        ('basis = "lease"\nusd = 2', "price.0.basis: "),
    ],
)
def test_price_faults(tmp_path: Path, price: str, message: str) -> None:
    rest = '\nas_of = "2026-11"\nprovider = "us"\nsource = "invoice"\n'
    assert faults(tmp_path, f"{MINIMAL}\n[[price]]\n{price}{rest}")[0].startswith(f"box.toml: {message}")


def test_prices_need_a_date(tmp_path: Path) -> None:
    dateless = f'{MINIMAL}\n[[price]]\nbasis = "rental"\nusd = 2.0\nprovider = "us"\nsource = "invoice"\n'
    assert faults(tmp_path, dateless) == ["box.toml: price.0.as_of: missing"]
    assert "price.0.as_of" in faults(tmp_path, dateless + 'as_of = "yesterday"\n')[0]


def test_not_even_toml(tmp_path: Path) -> None:
    assert "box.toml: not valid TOML" in faults(tmp_path, "gpu = [")[0]


def test_doubling_any_dense_rate_is_noticed() -> None:
    checked = 0
    for path in sorted(PROFILES.glob("*.toml")):
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        if raw["gpu"]["arch"] not in DENSE_BF16_FLOP_PER_S or path.stem in SLOWER_PARTS:
            continue
        for rate in raw["gpu"]["flop_per_s"].values():
            rate["value"] *= 2
        assert implausible(raw), path.stem
        checked += 1
    assert checked >= 15


def test_schema_covers_the_file_and_matches_the_shipped_copy() -> None:
    now = schema()
    shipped = json.loads((PROFILES / "schema.json").read_text(encoding="utf-8"))
    assert now["properties"].keys() == shipped["properties"].keys() >= {"gpu", "node", "scale_up", "price"}
    gpu = now["$defs"]["GpuTable"]["properties"]
    assert gpu.keys() == shipped["$defs"]["GpuTable"]["properties"].keys()
    assert "bytes" in gpu["hbm_bytes"]["description"]


def test_readme_example_loads(tmp_path: Path) -> None:
    readme = (PROFILES / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```toml\n(.*?)```", readme, re.DOTALL)
    assert example
    box = system(write(tmp_path, example[1]))
    price = box.purchase_usd_per_gpu()
    assert box.gpus_per_node == 4 and price is not None and price.usd == 9000


def test_measured_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured_engines("m3-ultra") == ()
    meta = tmp_path / "measured" / "box" / "meta.json"
    meta.parent.mkdir(parents=True)
    meta.write_text('{"engines": ["vllm", "sglang"]}', encoding="utf-8")
    monkeypatch.setenv("MOEPLAN_PROFILES", str(tmp_path))
    assert measured_engines("box") == ("sglang", "vllm")
    meta.write_text("{}", encoding="utf-8")
    with pytest.raises(ProfileError, match=r"meta.json"):
        measured_engines("box")


def test_importing_hardware_stays_light() -> None:
    heavy = "import sys, planner.hardware; print([m for m in ('pydantic', 'numpy', 'pandas') if m in sys.modules])"
    shown = subprocess.check_output([sys.executable, "-c", heavy], cwd=PROFILES.parent, text=True)
    assert shown.strip() == "[]"
