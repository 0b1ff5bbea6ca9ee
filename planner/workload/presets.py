"""Named workloads, as data: lengths, and where each length comes from.

The rates are placeholders that `--rate` or `--concurrency` replaces; no source knows a user's traffic.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.workload.arrivals import Arrivals
from planner.workload.lengths import Lengths
from planner.workload.sharing import SharedPrefix, Turns

DEFAULT_RATE_PER_S = 1.0
"""Arrival rate of a workload that names none [requests/s]; a placeholder of this project."""

_PLACEHOLDER = Arrivals.poisson(DEFAULT_RATE_PER_S)
_OWN_SIGMA = "The log-normal spread (sigma) is an assumption of this project."


@dataclass(frozen=True, slots=True)
class Preset:
    """Lengths and arrivals of a named workload; `source` says what is measured and what is assumed."""

    prompt: Lengths
    output: Lengths
    source: str
    arrivals: Arrivals = _PLACEHOLDER
    prefix: SharedPrefix | None = None
    turns: Turns | None = None


PRESETS: dict[str, Preset] = {
    "chat": Preset(
        Lengths.lognormal(1024, 0.8),
        Lengths.lognormal(256, 0.8),
        "Means 1,024 in and 256 out: the chatbot scenario of Luminal's report on DeepSeek-R1 on 8 x H200 "
        f"(luminal.com/report/deepseek-r1-0528-8xh200, read 2026-11-22). {_OWN_SIGMA}",
    ),
    "rag": Preset(
        Lengths.lognormal(4096, 0.4),
        Lengths.lognormal(256, 0.8),
        "Means 4,096 in and 256 out: the RAG scenario of Luminal's report on DeepSeek-R1 on 8 x H200 "
        f"(luminal.com/report/deepseek-r1-0528-8xh200, read 2026-11-22). {_OWN_SIGMA}",
    ),
    "code": Preset(
        Lengths.lognormal(2048, 1.0),
        Lengths.lognormal(128, 1.0),
        "Assumption of this project for in-editor completion: long context, short answer. Measure your own.",
    ),
    "summarize": Preset(
        Lengths.uniform(6553, 8192),
        Lengths.uniform(819, 1024),
        "Shape 8K in / 1K out, both uniform in [0.8 L, L], of the public InferenceX benchmark (SemiAnalysis), "
        "as recorded in the end-to-end table of aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0).",
    ),
    "reasoning": Preset(
        Lengths.lognormal(1024, 0.8),
        Lengths.lognormal(4043, 0.8, maximum=32768),
        "Mean output 4,043 tokens: reference run of MLPerf Inference DeepSeek-R1, 4,388 samples "
        "(mlcommons/inference@00bb55f, language/deepseek-r1/README.md). The prompt mean and the log-normal spreads "
        "are assumptions of this project.",
    ),
    "batch": Preset(
        Lengths.uniform(819, 1024),
        Lengths.uniform(819, 1024),
        "Shape 1K in / 1K out, both uniform in [0.8 L, L], of the public InferenceX benchmark (SemiAnalysis), as "
        "recorded in the end-to-end table of aiconfigurator-core 0.12.0 (NVIDIA, Apache-2.0). The closed loop of 256 "
        "is an assumption of this project.",
        Arrivals.closed(256),
    ),
    "agents": Preset(
        Lengths.lognormal(3795, 0.8),
        Lengths.lognormal(182, 0.8),
        "Means 7,590 in and 182 out, of which a large cache found half: the trace of Mooncake (arXiv 2407.00079v3, "
        "4.2 and table 1). That the half is a system prompt with tools, that 64 of them follow Zipf's law, and the "
        "log-normal spreads are assumptions of this project.",
        prefix=SharedPrefix(64, Lengths.fixed(3795), zipf=1.0),
    ),
    "multi-turn": Preset(
        Lengths.lognormal(171, 0.8),
        Lengths.lognormal(256, 0.8),
        "The means of `chat` over all turns, 1,024 in and 256 out: 171 new tokens a turn in conversations of 1 to 7 "
        "turns (3 x 171 + 2 x 256 = 1,025). Turns, the think time of 20 s and the log-normal spreads are assumptions "
        "of this project.",
        turns=Turns(Lengths.uniform(1, 7), think_s=20.0),
    ),
}
