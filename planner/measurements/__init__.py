"""Measured kernel and network times, and what to do where there are none.

tables       open_tables(system, engine) -> Tables: one method per operation
curves       Curve, Surface, Origin: time over size, with the origin of every answer
library      which measured series are nearest to a shape
dense        the same for GEMM, on its grid
experts      the same for fused expert layers
transfer     carrying utilisation from a measured shape to another
collectives  collectives and expert exchange, inside and across nodes
roofline     ceilings and closed formulas per operation
links        alpha-beta laws of collectives, and the fabric between nodes
exchange     laws of dispatch and combine, per library
formats      number formats of the tables
store        npz files on disk
importer     from published parquet tables to the store
"""

from __future__ import annotations

from planner.measurements.curves import Curve, Origin, Surface
from planner.measurements.roofline import Fabric
from planner.measurements.tables import Tables, open_tables

__all__ = ["Curve", "Fabric", "Origin", "Surface", "Tables", "open_tables"]
