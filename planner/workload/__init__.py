"""What the users of a deployment send, and what they are promised.

`Lengths` and `Arrivals` describe one dimension each, `Workload` joins them, `load_workload` reads one from a preset
name, a shape such as `fixed:1024/256`, a TOML file or a trace CSV; `Slo` is the promise.
"""

from planner.workload.arrivals import Arrivals
from planner.workload.demand import RequestArrays, Workload
from planner.workload.lengths import Lengths
from planner.workload.load import load_workload
from planner.workload.presets import PRESETS, Preset
from planner.workload.sharing import SharedPrefix, SharingArrays, Turns
from planner.workload.slo import SLO_METRICS, SLO_STATISTICS, Objective, Slo, parse_slo

__all__ = [
    "PRESETS",
    "SLO_METRICS",
    "SLO_STATISTICS",
    "Arrivals",
    "Lengths",
    "Objective",
    "Preset",
    "RequestArrays",
    "SharedPrefix",
    "SharingArrays",
    "Slo",
    "Turns",
    "Workload",
    "load_workload",
    "parse_slo",
]
