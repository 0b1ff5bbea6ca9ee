"""Options about the experts that `plan`, `simulate` and `experts variants` share."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Group, Parameter

from planner.choices import ExpertChoices

DEFAULTS = ExpertChoices()
Experts = Annotated[ExpertChoices, Parameter(name="*", group=Group.create_ordered("Experts"))]
