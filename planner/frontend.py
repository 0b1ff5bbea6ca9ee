"""The front end of an engine: what a request takes from its client to a queue."""

from __future__ import annotations

from planner.enginespec import EngineSpec


class FrontEnd:
    """Processes that take requests in turn; each tokenises one prompt after the other, the rest overlaps."""

    __slots__ = ("_frontend_s", "_s_per_token", "_tokenised_s")

    def __init__(self, spec: EngineSpec) -> None:
        self._frontend_s, self._s_per_token = spec.frontend_s, spec.frontend_s_per_token
        self._tokenised_s = [0.0] * spec.num_frontends
        """When each process has tokenised what it was sent so far."""

    def delay_s(self, request: int, prompt_tokens: int, now_s: float) -> float:
        """Seconds until request number `request`, sent at `now_s`, is in a queue."""
        turn = request % len(self._tokenised_s)
        self._tokenised_s[turn] = max(self._tokenised_s[turn], now_s) + self._s_per_token * prompt_tokens
        return self._tokenised_s[turn] - now_s + self._frontend_s
