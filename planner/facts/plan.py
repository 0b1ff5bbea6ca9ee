"""A recommendation as one plain dictionary: the same facts for JSON, the terminal text and the report."""

from __future__ import annotations

import numpy as np

from planner import __version__
from planner.cost import StepCost
from planner.deployment import UNSUSTAINED, Run, simulated_replicas
from planner.facts.basic import Facts, latency_facts, layout_facts, memory_facts, model_facts, slo_facts
from planner.facts.certainty import certainty_facts, is_unlike_measured, meets_chance, past_errors
from planner.facts.experts import balance_facts, expert_binding, expert_facts, expert_warnings, outside_facts
from planner.facts.launch import launch_facts
from planner.facts.money import run_money
from planner.facts.outlook import cost_curve, heat_facts, monthly_usd, sensitivity_facts
from planner.facts.prices import PRICES, price_assumptions, price_facts, rule_note
from planner.facts.series import cdf_facts, timeline_facts
from planner.facts.sharing import sharing_facts, sharing_warnings
from planner.facts.tactics import run_tactic_facts, tactic_assumptions, tactic_warnings
from planner.model import ModelConfig
from planner.model.precision import compute_format
from planner.recommend import Recommendation
from planner.small import PAST_ERROR
from planner.steptime import StepTime
from planner.tactics import PLAIN
from planner.units import format_chance, format_seconds, format_usd, significant

_SURE = 0.9
"""Chance below which a surer layout is pointed out."""
_UNLIKE = "None of those servers was like this one."
_PLAIN_ONLY = "None of them drafted tokens or overlapped the exchange."
_TOP = 5
_FEW_REQUESTS = 100


def plan_facts(rec: Recommendation, command: str) -> Facts:
    """Everything `plan --json` prints; `wall_s` is added by the caller, being no property of the answer."""
    rejected: dict[str, int] = {}
    nearest: dict[str, str] = {}
    for _, search in rec.searches:
        for reason, count in search.rejected.items():
            rejected[reason] = rejected.get(reason, 0) + count
        nearest |= {reason: text for reason, (_, text) in search.nearest_miss.items()}
    nothing = dict.fromkeys(("ttft_s", "tpot_s", "output_tok_per_s", "output_tok_per_s_per_gpu"))
    facts: Facts = {
        "question": _question(rec),
        "feasible": rec.feasible,
        "meets_slo": rec.meets_slo,
        "model": model_facts(rec.model),
        "considered": rec.considered,
        "simulated": len(rec.runs),
        "rejected": dict(sorted(rejected.items(), key=lambda item: -item[1])),
        "nearest_miss": nearest,
        "slo": slo_facts(rec.slo),
        "command": command,
        "versions": {"moeplan": __version__, "engine": f"{rec.engine.name} {rec.engine.version}"},
        "assumptions": _assumptions(rec),
        "residency": [outside_facts(found) for found in rec.outside],
    }
    if rec.winner is None:
        nothing |= dict.fromkeys((*PRICES, "money", "origin_share"))
        return (
            facts
            | nothing
            | {
                "cluster": rec.clusters[0].name,
                "layout": None,
                "headline": _no_layout(rec),
                "next": list(rec.remedies),
            }
        )
    return facts | _winner_facts(rec, rec.winner)


def _winner_facts(rec: Recommendation, winner: Run) -> Facts:
    candidate, summary = winner.deployment, winner.summary
    decode, prefill, prefill_time_share = operating_point(winner, candidate.cost())
    share = _mixed_share(decode, prefill, prefill_time_share)
    experts, balance = expert_facts(winner), balance_facts(winner)
    steps = {"decode": _scalars(decode), "prefill": _scalars(prefill)}
    return {
        "headline": headline(rec, winner),
        "cluster": candidate.cluster.name,
        "layout": layout_facts(candidate.layout),
        "settings": {
            "max_num_seqs": candidate.limits.max_num_seqs,
            "max_batched_tokens": candidate.limits.max_batched_tokens,
            "moe_backend": candidate.backend,
            "kv_format": candidate.model.kv_format,
        },
        "binding_constraint": _binding(winner, decode, prefill) + expert_binding(experts, balance),
        "ttft_s": latency_facts(summary, "ttft"),
        "tpot_s": latency_facts(summary, "tpot"),
        "e2e_s": latency_facts(summary, "e2e"),
        "output_tok_per_s": winner.output_tok_per_s,
        "output_tok_per_s_per_gpu": winner.output_tok_per_s / winner.num_gpus,
        **price_facts(winner.token_costs),
        "money": run_money(winner, rec.sustained_factor),
        "worst_objective": winner.worst_objective,
        "worst_ratio": winner.worst_ratio,
        "sustained_factor": rec.sustained_factor,
        **run_tactic_facts(winner),
        "memory": memory_facts(candidate.memory),
        "step": steps,
        "origin_share": share,
        "certainty": certainty_facts(winner, share, rec.sustained_factor),
        "past_error": _past_error(winner),
        "experts": experts,
        "balance": balance,
        "top": [_run_row(run) | {"chance": _chance(run, winner, share)} for run in rec.runs[:_TOP]],
        "front": [_front_row(run) for run in rec.runs],
        "next": _next_steps(rec, winner, share),
        **_outlook(rec, winner, steps, share, balance),
        "warnings": _warnings(rec, winner, share),
    } | sharing_facts(winner)


