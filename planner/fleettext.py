"""A fleet through a day as terminal text."""

from __future__ import annotations

from typing import Any

from planner.tables import table
from planner.units import HOUR_S, format_seconds, format_usd, significant

Facts = dict[str, Any]


def fleet_text(facts: Facts) -> str:
    """Text of `fleet`."""
    asked, peak, scaled, fixed = facts["question"], facts["peak"], facts["scaled"], facts["fixed"]
    saved = 1 - scaled["gpu_hours_per_day"] / fixed["gpu_hours_per_day"]
    verdict = "meets the SLO in every hour" if facts["meets_slo"] else _missed(facts)
    lines = [
        f"{facts['layout']['name']} replicas on {asked['cluster']}: {peak['gpus']:,} GPUs at the peak of "
        f"{asked['peak_requests_per_s']:,g} requests/s{_sure(peak)}; {verdict}",
        "",
        f"  A replica of {facts['replica']['gpus']} GPUs answers at most "
        f"{significant(facts['replica']['capacity_requests_per_s'])} requests/s and is given "
        f"{significant(facts['replica']['planned_requests_per_s'])} (the most at which every objective holds)",
        f"  Spare replicas for failures: {peak['spare_replicas']}; headroom for the growth of the load while a replica "
        f"starts ({facts['autoscaler']['ready_s']:,.0f} s): {facts['autoscaler']['headroom'] - 1:.1%}",
        "",
        table(
            ["fleet", "GPU-hours/day", "GPUs at most", "cost/day", "$/Mtok out", "SLO attained"],
            [
                _fleet_row("autoscaled", scaled),
                _fleet_row("fixed at the peak", fixed),
            ],
        ),
        f"  Autoscaling takes {saved:.1%} fewer GPU-hours" + _saved_usd(scaled, fixed),
        "",
        "Through the day (autoscaled; mean over the hour)",
        table(_hour_header(facts), [_hour_cells(facts, hour) for hour in facts["hours"]], left=0),
        "",
        *_failure_lines(facts),
        "",
        f"Price     {_price(facts['price'])}",
        f"How sure  {facts['past_error']}",
        "          Fleets add the error of aggregation: docs/scale.md.",
        *[f"Note      {warning}" for warning in facts["warnings"]],
        "",
        f"Question  {asked['model']}, {asked['workload']}; {', '.join(asked['slo'])}; {asked['engine']}, "
        f"{asked['router']}",
    ]
    return "\n".join(lines)


def _sure(peak: Facts) -> str:
    low, high = peak["gpus_low"], peak["gpus_high"]
    if low is None:
        return ""
    most = f"{high:,}" if high is not None else "no number of GPUs: the limits are too tight for such layouts"
    return f" (80 % interval {low:,} to {most})"


def _missed(facts: Facts) -> str:
    missed = [hour["hour"] for hour in facts["hours"] if not hour["meets_slo"]]
    return (
        f"misses the SLO in {len(missed)} hours ({', '.join(map(str, missed[:8]))}{'...' if len(missed) > 8 else ''})"
    )


def _fleet_row(name: str, fleet: Facts) -> list[str]:
    return [
        name,
        f"{fleet['gpu_hours_per_day']:,.0f}",
        f"{fleet['gpus_most']:,}",
        _usd(fleet["usd_per_day"]),
        _usd(fleet["usd_per_mtok_output"]),
        f"{fleet['slo_attainment']:.2%}",
    ]


def _saved_usd(scaled: Facts, fixed: Facts) -> str:
    if scaled["usd_per_day"] is None:
        return ""
    saved = fixed["usd_per_day"] - scaled["usd_per_day"]
    return f" and costs {format_usd(abs(saved))} a day {'less' if saved >= 0 else 'more'}"


def _hour_header(facts: Facts) -> list[str]:
    return ["hour", "requests/s", "GPUs", "load", *_objectives(facts), "SLO attained", "fixed"]


def _objectives(facts: Facts) -> list[str]:
    return [text.split(" ")[0] for text in facts["question"]["slo"]]


def _hour_cells(facts: Facts, hour: Facts) -> list[str]:
    return [
        f"{hour['hour']:02d}",
        f"{hour['requests_per_s']:,.0f}",
        f"{hour['gpus']:,.0f}",
        f"{hour['load_share']:.0%}",
        *[format_seconds(hour[f"{name}_s"]) for name in _objectives(facts)],
        f"{hour['slo_attainment']:.2%}" + ("" if hour["meets_slo"] else " missed"),
        f"{hour['fixed_slo_attainment']:.2%}" + ("" if hour["fixed_meets_slo"] else " missed"),
    ]


def _failure_lines(facts: Facts) -> list[str]:
    failed, scaled = facts["failures"], facts["scaled"]
    usd = failed["usd_more_per_day"]
    return [
        f"Failures  {significant(failed['failures_per_day'])} a day (a GPU every "
        f"{failed['mtbf_gpu_s'] / HOUR_S:,.0f} h: {failed['mtbf_gpu_source']})",
        f"          each takes {facts['replica']['gpus']} GPUs away for {failed['mttr_s']:,.0f} s, "
        f"{failed['detect_s']:,.0f} s of it unnoticed; {failed['requests_hit_per_day']:,.0f} requests a day start anew",
        f"          spare replicas take {failed['gpu_hours_more_per_day']:,.0f} GPU-hours a day"
        + (f", {format_usd(usd)}" if usd is not None else "")
        + f"; {failed['gpu_hours_down_per_day']:,.1f} GPU-hours a day do nothing",
        f"          SLO attained {failed['slo_attainment_without']:.3%} if nothing failed and nothing was spare, "
        f"{scaled['slo_attainment']:.3%} with both",
    ]


def _price(price: Facts | None) -> str:
    if price is None:
        return "unknown for this system: give one with --terms"
    return (
        f"{format_usd(price['usd_per_gpu_hour'])} per GPU-hour, {price['basis']}, {price['provider']}, {price['as_of']}"
    )


def _usd(usd: float | None) -> str:
    return "unknown" if usd is None else format_usd(usd)
