"""Many plans and simulations as one study: models x clusters x workloads x layouts x seeds, resumable, on any executor.

`Description` says which, `units` lists them, `run_sweep` answers them through an `Executor` into a `SweepFolder`.
What a unit is and how it is answered is the caller's: the command line gives it the commands themselves.
"""

from planner.sweep.description import Description, read_description
from planner.sweep.executors import Executor, Processes, Serial, check_executor, executor, stream
from planner.sweep.folder import SweepFolder
from planner.sweep.results import results_csv, row, seed_groups
from planner.sweep.running import run_sweep
from planner.sweep.units import Result, Unit, units

__all__ = [
    "Description",
    "Executor",
    "Processes",
    "Result",
    "Serial",
    "SweepFolder",
    "Unit",
    "check_executor",
    "executor",
    "read_description",
    "results_csv",
    "row",
    "run_sweep",
    "seed_groups",
    "stream",
    "units",
]
