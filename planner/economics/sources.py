"""Where the terms come from: the file of a buyer, or a dated source for each default."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from planner.economics.terms import DEFAULT_TERMS, PATHS, Terms
from planner.errors import InputError
from planner.hardware import system as load_system
from planner.tomlfile import checked, read

_PUBLIC = "public calculations (serving.md 10.1, 2026-11)"
_NO_PROFILE = "assumed: no profile was stated"
SOURCES: dict[str, str] = {
    "basis": "a rental price needs no assumption about life, power or interest",
    "owning.years": f"{_PUBLIC}: worked example of 4 years",
    "owning.discount_rate": f"{_PUBLIC}: worked example at 10 %",
    "owning.residual_share": f"assumed: nothing after 4 years; {_PUBLIC}: 25 to 35 % after 36 months",
    "owning.fabric_share": f"{_PUBLIC}: 10 to 15 % of the purchase price",
    "owning.storage_share": "assumed: none",
    "owning.spares_share": "assumed: none",
    "owning.opex_share_per_year": f"{_PUBLIC}: about 5 % per year",
    "owning.staff_usd_per_gpu_year": "assumed: none beyond the share of opex",
    "site.pue": f"{_PUBLIC}: 1.2 to 1.4",
    "site.usd_per_kwh": f"{_PUBLIC}: $0.06 to 0.12",
    "site.colo_usd_per_kw_month": f"{_PUBLIC}: $150 to 250, often with electricity",
    "site.colo_includes_power": "assumed: electricity is metered beside the colocation price",
    "site.power": "provisioned power is what a site must reserve (MLPerf way, serving.md 10.1, 2026-11)",
    "site.idle_share": "assumed; matters only where power is paid as used",
    "site.rack_kw": "four DGX H100 of 10.2 kW per rack (NVIDIA DGX SuperPOD data center design for DGX H100, "
    "docs.nvidia.com, read 2026-11-22)",
    "renting.commit_discount": "assumed: on-demand list price",
    "renting.reserved": "assumed: capacity is held all the time, as on-demand GPUs may be sold out",
    "renting.sold_by": "assumed: providers that rent single GPUs; large ones rent nodes",
    "renting.price_change_per_year": "assumed: today's price",
    "demand.shape": _NO_PROFILE,
    "demand.peak_to_mean": _NO_PROFILE,
    "demand.weekend_factor": _NO_PROFILE,
    "demand.growth_per_year": "assumed: none",
    "demand.source": _NO_PROFILE,
    "api.usd_per_mtok_input": "none stated",
    "api.usd_per_mtok_output": "none stated",
    "api.as_of": "none stated",
    "api.provider": "none stated",
    "api.source": "none stated",
    "allocation.rule": "the usual quotation of $ per million output tokens",
    "spares.nodes_plus": "assumed: no spare node (N+0)",
}
"""Where each default comes from, by its path in the TOML."""
assert tuple(SOURCES) == PATHS
_SILENT = ("demand.source", "demand.peak_to_mean", "api.")


def read_terms(path: Path) -> Terms:
    """Terms of a TOML file; what it leaves out keeps its default. InputError with every fault of the file."""
    terms = checked(Terms, read(path), str(path))
    resolved = []
    for stated in terms.price:
        try:
            system = load_system(stated.system)
            stated.quote(system)
        except InputError as error:
            raise InputError(f"{path}: price: {error}") from error
        resolved.append(replace(stated, system=system.name))
    return replace(terms, price=tuple(resolved))


def load_terms(text: str | None) -> Terms:
    """Terms of the TOML file named on a command line, the defaults for None."""
    if text is None:
        return DEFAULT_TERMS
    if not text.endswith(".toml"):
        raise InputError(f"--terms {text}: give a TOML file, such as my.toml (docs/economics.md has an example)")
    return read_terms(Path(text))


def terms_rows(terms: Terms) -> list[dict[str, Any]]:
    """Every term and stated price: `name` (its path), `value`, `is_default`, and the `source` of the value."""
    rows = []
    for path, source in SOURCES.items():
        value = terms.value(path)
        is_default = value == DEFAULT_TERMS.value(path)
        if is_default and path.startswith(_SILENT):
            continue
        origin = source if is_default else "stated by the buyer"
        if path == "demand.shape":
            origin = terms.demand.origin
        elif path.startswith("api.") and not is_default:
            origin = f"{terms.api.source or 'stated by the buyer'}, {terms.api.as_of}"
        rows.append({"name": path, "value": value, "is_default": is_default, "source": origin})
    for p in terms.price:
        source = f"{p.provider}: {p.source}, {p.as_of}"
        rows.append({"name": f"price.{p.system}.{p.basis}", "value": p.usd, "is_default": False, "source": source})
    return rows


def terms_tables(terms: Terms) -> dict[str, Any]:
    """All terms as the tables of their TOML (`planner.tomlfile.to_toml` writes it)."""
    tables = asdict(terms)
    tables["price"] = [{k: v for k, v in row.items() if v is not None} for row in tables["price"]]
    return {k: ({n: v for n, v in t.items() if v is not None} if isinstance(t, dict) else t) for k, t in tables.items()}