def _outlook(rec: Recommendation, winner: Run, steps: Facts, share: Facts, balance: Facts | None) -> Facts:
    """What charts rest on, the bill, and how to start the servers."""
    return {
        "usd_per_month": monthly_usd(winner, winner.num_gpus),
        "cost_curve": cost_curve(winner, rec.sustained_factor),
        "sensitivity": sensitivity_facts(winner, steps, share),
        "heat": heat_facts(winner, balance),
        "launch": [launch_facts(winner.deployment)],
        "cdf": cdf_facts(winner),
        "timeline": timeline_facts(winner),
    }


def operating_point(winner: Run, cost: StepCost) -> tuple[StepTime, StepTime, float]:
    """Decode and prefill step at the simulated mean batch, and the share of simulated time in steps with prompts."""
    steps = winner.simulation.steps
    seqs, tokens = np.asarray(steps.decode_seqs), np.asarray(steps.prefill_tokens)
    step_s = np.asarray(steps.step_s)
    decoding, prefilling = seqs > 0, tokens > 0
    ranks = cost.layout.attention_dp
    batch = max(1.0, float(seqs[decoding].mean()) / ranks) if decoding.any() else 1.0
    chunk = max(1.0, float(tokens[prefilling].mean())) if prefilling.any() else winner.workload.mean_prompt_tokens
    chunk = min(chunk, float(winner.deployment.limits.max_batched_tokens))
    context = winner.workload.mean_prompt_tokens + winner.workload.mean_output_tokens / 2
    share = float(step_s[prefilling].sum() / step_s.sum()) if step_s.sum() else 0.0
    return cost.decode(np.array(round(batch)), np.array(context)), cost.prefill(np.array(chunk), ranks=1.0), share


def origin_share_of(run: Run) -> Facts:
    """Share of the simulated time by origin of its prediction."""
    return _mixed_share(*operating_point(run, run.deployment.cost()))


def _mixed_share(decode: StepTime, prefill: StepTime, prefill_time_share: float) -> Facts:
    of_decode, of_prefill = decode.origin_share(), prefill.origin_share()
    return {
        name: of_decode[name] * (1 - prefill_time_share) + of_prefill[name] * prefill_time_share for name in of_decode
    }


def _scalars(step: StepTime) -> Facts:
    terms = {label: float(value) for label, value in step.terms.items()}
    return dict(sorted(((k, v) for k, v in terms.items() if v > 0), key=lambda item: -item[1]))


def headline(rec: Recommendation, run: Run) -> str:
    """The answer in one line: layout, GPUs, SLO and margin, price."""
    candidate = run.deployment
    margin = abs(1 - run.worst_ratio)
    verdict = (
        f"meets the SLO with {margin:.0%} to spare on {run.worst_objective}"
        if run.meets_slo
        else f"misses the SLO by {margin:.0%} on {run.worst_objective}"
    )
    if run.worst_objective == UNSUSTAINED:
        verdict = "cannot keep up, its queue grows"
    price = "price unknown"
    if run.usd_per_mtok_output is not None:
        rule = rule_note(run.token_costs.rule)
        price = f"{format_usd(run.usd_per_mtok_output)}/Mtok output{rule} at {rec.workload.arrivals}"
    gpus = f"{run.num_gpus} x {candidate.cluster.system.gpu.name}"
    if candidate.offload is not None:
        held = candidate.offload.held
        gpus += f", {held.resident} of {held.num_experts} experts in HBM ({candidate.offload.residency.policy})"
    return f"{candidate.layout} on {gpus}: {verdict}, {price}"


def _binding(run: Run, decode: StepTime, prefill: StepTime) -> str:
    """The tightest objective and the operation that dominates the step behind it."""
    step, name = (prefill, "prefill step") if run.worst_objective.startswith("TTFT") else (decode, "decode step")
    terms = _scalars(step)
    label, seconds = next(iter(terms.items()))
    total = sum(terms.values())
    tightest = f"{run.worst_objective} at {run.worst_ratio:.0%} of its limit"
    if run.worst_objective == UNSUSTAINED:
        tightest = "the load is more than the layout can serve"
    return (
        f"{tightest}; a {name} takes {format_seconds(total)}, "
        f"of which {label.replace('_', ' ')} {format_seconds(seconds)} ({seconds / total:.0%})"
    )


