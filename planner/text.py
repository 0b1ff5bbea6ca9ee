"""Facts as terminal text: the answer first, then why, then the table, then how sure, then what next."""

from __future__ import annotations

from typing import Any

from planner.experttext import balance_lines, outside_lines, run_lines
from planner.facts.prices import rule_note
from planner.facts.tactics import tactic_lines
from planner.failuretext import incident_lines
from planner.launchtext import launch_lines
from planner.moneytext import money_lines
from planner.tables import table
from planner.units import format_bytes, format_chance, format_count, format_seconds, format_usd, significant

Facts = dict[str, Any]
_BAR = 24


def _bars(terms: dict[str, float], total: float, show: Any) -> str:
    rows = [
        (name.replace("_", " "), show(v), f"{v / total:.0%}", "#" * round(_BAR * min(1.0, v / total)))
        for name, v in terms.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        f"  {name.ljust(widths[0])}  {value.rjust(widths[1])}  {share.rjust(widths[2])}  {bar}".rstrip()
        for name, value, share, bar in rows
    )


def _latency(values: Facts) -> list[str]:
    return [format_seconds(values[k]) if values[k] is not None else "-" for k in ("mean", "p50", "p95", "p99")]


def _number(value: float | None) -> str:
    return "-" if value is None else significant(value)


def _usd(value: float | None) -> str:
    return "unknown" if value is None else format_usd(value)


def describe_text(facts: Facts) -> str:
    """Text of `describe`."""
    parts = facts["params_by_part"]
    total = facts["total_params"]
    lines = [
        f"{facts['name']}: {format_count(total)} parameters, "
        f"{format_count(facts['active_params_with_embeddings'])} active, "
        f"{format_bytes(facts['weight_bytes'])} of weights",
        "",
        "Active parameters per token, by convention",
        table(
            ["counts", "parameters"],
            [
                ("everything", f"{facts['active_params_with_embeddings']:,}"),
                ("without input embedding (for FLOPs)", f"{facts['active_params_without_input_embedding']:,}"),
                ("without both embeddings", f"{facts['active_params_without_embeddings']:,}"),
                ("total parameters", f"{total:,}"),
            ],
        ),
        "",
        "Where the parameters are",
        _bars({k: float(v) for k, v in sorted(parts.items(), key=lambda i: -i[1]) if v}, total, format_count),
        "",
        "Layers",
        *[f"  {row['count']:>4} x {row['kind']}" for row in facts["layers"]],
        "",
        f"Weights  {', '.join(f'{p} {f}' for p, f in facts['formats'].items())}",
        f"KV cache {facts['kv_bytes_per_token']:,} B per token in {facts['kv_format']}"
        + (
            f", of which {facts['kv_growing_bytes_per_token']:,} B keep growing past the attention windows"
            if facts["kv_growing_bytes_per_token"] != facts["kv_bytes_per_token"]
            else ""
        ),
    ]
    if facts["state_bytes_per_sequence"]:
        lines.append(f"State    {format_bytes(facts['state_bytes_per_sequence'])} per sequence, whatever its length")
    if facts["mtp_params"]:
        lines.append(
            f"MTP      {format_count(facts['mtp_params'])} more parameters ({format_bytes(facts['mtp_bytes'])}), "
            "not in the totals"
        )
    lines += [f"Note     {note}" for note in facts["notes"]]
    lines.append(f"Source   {facts['source']}")
    return "\n".join(lines)


def fit_text(facts: Facts) -> str:
    """Text of `fit`."""
    gpus, system = facts["layout"]["num_gpus"], facts["system"]
    if facts["fits"]:
        head = (
            f"{facts['model']} fits on {gpus} x {system} as {facts['layout']['name']}: "
            f"{facts['kv_tokens']:,} cached tokens, "
            f"{facts['concurrent_requests']:,} sequences of {facts['context_tokens']:,}"
        )
    else:
        head = f"{facts['model']} does not fit on {gpus} x {system}: {facts['breaking_term']} breaks it"
    lines = [head, "", f"Memory per GPU ({facts['engine']}, {format_bytes(facts['capacity_bytes'])} visible)"]
    lines.append(_bars(facts["bytes_per_gpu"], facts["capacity_bytes"], format_bytes))
    if facts["fits"] and facts["breaking_term"]:
        used = facts["breaking_bytes_per_gpu"]
        need = sum(v for k, v in used.items() if k not in ("kv_cache", "reserve"))
        lines += [
            "",
            f"On {facts['breaking_num_gpus']} it breaks at {facts['breaking_term'].replace('_', ' ')}: "
            f"{format_bytes(need)} before KV cache, the engine may use {format_bytes(facts['budget_bytes'])}",
        ]
    if facts["alternatives"]:
        rows = [(a["layout"], a["family"], f"{a['kv_tokens']:,}") for a in facts["alternatives"]]
        lines += ["", "Other families on as many GPUs", table(["layout", "family", "cached tokens"], rows, left=2)]
    if facts["next"]:
        lines += ["", "What would make it work, cheapest first", *[f"  - {step}" for step in facts["next"]]]
    lines += [
        "",
        f"Limits {facts['max_num_seqs']} sequences and {facts['max_batched_tokens']:,} tokens per step and rank",
    ]
    return "\n".join(lines + [f"Note   {note}" for note in facts["notes"]])


