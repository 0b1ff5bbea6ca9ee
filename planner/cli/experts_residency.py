"""`experts residency`: tokens per second on a small machine when the experts do not all fit HBM."""

from __future__ import annotations

from typing import Any

from planner.cli.terminal import show


def show_residency(
    model: str,
    *,
    gpu: str,
    num_gpus: int = 1,
    dram: str | None = None,
    nvme: str | None = None,
    host: str | None = None,
    weights: str | None = None,
    context: int = 4096,
    batch: int = 1,
    chunk: int | None = None,
    policy: str | None = None,
    resident: int | None = None,
    prefetch_accuracy: float | None = None,
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
        GPUs; experts are cut over them.
    dram
        Host memory that is free for experts, such as 128GB; the profile's otherwise.
    nvme
        Drive space for experts and its rate, such as 2TB or 2TB@7GB/s.
    host
        Host whose memory rate and cores count: desktop-ddr5, xeon-ddr5-1s, xeon-ddr5-2s, epyc-ddr5-2s. The smallest
        that takes the memory otherwise.
    weights
        Weight formats instead of the checkpoint's: `int4_g32`, or `experts=nvfp4,attention=bf16,dense=bf16`.
    context
        Tokens of one sequence (prompt plus output).
    batch
        Sequences at once.
    chunk
        Prompt tokens per step (llama.cpp: ubatch); the engine's default otherwise.
    policy
        One of all-resident, static-hot, lru, lfu, stream, prefetch, cpu, cpu-layers; all are compared otherwise.
    resident
        Experts per layer to keep in GPU memory; as many as fit otherwise.
    prefetch_accuracy
        Share of misses that prefetch foresees, 0 to 1.
    json
        Print the facts as JSON.
    """
    from planner import options
    from planner.facts.residency import residency_facts
    from planner.hardware import system as load_system
    from planner.residency import POLICIES, Residency
    from planner.residency.hosts import host as named_host
    from planner.residency.policies import PREFETCH_ACCURACY
    from planner.small import Machine, compare

    options.check_positive(num_gpus=num_gpus, context=context, batch=batch, chunk=chunk)
    space, _, rate = (nvme or "0GB").partition("@")
    machine = Machine(
        load_system(gpu),
        num_gpus,
        None if dram is None else options.parse_bytes("--dram", dram),
        options.parse_bytes("--nvme", space),
        options.parse_bytes("--nvme", rate.lower().removesuffix("/s")) if rate else None,
        named_host(host) if host else None,
    )
    accuracy = PREFETCH_ACCURACY if prefetch_accuracy is None else prefetch_accuracy
    names = [policy] if policy else list(POLICIES)
    asked = [Residency(name, resident_experts=resident, accuracy=accuracy) for name in names]
    chosen = options.precision(model, weights, None)
    found = compare(chosen, machine, asked, context=context, batch=batch, chunk=chunk)
    show(residency_facts(chosen, machine, found, context, batch), json, residency_text)


def residency_text(facts: dict[str, Any]) -> str:
    """Text of `experts residency`."""
    from planner.tables import table
    from planner.units import format_bytes, significant

    best, behind = facts["policies"][0], facts["tiers"]
    gpus = f"{facts['num_gpus']} x {facts['system']}"
    plural = "sequence" if facts["batch"] == 1 else "sequences"
    lines = [
        f"{facts['model']} on {gpus}: {significant(best['decode_tok_per_s'])} output tok/s with {best['policy']} "
        f"({best['meaning']}), bound by {best['bound']}",
        "",
        table(
            [
                "policy",
                "tok/s",
                "prefill tok/s",
                "resident",
                "hits",
                "HBM",
                *(t["name"].upper() for t in behind),
                "bound by",
            ],
            [_row(row, behind, format_bytes, significant) for row in facts["policies"]],
        ),
        "",
        f"{facts['batch']} {plural} of {facts['context_tokens']:,} tokens, experts in {facts['expert_format']}; "
        f"{format_bytes(facts['other_hbm_bytes'])} of HBM go to everything else",
    ]
    for tier in behind:
        lines.append(
            f"  {tier['name'].upper():<5} {format_bytes(tier['capacity_bytes'])} for experts, "
            f"{significant(tier['bytes_per_s'] / 1e9)} GB/s to a GPU"
        )
    if facts["cpu_bytes_per_s"]:
        lines.append(f"  CPU   streams experts at {significant(facts['cpu_bytes_per_s'] / 1e9)} GB/s")
    share = ", ".join(f"{value:.0%} {name}" for name, value in best["origin_share"].items())
    lines += ["", f"How sure  the best policy's step is {share}.", f"          {facts['past_error']}"]
    return "\n".join(lines + [f"Left out  {name}: {reason}" for name, reason in facts["rejected"].items()])


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
    )
