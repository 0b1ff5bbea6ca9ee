"""Files of torch.save are read without torch, and nothing inside them is ever run."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.errors import WorkloadError
from planner.routing import torch_files
from planner.routing.formats import read_record


class Malicious:
    """Unpickled the ordinary way it would create a file."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._target,)


def pt_of(path: Path, pickled: bytes, storage: bytes = b"") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/data/0", storage)
    return path


def test_a_malicious_pickle_is_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "ran"
    payload = pickle.dumps({"logical_count": Malicious(victim)})
    pickle.loads(payload)
    assert victim.exists()
    victim.unlink()
    with pytest.raises(WorkloadError, match=r"asks for pathlib.*torch.load\('evil.pt', weights_only=True\)"):
        read_record(pt_of(tmp_path / "evil.pt", payload))
    assert not victim.exists()


def tensor_pickle(size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """What torch.save writes for {"logical_count": tensor} over the storage "0" of eight int64, in protocol 0."""
    shape = "".join("(" + "".join(f"I{n}\n" for n in values) + "t" for values in (size, stride))
    storage = "(S'storage'\nctorch\nLongStorage\nS'0'\nS'cpu'\nI8\ntQ"
    return f"(S'logical_count'\nctorch._utils\n_rebuild_tensor_v2\n({storage}I0\n{shape}I00\nNtRd.".encode()


def test_strides_stay_inside_the_storage(tmp_path: Path) -> None:
    storage = np.arange(8).tobytes()
    found = read_record(pt_of(tmp_path / "a.pt", tensor_pickle((2, 4), (1, 2)), storage))
    np.testing.assert_array_equal(found.counts, np.arange(8).reshape(4, 2).T)
    for size, stride in (((2, 5), (5, 1)), ((2, 4), (-4, 1)), ((10**6, 10**6), (0, 0)), ((-2, 4), (4, 1))):
        with pytest.raises(WorkloadError, match="exceeds its storage"):
            read_record(pt_of(tmp_path / "b.pt", tensor_pickle(size, stride), storage))


def test_torch_tensors_of_every_kind(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    value = torch.arange(24).reshape(2, 3, 4)
    kinds = (torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)
    torch.save({str(k): value.to(k)[:, 1:].transpose(0, 2) for k in kinds}, tmp_path / "kinds.pt")
    for array in torch_files.read_torch(tmp_path / "kinds.pt", 1e6).values():
        np.testing.assert_array_equal(array, value[:, 1:].transpose(0, 2).numpy())


@pytest.mark.parametrize("content", [b"\x80\x02}q\x00.", b"garbage", pickle.dumps({"logical_count": [[1]]})])
def test_old_or_damaged_torch_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "old.pt"
    path.write_bytes(content)
    with pytest.raises(WorkloadError, match=r"cannot be read as a file of torch.save.*convert it"):
        read_record(path)
    with pytest.raises(WorkloadError, match="cannot be read"):
        read_record(pt_of(path, b"\x80\x02}q"))
