"""Measured profiles: their one format, how they come in, and how far they can be trusted.

ops         the operations, their key and axis columns, JSON schema
rows        rows of one operation, between CSV and compiled tables
csvfiles    <op>.csv, every fault of every file at once
nccl_logs   text logs of nccl-tests and rccl-tests
meta        meta.json
importing   any source to a compiled profile, in one step
bounds      the shortest time physics allows
time_unit   seconds or milliseconds taken for microseconds
checks      faults of rows: impossible, duplicate, falling, outlier
inspect     `profiles check` of a whole profile
comparison  `profiles compare`: ratios between two profiles
"""

from __future__ import annotations
