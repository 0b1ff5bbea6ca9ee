"""Options about drafting and overlap that `plan` and `simulate` share."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Group, Parameter

from planner.choices import TacticChoices

NONE = TacticChoices()
Chosen = Annotated[TacticChoices, Parameter(name="*", group=Group.create_ordered("Speculation and overlap"))]