def plan_text(facts: Facts) -> str:
    """Text of `plan`."""
    lines = [facts["headline"], ""]
    if facts["layout"] is not None:
        lines += _winner_lines(facts)
    lines += outside_lines(facts["residency"])
    lines += ["Why the others lost"]
    nearest = facts["nearest_miss"]
    for reason, count in facts["rejected"].items():
        lines.append(f"  {count:>7,}  {reason}" + (f"; nearest: {nearest[reason]}" if reason in nearest else ""))
    lines.append(f"  {facts['considered']:>7,}  considered, {facts['simulated']} simulated")
    if facts["next"]:
        lines += ["", "Next" if facts["meets_slo"] else "What would make it work, cheapest first"]
        lines += [f"  - {step}" for step in facts["next"]]
    lines += [f"  ! {warning}" for warning in facts.get("warnings", [])]
    lines += ["", *launch_lines(facts)]
    question = facts["question"]
    lines += [f"Question  {question['model']}, {question['workload']}, {question['slo']}, {question['engine']}"]
    return "\n".join(lines)


def _winner_lines(facts: Facts) -> list[str]:
    settings = facts["settings"]
    lines = [
        f"Binding   {facts['binding_constraint']}",
        f"Settings  {settings['max_num_seqs']} sequences and "
        f"{settings['max_batched_tokens']:,} tokens per step and rank, "
        f"{settings['kv_format']} KV cache, experts over {settings['moe_backend'].replace('_', '-')}",
        *tactic_lines(facts),
        "",
        table(
            ["", "mean", "p50", "p95", "p99"],
            [("TTFT", *_latency(facts["ttft_s"])), ("TPOT", *_latency(facts["tpot_s"]))],
        ),
        f"  {significant(facts['output_tok_per_s'])} output tok/s, "
        f"{significant(facts['output_tok_per_s_per_gpu'])} per GPU at the demanded load",
        *money_lines(facts),
        *_prefix_lines(facts),
        *run_lines(facts["experts"]),
        "",
        "Best layouts",
        table(
            ["layout", "GPUs", "SLO", "sure", "TTFT p95", "TPOT p95", "out tok/s/GPU", "$/Mtok out", "tightest"],
            [_top_row(row) for row in facts["top"]],
        ),
        "",
        f"Memory per GPU ({format_bytes(facts['memory']['capacity_bytes'])} visible)",
        _bars(facts["memory"]["terms"], facts["memory"]["capacity_bytes"], format_bytes),
    ]
    for phase in ("decode", "prefill"):
        terms = facts["step"][phase]
        total = sum(terms.values())
        lines += ["", f"One {phase} step, {format_seconds(total)}", _bars(terms, total, format_seconds)]
    share = facts["origin_share"]
    return [
        *lines,
        "",
        *balance_lines(facts["balance"]),
        "How sure  predicted time is " + ", ".join(f"{v:.0%} {k}" for k, v in share.items()) + ".",
        f"          {facts['certainty']['sentence']}",
        f"          {facts['past_error']}",
        "",
    ]


def _top_row(row: Facts) -> tuple[str, ...]:
    return (
        row["name"],
        str(row["num_gpus"]),
        "meets" if row["meets_slo"] else "misses",
        "-" if row["chance"] is None else format_chance(row["chance"]),
        "-" if row["ttft_p95_s"] is None else format_seconds(row["ttft_p95_s"]),
        "-" if row["tpot_p95_s"] is None else format_seconds(row["tpot_p95_s"]),
        significant(row["output_tok_per_s_per_gpu"]),
        _usd(row["usd_per_mtok_output"]),
        row["reason"],
    )


