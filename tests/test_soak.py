"""An hour of the long soak; `benchmarks/soak.py` simulates a day."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import soak


@pytest.mark.slow
@pytest.mark.parametrize("server", soak.SERVERS)
def test_an_hour_of_load_keeps_the_books(server: str) -> None:
    found = soak.soak(server, 1.0)
    assert found["checks"] > 50
    assert found["flat"]
    assert found["requests"] > 1000


def test_the_day_swings_around_its_mean() -> None:
    times = np.array(soak.diurnal(1.0, 24.0).times_s)
    hourly = np.bincount((times // 3600).astype(int), minlength=24)
    assert len(times) == pytest.approx(86400, rel=0.02)
    assert hourly[11:13].mean() / hourly[[0, 23]].mean() == pytest.approx(1.6 / 0.4, rel=0.1)


def test_wrong_books_are_noticed() -> None:
    rank = SimpleNamespace(
        free_blocks=9, total_blocks=9, running={}, waiting=[], num_decoding=0, context_tokens=0, final_blocks=0
    )
    group = SimpleNamespace(index=0, ranks=[rank], mail=[], in_flight=0)
    auditor = soak.Auditor()
    spec = SimpleNamespace(max_num_seqs=4, largest_request_tokens=100)
    auditor.run = SimpleNamespace(groups=[group], spec=spec, in_flight=[0], num_done=3, num_requests=5)
    auditor.check()
    for wrong in ({"free_blocks": 10}, {"num_decoding": 1}, {"final_blocks": -1}, {"waiting": [1]}):
        kept = {name: getattr(rank, name) for name in wrong}
        vars(rank).update(wrong)
        with pytest.raises(AssertionError):
            auditor.check()
        vars(rank).update(kept)
    auditor.run.num_done = 6
    with pytest.raises(AssertionError):
        auditor.check()
