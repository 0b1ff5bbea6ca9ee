"""Reading a file of torch.save without torch, and without running anything that is in it.

Such a file is a zip of a pickle and of raw storages. The pickle may only ask for plain containers and for tensors,
which become numpy arrays; every other name in it is refused before it is looked up.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from planner.arrayfile import check_archive
from planner.errors import WorkloadError

_DTYPES = {
    "BoolStorage": "?",
    "ByteStorage": "u1",
    "CharStorage": "i1",
    "ShortStorage": "<i2",
    "IntStorage": "<i4",
    "LongStorage": "<i8",
    "HalfStorage": "<f2",
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "BFloat16Storage": "bf16",
}
"""Numpy types of torch's storage classes; numpy has no bf16, it is widened to fp32."""


def read_torch(path: Path, max_bytes: float) -> Any:
    """Content of a `.pt` file with numpy arrays for tensors.

    Raises WorkloadError on a file that is damaged, too large once unpacked, older than the zip format, or that
    asks for anything but tensors and plain containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            check_archive(archive, path.stat().st_size, max_bytes)
            names = archive.namelist()
            pickled = next((n for n in names if n.endswith("/data.pkl")), None)
            if pickled is None:
                raise WorkloadError(f"{path}: a zip without data.pkl is no file of torch.save. {_remedy(path)}")
            prefix = pickled.removesuffix("data.pkl")
            if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
                raise WorkloadError(f"{path}: saved on a big-endian machine. {_remedy(path)}")
            raw = archive.read(pickled)
            _check_pickle(raw)
            return _Unpickler(io.BytesIO(raw), archive, f"{prefix}data/", max_bytes).load()
    except (WorkloadError, OSError):
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise WorkloadError(f"{path}: cannot be read as a file of torch.save ({error}). {_remedy(path)}") from error


def _check_pickle(raw: bytes) -> None:
    """UnpicklingError for a pickle that would have memory set aside for more than it holds."""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
        if opcode.name in ("PUT", "LONG_BINPUT") and argument is not None and argument > number:
            raise pickle.UnpicklingError(f"memo {argument:,} at instruction {number:,}")


class _Unpickler(pickle.Unpickler):
    """Knows tensors, storages and OrderedDict, and nothing else."""

    def __init__(self, stream: Any, archive: zipfile.ZipFile, folder: str, max_bytes: float) -> None:
        super().__init__(stream)
        self._archive, self._folder, self._max_bytes = archive, folder, max_bytes

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}; only tensors and plain containers are read")

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, _, _ = pid
        raw = self._archive.read(f"{self._folder}{key}")
        if dtype == "bf16":
            return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        return np.frombuffer(raw, dtype)

    def _tensor(self, storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
        """Strides come from the file: they are checked before numpy follows them through memory."""
        count, lowest = math.prod(size), min((offset, *stride, *size))
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if count * storage.itemsize > self._max_bytes or lowest < 0 or (count and last >= storage.size):
            raise pickle.UnpicklingError(f"tensor of size {size} and stride {stride} exceeds its storage")
        steps = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()


def _remedy(path: Path) -> str:
    return (
        'Where torch is installed and the file is trusted, convert it: python -c "import torch, numpy; '
        f"d = torch.load('{path.name}', weights_only=True); "
        f"numpy.savez('{path.stem}.npz', logical_count=d['logical_count'].cpu())\""
    )
