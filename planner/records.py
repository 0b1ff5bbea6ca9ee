"""The two tables a simulation leaves: one row per request, one row per engine step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

UNFINISHED, FINISHED, REJECTED, LOST = 0, 1, 2, 3
"""Values of `RequestTable.status`."""

_STATUS_NAMES = np.array(["unfinished", "finished", "rejected", "lost"])


@dataclass(frozen=True, slots=True, eq=False)
class RequestTable:
    """Requests in order of arrival; every column is `[num_requests]`, times are simulated seconds.

    `admitted_s` is when the first prompt tokens were first scheduled. Times that never came are NaN. `rank` counts
    through all groups (-1 when rejected), `status` is UNFINISHED (the run ended first), FINISHED, REJECTED (larger
    than the KV pool) or LOST (given up with the replica it was on).

    Where requests share prefixes, `prefix_group` and `conversation` say which (-1 for none) and `cached_tokens` how
    many prompt tokens were found when a request was first admitted; None otherwise.
    """

    arrival_s: NDArray[np.float64]
    admitted_s: NDArray[np.float64]
    first_token_s: NDArray[np.float64]
    finish_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    produced_tokens: NDArray[np.int64]
    num_preemptions: NDArray[np.int64]
    rank: NDArray[np.int64]
    status: NDArray[np.int8]
    prefix_group: NDArray[np.int64] | None = None
    conversation: NDArray[np.int64] | None = None
    cached_tokens: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def queue_s(self) -> NDArray[np.float64]:
        """From arrival to the first scheduled prompt token [s]."""
        return self.admitted_s - self.arrival_s

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        """Time to first token [s]."""
        return self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> NDArray[np.float64]:
        """End-to-end latency [s]."""
        return self.finish_s - self.arrival_s

    @property
    def tpot_s(self) -> NDArray[np.float64]:
        """Time per output token after the first [s]: (e2e - ttft) / (output - 1), NaN for a single output token."""
        gaps = np.where(self.output_tokens > 1, self.output_tokens - 1, np.nan)
        return np.asarray((self.finish_s - self.first_token_s) / gaps, dtype=np.float64)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns there are, by name."""
        return _columns(self)

    def frame(self) -> pd.DataFrame:
        """The table with its derived latencies as a DataFrame, `status` spelled out."""
        import pandas as pd

        columns = self.columns()
        columns |= {name: getattr(self, name) for name in ("queue_s", "ttft_s", "tpot_s", "e2e_s")}
        return pd.DataFrame(columns | {"status": _STATUS_NAMES[self.status]})


@dataclass(frozen=True, slots=True, eq=False)
class StepTable:
    """Engine steps in order of their start; every column is `[num_steps]`, summed over the ranks of the group.

    `start_s` and `step_s` [s]; `context_tokens` is the KV read by decodes; `kv_tokens_used` the tokens of all blocks
    taken, this step's new ones included; `num_waiting` the queue left after scheduling; `draw` which cached draw of
    the router the step used (`planner.loads`). `cached_tokens` are the prompt tokens that requests admitted in the
    step, preempted ones included, found in the prefix caches; None where requests share nothing.
    """

    start_s: NDArray[np.float64]
    step_s: NDArray[np.float64]
    group: NDArray[np.int64]
    prefill_tokens: NDArray[np.int64]
    decode_seqs: NDArray[np.int64]
    context_tokens: NDArray[np.int64]
    kv_tokens_used: NDArray[np.int64]
    num_waiting: NDArray[np.int64]
    draw: NDArray[np.int64]
    cached_tokens: NDArray[np.int64] | None = None

    @classmethod
    def from_rows(cls, rows: NDArray[np.float64], cached_tokens: NDArray[np.int64] | None = None) -> StepTable:
        """Table from `rows` `[num_steps, 9]` in the order of the columns, and `cached_tokens` `[num_steps]`."""
        whole = np.ascontiguousarray(rows[:, 2:].T).astype(np.int64)
        return replace(cls(rows[:, 0].copy(), rows[:, 1].copy(), *whole), cached_tokens=cached_tokens)

    def __len__(self) -> int:
        return len(self.start_s)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns there are, by name."""
        return _columns(self)

    def frame(self) -> pd.DataFrame:
        """The table as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.columns())


def _columns(table: RequestTable | StepTable) -> dict[str, NDArray[Any]]:
    named = {name: getattr(table, name) for name in table.__slots__}
    return {name: values for name, values in named.items() if values is not None}