def _prefix_lines(facts: Facts) -> list[str]:
    """One line about the prefix caches, where requests share anything."""
    cache = facts.get("prefix_cache")
    if cache is None:
        return []
    if not cache["enabled"]:
        reason = cache.get("disabled_because", "it is switched off")
        return [f"  Prefix cache: none, {reason}; every prompt is computed in full"]
    line = f"  Prefix cache: {cache['hit_rate']:.1%} of the prompt tokens found, blocks of {cache['block_tokens']}"
    if cache["num_caches"] > 1:
        line += f", {cache['num_caches']} caches, {cache['router'].replace('_', ' ')} between replicas"
    return [line]


def simulation_text(facts: Facts) -> str:
    """Text of `simulate`."""
    verdict = {True: "meets the SLO", False: "misses the SLO", None: "no SLO given"}[facts["meets_slo"]]
    launch = launch_lines(facts)
    return "\n".join(
        [
            f"{facts['layout']['name']} on {facts['cluster']}: {_number(facts['output_tok_per_s'])} output tok/s "
            f"({_number(facts['output_tok_per_s_per_gpu'])} per GPU), {verdict}, {facts['saturation']}",
            "",
            table(
                ["", "mean", "p50", "p95", "p99"],
                [
                    ("TTFT", *_latency(facts["ttft_s"])),
                    ("TPOT", *_latency(facts["tpot_s"])),
                    ("end to end", *_latency(facts["e2e_s"])),
                ],
            ),
            "",
            f"  {_usd(facts['usd_per_mtok_output'])} per Mtok output{rule_note(facts['allocation'])}, "
            f"{_number(facts['requests_per_s'])} requests/s, "
            f"{_number(facts['mean_decode_seqs_per_rank'])} sequences per rank, "
            f"KV peak {facts['kv_utilisation_peak']:.0%}, {facts['num_preemptions']:,} preemptions, "
            f"{facts['num_rejected']:,} rejected",
            f"  {facts['num_requests']:,} requests ({facts['num_measured']:,} measured), {facts['num_steps']:,} steps, "
            f"{format_seconds(facts['simulated_s'])} simulated",
            *[f"  {line}" for line in tactic_lines(facts)],
            *_prefix_lines(facts),
            *run_lines(facts["experts"]),
            *incident_lines(facts.get("failures")),
            *[f"  ! {warning}" for warning in facts["warnings"]],
            *(["", *launch[:-1]] if launch else []),
        ]
    )


def profiles_text(rows: list[Facts]) -> str:
    """Text of `profiles list`."""
    return table(
        ["system", "vendor", "memory", "TB/s", "bf16 TF/s", "fp8 TF/s", "$/GPU-h", "as of", "measured"],
        [
            (
                row["name"],
                row["vendor"],
                format_bytes(row["hbm_bytes"]),
                significant(row["hbm_bytes_per_s"] / 1e12),
                *[_tera(row["flop_per_s"].get(fmt)) for fmt in ("bf16", "fp8")],
                "-" if row["rental_usd_per_gpu_hour"] is None else f"{row['rental_usd_per_gpu_hour']:.2f}",
                row["price_as_of"] or "-",
                " ".join(row["engines"]) or "no",
            )
            for row in rows
        ],
        left=2,
    )


def _tera(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e12:,.0f}"


def profile_text(facts: Facts) -> str:
    """Text of `profiles show`: one line per number with its source."""
    lines = [f"{facts['name']}: {facts['title']}", ""]
    for path, source in facts["sources"].items():
        lines.append(f"  {path:<36} {_lookup(facts, path):>16}  {source}")
    lines += ["", "Measured  " + (", ".join(facts["measured_engines"]) or "nothing: rooflines on the ceilings above")]
    return "\n".join(lines + [f"Note      {note}" for note in facts["notes"]])


def _lookup(facts: Facts, path: str) -> str:
    value: Any = facts
    for key in path.replace("[", ".").replace("]", "").split("."):
        try:
            value = value[int(key)] if isinstance(value, (list, tuple)) else value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            return ""
    return f"{value:.6g}" if isinstance(value, (int, float)) else str(value)


def import_text(summary: Any) -> str:
    """Text of `profiles import`."""
    return str(summary)
