"""The optional columns of a trace that say what its requests share.

`prefix_group` is a label, and `shared_tokens` how many tokens at the beginning of the prompt are those of its group.
`conversation` is a label too: its rows are turns in order, and each prompt begins with the whole prompt and answer of
the row before. Empty fields mean that a request shares nothing.
"""

from __future__ import annotations

from planner.workload.sharing import NONE, RecordedSharing

SHARING_COLUMNS = ("prefix_group", "shared_tokens", "conversation")
_MOST_DIGITS = 12


class SharingReader:
    """Collects the sharing of a trace row by row; what is wrong is added to `faults`."""

    def __init__(self, faults: list[str]) -> None:
        self._faults = faults
        self._group_ids: dict[str, int] = {}
        self._talk_ids: dict[str, int] = {}
        self._groups: list[int] = []
        self._shared: list[int] = []
        self._talks: list[int] = []
        self._history: dict[str, tuple[int, str, int]] = {}

    def read(self, line: int, row: dict[str, str], prompt_tokens: int, output_tokens: int) -> None:
        """Add a row whose lengths are in order."""
        group, talk = row.get("prefix_group", ""), row.get("conversation", "")
        shared = self._shared_tokens(line, group, row.get("shared_tokens", ""), prompt_tokens)
        if talk:
            self._check_turn(line, talk, prompt_tokens, group, shared)
            self._history[talk] = (prompt_tokens + output_tokens, group, shared)
        self._groups.append(self._group_ids.setdefault(group, len(self._group_ids)) if group else NONE)
        self._talks.append(self._talk_ids.setdefault(talk, len(self._talk_ids)) if talk else NONE)
        self._shared.append(shared)

    def sharing(self) -> RecordedSharing | None:
        """What the rows share; None when that is nothing."""
        if not self._group_ids and not self._talk_ids:
            return None
        return RecordedSharing(tuple(self._groups), tuple(self._shared), tuple(self._talks))

    def _shared_tokens(self, line: int, group: str, text: str, prompt_tokens: int) -> int:
        if not group:
            if text not in ("", "0"):
                self._faults.append(f"line {line}: shared_tokens {text!r} without a prefix_group; name the group")
            return 0
        if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS) or int(text) < 1:
            self._faults.append(
                f"line {line}: shared_tokens {text!r} of prefix_group {group!r} is not a whole number of tokens >= 1; "
                "give it, or leave both fields empty"
            )
            return 0
        if int(text) > prompt_tokens:
            self._faults.append(
                f"line {line}: shared_tokens {text} exceed prompt_tokens {prompt_tokens}; a prompt contains its prefix"
            )
        return int(text)

    def _check_turn(self, line: int, talk: str, prompt_tokens: int, group: str, shared: int) -> None:
        if talk not in self._history:
            return
        history, first_group, first_shared = self._history[talk]
        if prompt_tokens <= history:
            self._faults.append(
                f"line {line}: prompt_tokens {prompt_tokens} of conversation {talk!r} do not exceed the {history} of "
                "the prompt and answer before; a turn sends them all"
            )
        if (group, shared) != (first_group, first_shared):
            self._faults.append(
                f"line {line}: conversation {talk!r} changes its prefix_group or shared_tokens; keep those of its "
                "first turn"
            )