def _run_row(run: Run) -> Facts:
    return {
        "layout": str(run.deployment.layout),
        "name": run.deployment.name,
        "cluster": run.deployment.cluster.name,
        "num_gpus": run.num_gpus,
        "meets_slo": run.meets_slo,
        "ttft_p95_s": latency_facts(run.summary, "ttft")["p95"],
        "tpot_p95_s": latency_facts(run.summary, "tpot")["p95"],
        "output_tok_per_s_per_gpu": run.output_tok_per_s / run.num_gpus,
        "usd_per_mtok_output": run.usd_per_mtok_output,
        "reason": run.worst_objective
        if run.worst_objective == UNSUSTAINED
        else f"{run.worst_objective} at {run.worst_ratio:.0%} of its limit",
    }


def _chance(run: Run, winner: Run, share: Facts) -> float | None:
    """Chance that `run` meets the SLO; runs on the winner's kind of GPU rest on what the winner rests on."""
    if run.deployment.cluster.system != winner.deployment.cluster.system:
        share = origin_share_of(run)
    return meets_chance(run, share)


def _front_row(run: Run) -> Facts:
    tpot = latency_facts(run.summary, "tpot")["mean"]
    return {
        "layout": str(run.deployment.layout),
        "name": run.deployment.name,
        "cluster": run.deployment.cluster.name,
        "num_gpus": run.num_gpus,
        "interactivity_tok_per_s_per_user": 1 / tpot if tpot else None,
        "output_tok_per_s_per_gpu": run.output_tok_per_s / run.num_gpus,
        "meets_slo": run.meets_slo,
    }


def _question(rec: Recommendation) -> Facts:
    return {
        "model": rec.model.name,
        "clusters": ", ".join(c.name for c in rec.clusters),
        "workload": str(rec.workload),
        "slo": str(rec.slo),
        "engine": f"{rec.engine.name} {rec.engine.version}",
        "seed": rec.seed,
    }


def _assumptions(rec: Recommendation) -> list[Facts]:
    rows = [
        {"name": "engine defaults", "value": f"{rec.engine.name} {rec.engine.version}", "source": rec.engine.source},
        {"name": "weight formats", "value": _formats(rec.model), "source": rec.model.source},
    ]
    rows += tactic_assumptions(rec.tactics)
    for cluster in rec.clusters:
        system = cluster.system
        for path, value in (
            ("gpu.hbm_bytes", f"{system.gpu.hbm_bytes / 1e9:.1f} GB"),
            ("gpu.hbm_bytes_per_s", f"{system.gpu.hbm_bytes_per_s / 1e12:.2f} TB/s"),
        ):
            rows.append({"name": f"{system.name} {path}", "value": value, "source": system.source(path) or "unknown"})
    return rows + price_assumptions((cluster.system for cluster in rec.clusters), rec.terms)


def _formats(model: ModelConfig) -> str:
    return ", ".join(f"{part} {fmt}" for part, fmt in model.formats if part in ("expert", "attention", "dense_ffn"))


def _no_layout(rec: Recommendation) -> str:
    if rec.feasible:
        return f"No layout of {rec.model.name} on {_names(rec)} comes near the SLO at the demanded load"
    return f"{rec.model.name} does not fit on {_names(rec)}"


def _names(rec: Recommendation) -> str:
    return " or ".join(c.name for c in rec.clusters)


def _next_steps(rec: Recommendation, winner: Run, share: Facts) -> list[str]:
    if not winner.meets_slo:
        return list(rec.remedies)
    steps = []
    if rec.sustained_factor:
        steps.append(
            f"Demand can grow to at least {rec.sustained_factor:g} x before the SLO breaks on this layout."
            if rec.sustained_factor > 1
            else "There is less than 10 % room for growth: plan the next larger GPU count before demand rises."
        )
        if rec.sustained_factor > 1 and winner.usd_per_mtok_output:
            usd = format_usd(winner.usd_per_mtok_output / rec.sustained_factor)
            steps.append(f"At {rec.sustained_factor:g} x the demand the same GPUs cost about {usd}/Mtok output.")
    cheaper = [
        r for r in rec.runs if r.num_gpus < winner.num_gpus and not r.meets_slo and r.worst_objective != UNSUSTAINED
    ]
    if cheaper:
        near = min(cheaper, key=lambda r: r.worst_ratio)
        steps.append(
            f"{near.num_gpus} GPUs would do if {near.worst_objective} may be {near.worst_ratio:.2f} x its limit "
            f"({near.deployment.name})."
        )
    if winner.deployment.offload is not None:
        steps += [f"To hold all experts in HBM: {remedy}." for remedy in rec.remedies[:2]]
    steps += _surer(rec, winner, share)
    guessed = share["extrapolated"] + share["roofline"]
    if guessed > 0.3:
        steps.append(
            f"{guessed:.0%} of the predicted time is not measured on this GPU: measure it before you buy "
            "(`moeplan profiles show` lists what is measured)."
        )
    if winner.deployment.model.kv_format != rec.model.kv_format:
        steps.append("The winner keeps its KV cache in FP8: check answer quality, or plan with --kv bf16.")
    return steps


