"""`python -m microbench --out DIR`: measure this machine; run it again to go on where it stopped."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from microbench import __version__
from microbench.cases import OPS
from microbench.errors import InputError, nearest
from microbench.grid import Setting, cases
from microbench.models import Shape, built_in_shapes
from microbench.shapes import read_shapes

if TYPE_CHECKING:
    from microbench.ranks import Ranks
    from microbench.results import Store
    from microbench.runner import Run

_DONE, _FAILED, _BAD_INPUT, _INTERRUPTED = 0, 1, 2, 130


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the exit code is 0 done, 1 GPU lost, 2 bad input, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        return _measure(options)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(error, file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m microbench",
        description="Times the operations of MoE serving on this machine. Start it with torchrun for communication.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write to, or to go on in")
    parser.add_argument("--model-shapes", type=Path, metavar="FILE", help="shapes from: moeplan profiles shapes MODEL")
    parser.add_argument("--minutes", type=float, default=10.0, help="time to spend (default 10)")
    parser.add_argument("--only", default="", metavar="OP,...", help=f"operations: {', '.join(OPS)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a GPU (ROCm too)")
    parser.add_argument("--nvme", type=Path, metavar="PATH", help="folder or file on the NVMe drive to read from")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def _measure(options: argparse.Namespace) -> int:
    shapes = _chosen_shapes(options)
    from microbench.results import Store

    if os.environ.get("RANK", "0") != "0":
        return _run(options, shapes, None)
    with closing(Store(options.out)) as store:
        return _run(options, shapes, store)


def _run(options: argparse.Namespace, shapes: list[tuple[str, Shape]], store: Store | None) -> int:
    """Measure; `store` is the leader's."""
    from microbench.device import open_device
    from microbench.environment import Meta
    from microbench.ranks import join, local_rank
    from microbench.runner import GpuLost, Run
    from microbench.schedule import Queue, without

    device = open_device(options.device, local_rank())
    ranks = join(device.is_cuda)
    run = Run(device, ranks, options.minutes, options.nvme, store)
    if store is not None:
        run.meta = Meta(options.out, device, ranks)
        run.meta.write()
        wanted = cases(shapes, _setting(ranks, options))
        run.queue = Queue(without(wanted, store.done))
        _announce(shapes, ranks, len(wanted), len(run.queue))
    try:
        run.go()
        ranks.close()
    except GpuLost as error:
        print(f"the GPU is in an error state ({error}); the same command goes on behind this case", file=sys.stderr)
        return _FAILED
    finally:
        _finish(run, options.nvme)
    return _DONE


def _chosen_shapes(options: argparse.Namespace) -> list[tuple[str, Shape]]:
    """Shapes of the file or the built-in ones, of the operations of --only."""
    if not 0 < options.minutes < 1e6:
        raise InputError(f"--minutes {options.minutes:g}: use a positive number.")
    if options.nvme is not None and not options.nvme.exists():
        raise InputError(f"--nvme {options.nvme}: no such file or folder.")
    only = [name.strip() for name in options.only.split(",") if name.strip()]
    for name in only:
        if name not in OPS:
            raise InputError(f"--only {name}: unknown operation; {nearest(name, OPS)}")
    shapes = read_shapes(options.model_shapes) if options.model_shapes else built_in_shapes()
    return [(op, shape) for op, shape in shapes if not only or op in only]


def _setting(ranks: Ranks, options: argparse.Namespace) -> Setting:
    setting = Setting(has_nvme=options.nvme is not None)
    return replace(setting, collective_engine=ranks.engine, groups=ranks.groups())


def _announce(shapes: list[tuple[str, Shape]], ranks: Ranks, num_cases: int, num_left: int) -> None:
    communication = sorted({op for op, _ in shapes if OPS[op].collective})
    if communication and ranks.size == 1:
        names = " and ".join(communication)
        print(f"{names}: skipped, one process; start with torchrun --nproc-per-node N -m microbench", file=sys.stderr)
    print(f"{num_cases} cases, {num_cases - num_left} on disk already", file=sys.stderr, flush=True)


def _finish(run: Run, nvme: Path | None) -> None:
    """The leader closes its files and tells what came of the run."""
    from microbench.memory import remove_scratch

    if run.store is None or run.meta is None:
        return
    run.store.finish()
    run.meta.write()
    left = len(run.queue) if run.queue is not None else 0
    failures = f", {run.failed} failed or unsupported (failures.csv)" if run.failed else ""
    more = f", {left} left: the same command goes on" if left else ""
    print(f"{run.measured} measured{failures}{more}; {run.store.directory}", file=sys.stderr, flush=True)
    if nvme is not None:
        remove_scratch(nvme)


if __name__ == "__main__":
    sys.exit(main())
