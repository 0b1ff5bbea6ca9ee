"""Arrays of `.npy` and `.npz` files: plain numbers only, never more memory than the file holds, nothing unpickled."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from planner.errors import InputError
from planner.textfile import check_file

_HEADERS: dict[tuple[int, int], Callable[[Any], Any]] = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}
_MOST_MEMBERS = 10_000
_BOMB_RATIO = 200
"""Unpacked over packed bytes beyond which a large archive is a bomb; routing records reach 20."""
_BOMB_BYTES = 100e6


def check_archive(archive: zipfile.ZipFile, packed: int, most_bytes: float) -> None:
    """ValueError for an archive of `packed` bytes whose members would fill the memory."""
    members = archive.infolist()
    if any(member.compress_size > packed for member in members):
        raise ValueError("a member is larger than the archive")
    unpacked = sum(member.file_size for member in members)
    if len(members) > _MOST_MEMBERS or unpacked > most_bytes:
        raise ValueError(f"{len(members):,} members of {unpacked / 1e6:,.0f} MB; at most {most_bytes / 1e6:,.0f} MB")
    if unpacked > max(_BOMB_BYTES, _BOMB_RATIO * packed):
        raise ValueError(f"{packed / 1e6:.1f} MB unpack to {unpacked / 1e6:,.0f} MB")


def read_arrays(
    path: Path, error: type[InputError], most_bytes: float, remedy: str = "Write it again."
) -> dict[str, NDArray[Any]]:
    """Arrays of an `.npz` by name; `error` with `remedy` when it is damaged, too large or holds Python objects."""
    packed = check_file(path, error, most_bytes)
    try:
        with zipfile.ZipFile(path) as archive:
            check_archive(archive, packed, most_bytes)
            found = {}
            for member in archive.infolist():
                with archive.open(member) as stream:
                    _check_claim(stream, member.file_size)
                with archive.open(member) as stream:
                    found[member.filename.removesuffix(".npy")] = _read(stream)
            return found
    except Exception as fault:  # a damaged header can raise nearly anything
        raise error(f"{path}: cannot be read as .npz ({fault}). {remedy}") from fault


def read_array(path: Path, error: type[InputError], most_bytes: float, remedy: str = "Write it again.") -> NDArray[Any]:
    """The array of an `.npy`; errors as in `read_arrays`."""
    size = check_file(path, error, most_bytes)
    try:
        with path.open("rb") as stream:
            return array_of(stream, size)
    except Exception as fault:  # a damaged header can raise nearly anything
        raise error(f"{path}: cannot be read as .npy ({fault}). {remedy}") from fault


def array_of(stream: IO[bytes], size: int) -> NDArray[Any]:
    """The array in a seekable `.npy` stream of `size` bytes; raises nearly anything when it is damaged."""
    _check_claim(stream, size)
    stream.seek(0)
    return _read(stream)


def _read(stream: IO[bytes]) -> NDArray[Any]:
    array = np.asarray(npy.read_array(stream, allow_pickle=False))
    if array.dtype.kind == "U":
        array.tolist()  # numpy keeps code points that no text has, and fails when somebody looks
    return array


def _check_claim(stream: IO[bytes], size: int) -> None:
    """ValueError when the header claims more than the `size` bytes of the stream, or anything but numbers."""
    version = npy.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"array format {version}")
    shape, _, dtype = _HEADERS[version](stream)
    if dtype.hasobject or dtype.names:
        raise ValueError(f"it holds {dtype}, not plain numbers")
    # A shape with a zero hides the other lengths from the product, but not from numpy.
    if min(shape, default=1) < 0 or math.prod(max(n, 1) for n in shape) * dtype.itemsize > max(size, 64):
        raise ValueError(f"it claims {shape} of {dtype} in {size:,} bytes")
