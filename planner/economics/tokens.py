"""Dollars per million tokens, by a named rule, and the load at which own GPUs beat the price of an API.

Formulae: serving.md 10.1. From an unknown price follows None, never $0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from planner.economics.demand import HOURS_PER_MONTH
from planner.economics.refusal import not_negative, positive, refuse_unless
from planner.economics.terms import Allocation, Api, Terms
from planner.units import HOUR_S
from planner.workload import Workload

TOKENS_PER_MTOK = 1e6
_OUTPUT_ONLY = Allocation()


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """$ per million input, output and all tokens, and the rule that divides the bill, in words.

    Input and output prices times their tokens add up to the bill; `usd_per_mtok_total` is the bill over all tokens
    whatever the rule. None where the bill is unknown or no such token was made.
    """

    usd_per_mtok_input: float | None
    usd_per_mtok_output: float | None
    usd_per_mtok_total: float | None
    rule: str


@dataclass(frozen=True, slots=True)
class BreakEven:
    """The load from which own GPUs are cheaper than an API.

    `utilisation` is the share of the largest load they carry; above 1 they never get there. The other numbers are means
    over the month.
    """

    utilisation: float
    requests_per_s: float
    input_tok_per_month: float
    output_tok_per_month: float
    api_usd_per_month_at_most: float
    """What the API would charge for the largest load the GPUs carry."""


def usd_per_mtok(
    usd_per_gpu_hour: float | None, num_gpus: float, tok_per_s: float, utilisation: float = 1.0
) -> float | None:
    """Dollars per million tokens: $/GPU-h x GPUs x 1e6 / (3600 x tok/s x U).

    `utilisation` is busy-token share of the billing period, not a GPU utilisation counter. An unknown price and
    a rate of zero give None.

    >>> round(usd_per_mtok(2.0, 8, 14_800), 4)
    0.3003
    """
    refuse_unless(0 < utilisation <= 1, f"utilisation must be in (0, 1], got {utilisation:g}")
    not_negative("tokens per second", tok_per_s)
    tokens_per_hour = HOUR_S * tok_per_s * utilisation
    if usd_per_gpu_hour is None or tokens_per_hour == 0:
        return None
    return usd_per_gpu_hour * num_gpus * TOKENS_PER_MTOK / tokens_per_hour


def token_costs(
    usd_per_month: float | None,
    input_tok_per_month: float,
    output_tok_per_month: float,
    rule: Allocation = _OUTPUT_ONLY,
) -> TokenCosts:
    """The bill of a month per million tokens: bill x weight / (w_in x input + w_out x output).

    >>> costs = token_costs(1000.0, 4e9, 1e9, Allocation("1:4"))
    >>> costs.usd_per_mtok_input, costs.usd_per_mtok_output, costs.usd_per_mtok_total, costs.rule
    (0.125, 0.5, 0.2, 'input to output tokens weighted 1:4')
    """
    not_negative("input tokens per month", input_tok_per_month)
    not_negative("output tokens per month", output_tok_per_month)
    weight_input, weight_output = rule.weights
    weighted = weight_input * input_tok_per_month + weight_output * output_tok_per_month
    tokens = input_tok_per_month + output_tok_per_month
    if usd_per_month is None or weighted == 0:
        return TokenCosts(None, None, None, rule.name)
    usd = usd_per_month * TOKENS_PER_MTOK
    return TokenCosts(
        usd * weight_input / weighted if input_tok_per_month else None,
        usd * weight_output / weighted if output_tok_per_month else None,
        usd / tokens,
        rule.name,
    )


def served_costs(usd_per_hour: float | None, output_tok_per_s: float, workload: Workload, terms: Terms) -> TokenCosts:
    """Costs of the tokens of a fleet that gives `output_tok_per_s` in the busiest hour, by the rule of `terms`.

    `usd_per_hour` is the bill in the mean of the month. Prompts come in the mean proportion of `workload`; every token
    of theirs counts, also one that a prefix cache holds.
    """
    made = HOUR_S * output_tok_per_s * terms.demand.mean_over_peak
    prompts = workload.mean_prompt_tokens / workload.mean_output_tokens
    return token_costs(usd_per_hour, made * prompts, made, terms.allocation)


def break_even_utilisation(
    usd_per_gpu_hour: float | None, num_gpus: float, max_tok_per_s: float, api_usd_per_mtok: float
) -> float | None:
    """Share of the time own GPUs must be busy to beat an API price; above 1 they never do.

    U* = $/GPU-h x GPUs x 1e6 / (3600 x tok/s x API price) (serving.md 10.1).
    """
    positive("API price", api_usd_per_mtok)
    full = usd_per_mtok(usd_per_gpu_hour, num_gpus, max_tok_per_s)
    return None if full is None else full / api_usd_per_mtok


def break_even(
    usd_per_month: float | None, max_requests_per_s: float, input_tokens: float, output_tokens: float, api: Api
) -> BreakEven | None:
    """The load at which `api` charges as much as the GPUs cost; None when the bill or the API price is unknown.

    `max_requests_per_s` is what the GPUs carry within the SLO, `input_tokens` and `output_tokens` those of a mean
    request. A price that `[api]` leaves out counts as 0: that token is not charged for.
    """
    positive("requests per second", max_requests_per_s)
    if usd_per_month is None or not api.is_known:
        return None
    charged = input_tokens * (api.usd_per_mtok_input or 0.0) + output_tokens * (api.usd_per_mtok_output or 0.0)
    refuse_unless(charged > 0, "the API charges nothing for these requests: state both prices in [api]")
    usd_per_request = charged / TOKENS_PER_MTOK
    seconds = HOURS_PER_MONTH * HOUR_S
    requests_per_month = usd_per_month / usd_per_request
    return BreakEven(
        requests_per_month / seconds / max_requests_per_s,
        requests_per_month / seconds,
        requests_per_month * input_tokens,
        requests_per_month * output_tokens,
        max_requests_per_s * seconds * usd_per_request,
    )


def fleet_usd(usd_per_gpu_hour: float | None, num_gpus: float, hours: float) -> float | None:
    """Bill of a fleet over a period, idle hours included; `num_gpus` is its mean when billed on demand, its peak
    when reserved."""
    return None if usd_per_gpu_hour is None else usd_per_gpu_hour * num_gpus * hours


def revenue_usd(sales: Iterable[tuple[float, float]]) -> float:
    """Sum over (tokens, $ per million tokens)."""
    return sum(tokens / TOKENS_PER_MTOK * usd for tokens, usd in sales)


def profit_margin(revenue: float, cost: float | None) -> float | None:
    """Profit over cost: 5.45 means 545 %."""
    if cost is None:
        return None
    positive("cost", cost)
    return (revenue - cost) / cost


def nodes_needed(tokens: float, seconds: float, tok_per_s_per_node: float) -> float:
    """Mean number of nodes that handle `tokens` within `seconds`; not rounded."""
    positive("period", seconds)
    positive("rate per node", tok_per_s_per_node)
    return tokens / seconds / tok_per_s_per_node
