"""Facts of drafting and overlap: tokens per step, where the acceptance comes from, what is overlapped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from planner.deployment import Run
    from planner.tactics import Tactics

Facts = dict[str, Any]


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
    """`tactic_facts` of a run, with the tokens per step that it counted."""
    facts = tactic_facts(run.deployment.tactics)
    if "speculation" in facts:
        facts["speculation"]["simulated_tokens_per_step"] = simulated_tokens_per_step(run)
    return facts


def simulated_tokens_per_step(run: Run) -> float | None:
    """Tokens from decode steps over sequences in them; a prompt, and its recomputation, yields one token itself."""
    requests, seqs = run.simulation.requests, int(run.simulation.steps.decode_seqs.sum())
    begun = ~np.isnan(requests.first_token_s)
    from_prompts = int(begun.sum()) + int(requests.num_preemptions[begun].sum())
    return (int(requests.produced_tokens.sum()) - from_prompts) / seqs if seqs else None


def tactic_warnings(tactics: Tactics) -> list[str]:
    """What the reader must know of the assumptions."""
    speculation = tactics.speculation
    if speculation is None or not speculation.is_assumed:
        return []
    return [
        f"Acceptance is assumed, not yours: {speculation.source}. It falls with context and other texts; give "
        "--acceptance."
    ]


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
    return lines
