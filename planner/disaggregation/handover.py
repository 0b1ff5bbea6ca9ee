"""How engines hand a prompt's KV from a prefill engine to a decode engine, as data with sources."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, Literal, get_args

from planner.engine import Engine
from planner.errors import InputError

Reserve = Literal["arrival", "prefilled"]
Send = Literal["whole", "chunks", "layers"]
FirstToken = Literal["prefilled", "joined", "decoded"]


@dataclass(frozen=True, slots=True)
class Handover:
    """The rules of one engine; `handover.toml` explains the values and names their sources.

    `reserve` is when KV is taken on the decode side, `send` in which pieces the KV travels, `first_token` which
    moment the client sees as its first token.
    """

    reserve: Reserve
    send: Send
    first_token: FirstToken
    reserved_decode_tokens: int
    extra_seats: int
    extra_seats_up_to: int
    source: str = ""

    def __post_init__(self) -> None:
        if self.reserve not in get_args(Reserve) or self.send not in get_args(Send):
            raise InputError(f"handover: reserve {self.reserve!r} and send {self.send!r} are not known.")
        if self.reserve == "prefilled" and self.send != "whole":
            raise InputError(
                f"--kv-send {self.send} sends KV while the prompt is computed, so its place must be reserved before: "
                "add --kv-reserve arrival."
            )
        if self.reserved_decode_tokens < 0:
            raise InputError(f"--reserved-decode-tokens {self.reserved_decode_tokens}: must be 0 or more.")

    def seats(self, max_num_seqs: int) -> int:
        """Requests that may hold KV on a decode rank, running ones included."""
        return max_num_seqs * (1 + (self.extra_seats if max_num_seqs <= self.extra_seats_up_to else 0))

    @property
    def ttft_text(self) -> str:
        """What TTFT ends with, in words."""
        return {
            "prefilled": "TTFT ends with the prefill step; the first gap holds transfer, waits and one decode step",
            "joined": "TTFT ends when the request joins the decode batch, transfer and waits included",
            "decoded": "TTFT ends with the first decode step, transfer and waits included",
        }[self.first_token]


@lru_cache
def _table() -> dict[str, dict[str, Any]]:
    text = resources.files("planner.disaggregation").joinpath("handover.toml").read_text("utf-8")
    return tomllib.loads(text)


def handover(engine: Engine) -> Handover:
    """The rules of `engine`: of its name, else of the engine whose kernels it has; InputError where there are none."""
    table = _table()
    found = next((name for name in (engine.name, engine.kernels) if name in table), None)
    if found is None:
        raise InputError(
            f"engine {engine.name!r}: how it hands KV from one pool to another is not known. Use --engine "
            f"{' or '.join(table)}, or a profile with one of them as base."
        )
    return Handover(**table[found])
