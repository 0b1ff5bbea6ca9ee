"""Small kernels around the large ones: absorbed MLA projections and activation quantisation."""

from __future__ import annotations

import numpy as np

from planner.measurements.importer.clean import Cleaned, thin
from planner.measurements.importer.kernels import GEMM_TOKENS, MS, Rows, _formats
from planner.measurements.importer.source import ENGINES, Source
from planner.measurements.roofline import Ceilings

_PARTS = {"mla_gen_pre": "pre", "mla_gen_post": "post"}
_QUANTISED_COLUMNS = np.array([1536, 2048, 2880, 4096, 6144, 7168, 8192, 12288, 16384])
"""Hidden and expert widths of the catalogue's models; the source has 22 values up to 65,536."""


def mla_bmm(source: Source, ceilings: Ceilings) -> Cleaned | None:
    """Batched products into and out of the latent space; axis: tokens."""
    rows = Rows.empty()
    for engine in ENGINES:
        found = source.newest("mla_bmm", engine, "mla_bmm")
        if found is None:
            continue
        version, frame = found
        frame = frame[frame["op_name"].isin(list(_PARTS))]
        if not len(frame):
            continue
        source.note("mla_bmm", engine, version, frame)
        rows.add(
            {
                "engine": engine,
                "fmt": _formats(frame["bmm_dtype"].to_numpy()),
                "part": frame["op_name"].map(_PARTS).to_numpy(),
                "heads": frame["num_heads"].to_numpy(),
                "tokens": frame["num_tokens"].to_numpy(),
                "seconds": frame["latency"].to_numpy() * MS,
            }
        )
    return rows.table("mla_bmm", ("engine", "fmt", "part", "heads"), ("tokens",))


def quantize(source: Source, ceilings: Ceilings) -> Cleaned | None:
    """Finding the scale of [tokens, cols] activations, and applying it."""
    rows = Rows.empty()
    for engine in ENGINES:
        for kind, file in (("compute_scale", "computescale"), ("scale_matrix", "scale_matrix")):
            found = source.newest("quantize", engine, file)
            if found is None:
                continue
            version, frame = found
            frame = frame[thin(frame["m"].to_numpy(), GEMM_TOKENS) & frame["k"].isin(_QUANTISED_COLUMNS)]
            # Scale finding was timed as a difference of two kernels; where that is not positive it says nothing.
            positive = frame["latency"] > 0
            rows.drop("difference of two times is not positive", (~positive).sum())
            frame = frame[positive]
            if not len(frame):
                continue
            source.note("quantize", engine, version, frame)
            rows.add(
                {
                    "engine": engine,
                    "fmt": _formats(frame["quant_dtype"].to_numpy()),
                    "kind": kind,
                    "cols": frame["k"].to_numpy(),
                    "tokens": frame["m"].to_numpy(),
                    "seconds": frame["latency"].to_numpy() * MS,
                }
            )
    return rows.table("quantize", ("engine", "fmt", "kind", "cols"), ("tokens",))
