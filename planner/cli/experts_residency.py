"""`experts residency`: tokens per second on a small machine when the experts do not all fit HBM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from planner.choices import ExpertChoices
from planner.cli.terminal import show

if TYPE_CHECKING:
    from planner.residency import Residency


def show_residency(
    model: str,
    *,
    gpu: str,
    num_gpus: int = 1,
    dram: str | None = None,
    nvme: str | None = None,
    peer: str | None = None,
    host: str | None = None,
    gpus_per_root: int = 1,
    weights: str | None = None,
    context: int = 4096,
    batch: int = 1,
    chunk: int | None = None,
    policy: str | None = None,
    resident: int | None = None,
    prefetch_accuracy: float | None = None,
    lookahead_layers: int = 1,
    reuse: str = "records",
    skew: str | None = None,
    top_k: str | None = None,
    json: bool = False,
) -> None:
    """Where experts live when GPU memory cannot hold them all, and what each policy costs in tokens per second.

    Parameters
    ----------
    model
        Hugging Face id, alias, config.json, directory or model TOML.
    gpu
        System name (`moeplan profiles list`) or a profile TOML.
    num_gpus
        GPUs of one node; experts are cut over them.
    dram
        Host memory that is free for experts, such as 128GB; the profile's otherwise.
    nvme
        Drive space for experts and its rate, such as 2TB or 2TB@7GB/s.
    peer
        Memory of other GPUs on the scale-up link that is free for experts, such as 40GB.
    host
        Host whose memory rate and cores count: desktop-ddr5, xeon-ddr5-1s, xeon-ddr5-2s, epyc-ddr5-2s; the profile's
        otherwise, else a desktop up to 256 GB and a one-socket server beyond.
    gpus_per_root
        GPUs that share one link to the host.
    weights
        Weight formats instead of the checkpoint's: `int4_g32`, or `experts=nvfp4,attention=bf16,dense=bf16`.
    context
        Tokens of one sequence (prompt plus output).
    batch
        Sequences at once.
    chunk
        Prompt tokens per step (llama.cpp: ubatch); the engine's default otherwise.
    policy
        One of all-resident, static-hot, lru, lfu, stream, prefetch, cpu, cpu-or-fetch, cpu-layers; all are compared
        otherwise.
    resident
        Experts per layer to keep in GPU memory; as many as fit otherwise.
    prefetch_accuracy
        Share of misses that prefetch foresees, 0 to 1.
    lookahead_layers
        Layers that prefetch looks ahead.
    reuse
        How routing repeats itself: records (of prompts, cautious), decode-reports (what caches counted while
        generating), or a routing record with token ids (.npz).
    skew
        Expert popularity: mixed, single-domain, uniform, lognormal:0.5, zipf:1 and others, or a routing record.
    top_k
        Experts per token instead of the model's.
    json
        Print the facts as JSON.
    """
    from planner import options
    from planner.facts.residency import residency_facts
    from planner.hardware import system as load_system
    from planner.small import Machine, compare

    options.check_positive(num_gpus=num_gpus, context=context, batch=batch, chunk=chunk)
    chosen = options.precision(model, weights, None)
    typed = ExpertChoices(
        skew=skew, top_k=top_k, reuse=reuse, dram=dram, nvme=nvme, peer=peer, host=host, gpus_per_root=gpus_per_root
    )
    experts = options.experts(chosen, typed)
    machine = Machine.of(load_system(gpu), num_gpus, experts)
    asked = _asked(policy, resident, prefetch_accuracy, lookahead_layers, experts.reuse)
    found = compare(chosen, machine, asked, context=context, batch=batch, chunk=chunk, experts=experts)
    show(residency_facts(chosen, machine, found, context, batch, experts), json, residency_text)


def _asked(
    policy: str | None, resident: int | None, accuracy: float | None, lookahead_layers: int, reuse: Any
) -> list[Residency]:
    """The policy with its settings, or every policy that can keep `resident` experts."""
    from planner.residency import POLICIES, Residency
    from planner.residency.policies import PREFETCH_ACCURACY

    names = [policy] if policy else [name for name in POLICIES if resident is None or name != "all-resident"]
    share = PREFETCH_ACCURACY if accuracy is None else accuracy
    return [Residency(name, resident, reuse, share, lookahead_layers) for name in names]


def residency_text(facts: dict[str, Any]) -> str:
    """Text of `experts residency`."""
    from planner.tables import table
    from planner.units import format_bytes, significant

    best, behind = next(row for row in facts["policies"] if row["policy"] == facts["best"]), facts["tiers"]
    gpus = f"{facts['num_gpus']} x {facts['system']}"
    plural = "sequence" if facts["batch"] == 1 else "sequences"
    tiers = [tier["name"].upper() for tier in behind]
    header = ["policy", "tok/s", "prefill tok/s", "resident", "hits", "HBM", *tiers, "bound by", "offered by"]
    lines = [
        f"{facts['model']} on {gpus}: {significant(best['decode_tok_per_s'])} output tok/s with {best['policy']} "
        f"({best['meaning']}), bound by {best['bound']}",
        "",
        table(header, [_row(row, behind, format_bytes, significant) for row in facts["policies"]]),
        "",
        f"{facts['batch']} {plural} of {facts['context_tokens']:,} tokens, experts in {facts['expert_format']}; "
        f"{format_bytes(facts['other_hbm_bytes'])} of HBM go to everything else",
    ]
    for tier in behind:
        lines.append(
            f"  {tier['name'].upper():<5} {format_bytes(tier['capacity_bytes'])} for experts, "
            f"{significant(tier['bytes_per_s'] / 1e9)} GB/s to a GPU"
        )
    if facts["host"]:
        kt, llama = (significant(facts[key] / 1e9) for key in ("cpu_bytes_per_s", "llama_bytes_per_s"))
        lines.append(f"  CPU   {facts['host']}: experts at {kt} GB/s (KTransformers), {llama} GB/s (llama.cpp)")
    share = ", ".join(f"{value:.0%} {name}" for name, value in best["origin_share"].items())
    lines += [*_reuse_lines(facts), "", f"How sure  {best['policy']}: its step is {share}."]
    lines.append(f"          {facts['past_error']}")
    return "\n".join(lines + [f"Left out  {name}: {reason}" for name, reason in facts["rejected"].items()])


def _reuse_lines(facts: dict[str, Any]) -> list[str]:
    """How far policies that keep recently used experts depend on the habits of the routing."""
    from planner.units import significant

    lines = []
    for row in facts["policies"]:
        if row["tok_per_s_by_reuse"]:
            rates = [significant(rate) for rate in row["tok_per_s_by_reuse"].values()]
            lines.append(
                f"  {row['policy']}: {' to '.join(rates)} tok/s, from records of prompts to reports of caches while "
                f"generating; {facts['reuse']} taken (--reuse)"
            )
    return ["", *lines] if lines else []


def _row(row: dict[str, Any], behind: list[dict[str, Any]], size: Any, number: Any) -> tuple[str, ...]:
    sizes = [row["bytes_by_tier"].get(name, 0) for name in ("hbm", *(tier["name"] for tier in behind))]
    return (
        row["policy"],
        number(row["decode_tok_per_s"]),
        number(row["prefill_tok_per_s"]),
        f"{row['resident_experts_per_layer']}/{row['num_experts_per_layer']}",
        f"{row['hit_rate']:.0%}",
        *(size(value) if value else "-" for value in sizes),
        row["bound"],
        row["offered_by"],
    )
