"""What a user may say about failures, as typed; `planner.failures.settings` makes numbers of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OnFailure = Literal["retry", "resume", "drop"]


@dataclass(frozen=True)
class RecoveryChoices:
    """How a failure is noticed and how long a replica takes to come back.

    Parameters
    ----------
    detect
        Time until a failed rank is noticed, such as 10s; the engine's timeout for a hanging collective otherwise.
    load_from
        Where weights come from when a replica starts: nvme, dram (page cache or a copy in host memory), network
        (shared file system), peer (another replica's GPUs), or a rate per node such as 10GB/s.
    provision
        Time until a machine with the container image is there, before the engine starts, such as 2min.
    """

    detect: str | None = None
    load_from: str = "nvme"
    provision: str = "0s"


@dataclass(frozen=True)
class FailureChoices(RecoveryChoices):
    """Failures of ranks during a simulation.

    Parameters
    ----------
    fail_at
        Kill a rank at this time, such as 60s, or 60s,1 for one of replica 1 (the first is 0); may be repeated.
    mtbf_gpu
        Kill ranks at random with this mean time between failures of one GPU, such as 50000h.
    on_failure
        What becomes of requests on a dead replica: retry from the start, resume after the tokens already sent, or
        drop (the client gives up).
    elastic
        Survivors of an expert-parallel group go on without the dead rank (SGLang, vLLM; needs redundant_experts).
    """

    fail_at: tuple[str, ...] = ()
    mtbf_gpu: str | None = None
    on_failure: OnFailure = "retry"
    elastic: bool = False
