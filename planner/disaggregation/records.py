"""What a request did between the two pools: one row per request, beside the columns of `RequestTable`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class HandoverTable:
    """Requests in order of arrival; every column is `[num_requests]`, times are simulated seconds, NaN if never.

    `queued_s` is when a rank of the prefill pool was asked, `prefilled_s` the end of the step that completed the
    prompt, `asked_s` and `reserved_s` when KV room on the decode side was asked for and given, `sent_s` and
    `arrived_s` the transfer, `joined_s` when the request entered the decode batch. `prefill_rank` and `decode_rank`
    count through all groups of their pool (-1 where there was none); `kv_bytes` left the prefill rank.
    """

    queued_s: Floats
    prefilled_s: Floats
    asked_s: Floats
    reserved_s: Floats
    sent_s: Floats
    arrived_s: Floats
    joined_s: Floats
    prefill_rank: NDArray[np.int64]
    decode_rank: NDArray[np.int64]
    kv_bytes: Floats

    def __len__(self) -> int:
        return len(self.queued_s)

    @property
    def reserve_wait_s(self) -> Floats:
        """Waiting for KV room on the decode side [s]."""
        return self.reserved_s - self.asked_s

    @property
    def link_wait_s(self) -> Floats:
        """From prompt computed and room reserved to the first byte [s]; 0 where bytes left earlier."""
        return np.maximum(0.0, self.sent_s - np.fmax(self.prefilled_s, self.reserved_s))

    @property
    def transfer_s(self) -> Floats:
        """From the first byte sent to the last received [s]."""
        return self.arrived_s - self.sent_s

    @property
    def exposed_s(self) -> Floats:
        """From the end of the prefill step to the decode batch [s]: all that disaggregation adds between the two."""
        return self.joined_s - self.prefilled_s

    @property
    def join_wait_s(self) -> Floats:
        """From KV arrived to a place in the decode batch [s]: the rest of the running step, and seats."""
        return self.joined_s - self.arrived_s

    def columns(self) -> dict[str, NDArray[np.float64] | NDArray[np.int64]]:
        """All columns and derived times by name, for files."""
        derived = ("reserve_wait_s", "link_wait_s", "transfer_s", "join_wait_s")
        return {name: getattr(self, name) for name in (*self.__slots__, *derived)}
