"""Options of a prefill and a decode pool in `simulate`."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Group, Parameter

from planner.choices import PoolChoices

ONE_POOL = PoolChoices()
Pools = Annotated[PoolChoices, Parameter(name="*", group=Group.create_ordered("Two pools"))]