def _surer(rec: Recommendation, winner: Run, share: Facts) -> list[str]:
    """The cheapest simulated run that is sure enough where the winner is not."""
    sure = meets_chance(winner, share)
    if sure is None or sure >= _SURE:
        return []
    found = [(run, _chance(run, winner, share) or 0.0) for run in rec.runs if run is not winner and run.meets_slo]
    surer = [(run, chance) for run, chance in found if chance >= _SURE]
    head = f"The SLO holds in {format_chance(sure)} of cases like this:"
    if not surer:
        return [f"{head} none of the simulated layouts reaches {_SURE:.0%}. Offer more GPUs, or calibrate first."]
    own = rec.model.kv_format
    run, chance = min(surer, key=lambda pair: (pair[0].num_gpus, pair[0].deployment.model.kv_format != own, -pair[1]))
    return [f"{head} to be {format_chance(chance)} sure take {run.deployment.name} on {run.num_gpus} GPUs."]


def _past_error(winner: Run) -> str:
    """How far this version was off on measured servers, and whether any of them was of the same kind."""
    if winner.deployment.offload is not None:
        return PAST_ERROR
    error = past_errors(winner)
    if is_unlike_measured(winner.deployment):
        return f"{error} {_UNLIKE}"
    return error if winner.deployment.tactics == PLAIN else f"{error} {_PLAIN_ONLY}"


def _warnings(rec: Recommendation, winner: Run, share: Facts) -> list[str]:
    warnings = [*rec.model.notes, *tactic_warnings(winner.deployment.tactics, rec.tactics), *_support_warnings(winner)]
    warnings += sharing_warnings(winner)
    if winner.summary.num_measured < _FEW_REQUESTS:
        warnings.append(f"Only {winner.summary.num_measured} requests were measured: percentiles mean little.")
    if winner.summary.num_rejected:
        warnings.append(f"{winner.summary.num_rejected} requests were rejected: {winner.simulation.rejection_reason}")
    if share["roofline"] > 0.5:
        warnings.append(f"{share['roofline']:.0%} of the time comes from rooflines, not measurements.")
    simulated = simulated_replicas(winner.deployment, winner.workload)
    if winner.deployment.layout.replicas > simulated:
        warnings.append(
            f"{simulated} of {winner.deployment.layout.replicas} replicas were simulated, at their share of the load."
        )
    ttft = [r for r in winner.summary.objectives if r.objective.metric == "ttft"]
    if any(result.value_s > 0.5 * result.objective.limit_s for result in ttft):
        warnings.append(
            "TTFT uses more than half of its limit; a quarter of the measured servers took 1.4 times the prediction."
        )
    if winner.deployment.memory.terms["reserve"] < 0.03 * winner.deployment.memory.capacity_bytes:
        reserve = significant(winner.deployment.memory.terms["reserve"] / 1e9)
        warnings.append(f"Only {reserve} GB per GPU are held back; a larger chunk or graph list may not start.")
    return warnings


def _support_warnings(winner: Run) -> list[str]:
    """What the engine or the GPU does not really do, though times can be computed."""
    deployment, warnings = winner.deployment, []
    gpu, model = deployment.cluster.system.gpu, deployment.model
    warnings += expert_warnings(winner)
    if any(layer.stack == "encoder" for layer in model.layers):
        warnings.append(f"{deployment.engine.name} does not serve encoder-decoder MoE models: times are kernels only.")
    if gpu.vendor not in ("NVIDIA", "AMD"):
        warnings.append(f"{deployment.engine.name} is not published for {gpu.vendor}: its defaults are borrowed.")
    stored = compute_format(model.format_of("expert" if model.moe else "dense_ffn"))
    computed = gpu.compute_format(stored)
    if stored.startswith("fp8") and computed != "fp8":
        warnings.append(
            f"{gpu.name} has no FP8 arithmetic: FP8 weights are read in 8 bits and multiplied in {computed}."
        )
    return warnings
