"""The page of a plan or a simulation: what is recommended, how sure, and the evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.report.blocks import Page, Section, Table
from planner.report.sections import Facts, candidates, evidence
from planner.report.wording import duration, money, number, title

_ORIGINS = {
    "measured": "read from a measured point",
    "interpolated": "between measured points",
    "extrapolated": "beyond measured points",
    "roofline": "data-sheet rates, not measured",
}


def plan_page(facts: Facts) -> Page:
    """Page of the facts of `plan --json` or `simulate --json`; every key may be missing."""
    layout = facts.get("layout") or {}
    model, cluster = _model(facts), facts.get("cluster")
    verdict = _verdict(facts)
    return Page(
        f"{model} on {cluster}" if cluster else model,
        verdict,
        str(facts.get("headline") or _headline(facts) or verdict[1]),
        tuple(_tiles(facts, layout)) if layout else (),
        tuple(_summary(facts)),
        tuple(evidence(facts)),
        str(facts.get("command") or ""),
        ", ".join(f"{name} {value}" for name, value in (facts.get("versions") or {}).items()),
    )


def _summary(facts: Facts) -> list[Section]:
    sections = []
    question = tuple((title(str(key)), str(value)) for key, value in _question(facts).items())
    if question:
        sections.append(Section("The question", "", (Table(("", ""), question, frozenset({0, 1})),), style="question"))
    if facts.get("binding_constraint"):
        sections.append(Section("What limits it", str(facts["binding_constraint"])))
    apart = facts.get("disaggregation")
    if apart:
        sections.append(Section("Prefill and decode apart?", f"{apart['verdict'].capitalize()}: {apart['reason']}."))
    best = candidates(facts)
    if best is not None:
        sections.append(Section("Best layouts", "", (best,), style="layouts"))
    if facts.get("next"):
        sections.append(Section("What to try next", "", items=tuple(str(item) for item in facts["next"])))
    sure = _sure(facts)
    if sure is not None:
        sections.append(sure)
    if facts.get("warnings"):
        items = tuple(str(item) for item in facts["warnings"])
        sections.append(Section("Warnings", "", items=items, style="warnings"))
    return sections


def _sure(facts: Facts) -> Section | None:
    shares = facts.get("origin_share") or {}
    origins = tuple((name, shares[name], meaning) for name, meaning in _ORIGINS.items() if shares.get(name))
    said = ((facts.get("certainty") or {}).get("sentence"), facts.get("past_error"))
    finding = " ".join(str(text) for text in said if text)
    return Section("How sure", finding, shares=origins) if origins or finding else None


def _model(facts: Facts) -> str:
    model = facts.get("model") or {}
    name = model if isinstance(model, str) else model.get("name")
    return str(name or (facts.get("question") or {}).get("model") or "model")


def _question(facts: Facts) -> Mapping[str, Any]:
    """What was asked; a simulation says it in facts of their own."""
    if "question" in facts:
        return facts["question"] or {}
    return {key: facts[key] for key in ("workload", "engine") if facts.get(key)}


def _verdict(facts: Facts) -> tuple[str, str]:
    if facts.get("meets_slo"):
        return "good", "Meets the SLO"
    if "meets_slo" in facts and facts["meets_slo"] is None and "saturation" in facts:
        return "plain", "No SLO given"
    if facts.get("feasible", True):
        return "short", "Misses the SLO"
    return "bad", "Does not fit"


def _headline(facts: Facts) -> str:
    """First sentence of a simulation, whose facts carry none."""
    if "saturation" not in facts:
        return ""
    name = (facts.get("layout") or {}).get("name") or facts.get("name")
    per_gpu = number(facts.get("output_tok_per_s_per_gpu"))
    text = f"{name}: {number(facts.get('output_tok_per_s'))} output tok/s, {per_gpu} per GPU, {facts['saturation']}"
    if facts.get("meets_slo") is None:
        return text
    return f"{text}; {facts['worst_objective']} at {facts['worst_ratio']:.0%} of its limit"


def _tiles(facts: Facts, layout: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    def p95(metric: str) -> str:
        return duration((facts.get(metric) or {}).get("p95"))

    degrees = " · ".join(
        f"{key.replace('_', '-')} {layout[key]}"
        for key in ("tp", "attention_dp", "ep", "moe_tp", "pp", "replicas")
        if layout.get(key, 1) != 1
    )
    monthly = facts.get("usd_per_month")
    per_mtok = "per million output tokens"
    return [
        ("Layout", str(layout.get("name", "")), degrees or "one GPU"),
        ("GPUs", number(layout.get("num_gpus"), whole=True), str(facts.get("cluster") or "")),
        (
            "Price",
            money(facts.get("usd_per_mtok_output")),
            f"{per_mtok}; {money(monthly)} a month" if monthly else per_mtok,
        ),
        ("TTFT", p95("ttft_s"), "p95"),
        ("TPOT", p95("tpot_s"), "p95"),
        ("Throughput", number(facts.get("output_tok_per_s")), "output tok/s, all GPUs"),
        ("Per GPU", number(facts.get("output_tok_per_s_per_gpu")), "output tok/s"),
    ]
