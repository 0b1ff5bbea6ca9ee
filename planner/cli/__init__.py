"""Command line of moeplan: exit code 0 answer, 2 bad input, 3 infeasible."""

from __future__ import annotations

import json
import sys

from cyclopts import App, CycloptsError, Parameter

from planner import __version__
from planner.cli import (
    afd,
    calibrate,
    commands,
    compare,
    dashboard,
    engines,
    experts_drops,
    experts_inspect,
    experts_place,
    experts_residency,
    experts_variants,
    failures,
    fleet,
    report,
    sweep,
    validate,
)
from planner.cli import profiles as profile_commands
from planner.errors import Infeasible, PlannerError

app = App(
    name="moeplan",
    version=__version__,
    help="Which hardware, how many GPUs, sharded how, at what latency and cost, for serving MoE language models.",
    help_flags=["--help", "-h"],
    default_parameter=Parameter(negative=()),
)
for command in (
    commands.describe,
    commands.fit,
    commands.plan,
    commands.simulate,
    compare.compare,
    afd.afd,
    validate.validate,
    calibrate.calibrate,
    report.report,
    sweep.sweep,
    dashboard.dashboard,
):
    app.command(command)
app.command(failures.show_failures, name="failures")
app.command(failures.show_scale_out, name="scale-out")
app.command(fleet.show_fleet, name="fleet")

_experts = App(name="experts", help="Routing records, placement, token drops, residency and variants of experts.")
_experts.command(experts_inspect.inspect_records, name="inspect")
_experts.command(experts_place.place_experts, name="place")
_experts.command(experts_drops.count_drops, name="drops")
_experts.command(experts_residency.show_residency, name="residency")
_experts.command(experts_variants.show_variants, name="variants")
app.command(_experts)

_engines = App(name="engines", help="Engine profiles: schedulers, budgets and overheads by version.")
_engines.default(engines.list_engines)
_engines.command(engines.list_engines, name="list")
_engines.command(engines.show_engine, name="show")
app.command(_engines)

_profiles = App(name="profiles", help="Hardware profiles and measured tables.")
_profiles.command(profile_commands.list_profiles, name="list")
_profiles.command(profile_commands.show_profile, name="show")
_profiles.command(profile_commands.print_schema, name="schema")
_profiles.command(profile_commands.import_profiles, name="import")
_profiles.command(profile_commands.check)
_profiles.command(profile_commands.compare)
_profiles.command(profile_commands.coverage)
_profiles.command(profile_commands.shapes)
app.command(_profiles)


def main() -> None:
    """Entry point of the `moeplan` command: exit code 0 answer, 2 bad input, 3 infeasible."""
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(str(error).replace("parameter --model requires", "MODEL requires"), 2)
    except Infeasible as error:
        if "--json" in sys.argv:
            print(json.dumps({"feasible": False, "reason": str(error), "remedies": list(error.remedies)}, indent=2))
        _fail("\n".join([str(error), *(f"  - {remedy}" for remedy in error.remedies)]), error.exit_code)
    except PlannerError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        _fail(f"cannot write the answer: {error.strerror}", 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    print(f"moeplan: {message}", file=sys.stderr)
    sys.exit(code)
