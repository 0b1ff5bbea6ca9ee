"""Units on a Ray cluster: the extra `cluster` brings ray, and every node needs this version of moeplan."""

from __future__ import annotations

import importlib
import logging
import socket
from typing import Any

from planner import __version__
from planner.errors import InputError
from planner.sweep.units import Result, Unit
from planner.units import whole_number

_REACH_S = 5.0
_LAST_PORT = 65535


class RayCluster:
    """Answers units as Ray tasks of one CPU each.

    `address` is host:port of the head of a running cluster that this machine belongs to, or empty: the cluster that
    `RAY_ADDRESS` names, else one of this machine alone. Raises InputError where ray is missing, the cluster cannot be
    reached, or a node has another version of moeplan.
    """

    def __init__(self, work: Any, address: str, num_workers: int | None = None) -> None:
        try:
            ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise InputError("--executor ray: ray is not installed. pip install 'moeplan[cluster]'") from error
        self._ray = ray
        self._owned = not ray.is_initialized()
        if self._owned:
            try:
                _reach(address)
                ray.init(
                    address=address or None, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False
                )
            except (OSError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"--executor ray://{address}: no Ray cluster answers there ({error}). Give host:port of its head "
                    "(6379 by default) on a machine of the cluster, with the token of the cluster in RAY_AUTH_TOKEN "
                    "if it wants one, or use --executor processes."
                ) from error
        self.num_workers = num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        # Losses are counted by the caller, the same for all executors.
        self._task = ray.remote(max_retries=0, num_cpus=1)(_answer).options(name="moeplan unit")
        self._work, self._running = ray.put(work), dict[Any, int]()

    def start(self, unit: Unit) -> None:
        """Send `unit` to the cluster."""
        self._running[self._task.remote(self._work, unit)] = unit.number

    def finished(self) -> list[tuple[int, Result | None]]:
        """Results that have come, and losses of workers or nodes."""
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        done: list[tuple[int, Result | None]] = []
        for reference in ready:
            number = self._running.pop(reference)
            try:
                version, result = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError:
                raise
            except self._ray.exceptions.RayError:
                done.append((number, None))
                continue
            if version != __version__:
                raise InputError(
                    f"--executor ray: a node has moeplan {version}, this machine {__version__}. Install the same."
                )
            done.append((number, result))
        return done

    def close(self) -> None:
        """Give up what is under way, and leave the cluster."""
        for reference in self._running:
            self._ray.cancel(reference, force=True)
        if self._owned:
            self._ray.shutdown()


def _reach(address: str) -> None:
    """OSError when nothing listens at host:port, which ray itself takes a minute to say."""
    host, colon, port = address.rpartition(":")
    number = whole_number(port) if colon else None
    if number is not None and number > _LAST_PORT:
        raise OSError(f"ports end at {_LAST_PORT}")
    if number is not None:
        socket.create_connection((host, number), timeout=_REACH_S).close()


def _answer(work: Any, unit: Unit) -> tuple[str, Result]:
    """The task: the version of the node beside the result."""
    return __version__, work(unit)
