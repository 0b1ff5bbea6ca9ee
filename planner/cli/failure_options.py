"""Options about failures that `simulate`, `failures` and `scale-out` share."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Group, Parameter

from planner.failures.choices import FailureChoices, RecoveryChoices

NO_FAILURES = FailureChoices()
AS_ENGINE = RecoveryChoices()
_GROUP = Group.create_ordered("Failures")
Failures = Annotated[FailureChoices, Parameter(name="*", group=_GROUP)]
Recoveries = Annotated[RecoveryChoices, Parameter(name="*", group=_GROUP)]
