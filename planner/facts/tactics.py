"""Facts of drafting and overlap: tokens per step, where the acceptance comes from, what is overlapped."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.tactics import PLAIN

if TYPE_CHECKING:
    from planner.deployment import Run
    from planner.tactics import Tactics

Facts = dict[str, Any]
_TRIED = 33
"""Batches at which the gain is looked at, evenly in ratio."""


def tactic_facts(tactics: Tactics) -> Facts:
    """What was chosen, without keys for what was not: `speculation` and `overlap`."""
    facts: Facts = {}
    speculation, overlap = tactics.speculation, tactics.overlap
    if speculation is not None:
        facts["speculation"] = {
            "method": speculation.method,
            "num_drafts": speculation.num_drafts,
            "draft_model": speculation.draft.name if speculation.draft else None,
            "acceptance": list(speculation.acceptance),
            "acceptance_source": speculation.source,
            "acceptance_is_assumed": speculation.is_assumed,
            "tokens_per_step": speculation.tokens_per_step,
            "verified_tokens_per_sequence": speculation.query_tokens,
        }
    if overlap is not None:
        facts["overlap"] = {
            "kind": overlap.kind,
            "decode_tokens_min": overlap.decode_tokens,
            "prefill_tokens_min": overlap.prefill_tokens,
            "source": overlap.source,
        }
    return facts


def run_tactic_facts(run: Run) -> Facts:
    """`tactic_facts` of a run, with the tokens per step that it counted and what the tactics gain."""
    facts = tactic_facts(run.deployment.tactics)
    if "speculation" in facts:
        facts["speculation"]["simulated_tokens_per_step"] = simulated_tokens_per_step(run)
    return facts | ({"tactic_gain": gain_facts(run)} if facts else {})


def gain_facts(run: Run) -> Facts:
    """Tokens per second over those of plain serving, from step times at equal batch and context.

    `decode` at the mean decode batch of the run, `prefill` of full steps on all ranks; `pays` are the least and the
    most of the tried sequences per rank at which decoding gains, None where none does.
    """
    deployment, steps = run.deployment, run.simulation.steps
    chosen, plain = deployment.cost(), replace(deployment, tactics=PLAIN).cost()
    context = np.array(run.workload.mean_prompt_tokens + run.workload.mean_output_tokens / 2)
    decoding = steps.decode_seqs[steps.decode_seqs > 0]
    seqs = round(max(1.0, decoding.mean() / deployment.layout.attention_dp)) if len(decoding) else 1

    def gain(batch: Any) -> Any:
        times = [cost.decode(np.asarray(batch, float), context).total_s for cost in (plain, chosen)]
        return times[0] / times[1] * chosen.tokens_per_step

    most = max(1, deployment.limits.max_num_seqs // deployment.layout.pp)
    tried = np.unique(np.round(np.geomspace(1, most, _TRIED)))
    paying = tried[gain(tried) > 1.0]
    chunk = np.array(float(deployment.limits.max_batched_tokens))
    return {
        "decode_seqs_per_rank": int(seqs),
        "decode": float(gain(seqs)),
        "prefill": float(plain.prefill(chunk).total_s / chosen.prefill(chunk).total_s),
        "pays": [int(paying[0]), int(paying[-1])] if len(paying) else None,
        "tried_seqs_per_rank": most,
    }


def simulated_tokens_per_step(run: Run) -> float | None:
    """Tokens from decode steps over sequences in them; a prompt, and its recomputation, yields one token itself."""
    requests, seqs = run.simulation.requests, int(run.simulation.steps.decode_seqs.sum())
    begun = ~np.isnan(requests.first_token_s)
    from_prompts = int(begun.sum()) + int(requests.num_preemptions[begun].sum())
    return (int(requests.produced_tokens.sum()) - from_prompts) / seqs if seqs else None


def tactic_assumptions(tactics: Tactics) -> list[Facts]:
    """Rows of a plan's table of assumptions."""
    rows = []
    if tactics.speculation is not None:
        chances = ", ".join(f"{chance:.3g}" for chance in tactics.speculation.acceptance)
        rows.append({"name": "acceptance of drafts", "value": chances, "source": tactics.speculation.source})
    if tactics.overlap is not None:
        rows.append({"name": "overlap", "value": str(tactics.overlap), "source": tactics.overlap.source})
    return rows


def tactic_warnings(tactics: Tactics, asked: Tactics | None = None) -> list[str]:
    """What the reader must know of assumptions, and of what was `asked` for but cannot be had."""
    warnings = []
    speculation = tactics.speculation
    if speculation is not None and speculation.is_assumed:
        warnings.append(
            f"Acceptance is assumed, not yours: {speculation.source}. It falls with context and other texts; give "
            "--acceptance."
        )
    if asked is not None and asked.overlap is not None and tactics.overlap is None:
        warnings.append(f"--overlap {asked.overlap.kind}: this layout has no exchange over DeepEP to hide.")
    return warnings


def tactic_lines(facts: Facts) -> list[str]:
    """Lines of the terminal text, none for plain serving."""
    lines = []
    if "speculation" in facts:
        drafts = facts["speculation"]
        who = drafts["draft_model"] or "n-gram look-up"
        chances = sorted(set(drafts["acceptance"]), reverse=True)
        accepted = ", ".join(f"{chance:.3g}" for chance in chances)
        basis = "assumed" if drafts["acceptance_is_assumed"] else "given"
        counted = drafts.get("simulated_tokens_per_step")
        lines.append(
            f"Drafts    {who} drafts {drafts['num_drafts']}, acceptance {accepted} ({basis}): "
            f"{drafts['tokens_per_step']:.2f} tokens per step"
            + (f", {counted:.2f} in the simulation" if counted is not None else "")
        )
    if "overlap" in facts:
        overlap = facts["overlap"]
        lines.append(f"Overlap   {overlap['source']}")
    if "tactic_gain" in facts:
        gain = facts["tactic_gain"]
        lines.append(
            f"Gain      {gain['decode']:.2f} x plain decoding at {gain['decode_seqs_per_rank']} sequences per rank, "
            f"{gain['prefill']:.2f} x plain prefill; decoding {_where_it_pays(gain)} (estimates)"
        )
    return lines


def _where_it_pays(gain: Facts) -> str:
    pays, most = gain["pays"], gain["tried_seqs_per_rank"]
    if pays is None:
        return f"gains at no batch up to {most:,}"
    low, high = pays
    if low == 1:
        return f"gains up to {high:,} sequences" + (" and beyond" if high == most else "")
    return f"gains from {low:,} sequences on" if high == most else f"gains from {low:,} to {high:,} sequences"
