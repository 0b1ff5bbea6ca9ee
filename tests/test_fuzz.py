"""Damaged files end in an answer or in one message: what once broke a reader, the hostile kinds, and fresh damage."""

from __future__ import annotations

import io
import json
import random
import sys
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import fuzz
from fuzz_mutations import odd_paths
from fuzz_readers import READERS, Reader, members_of

from planner import arrayfile
from planner.arrayfile import read_array, read_arrays
from planner.errors import InputError, PlannerError, nearest
from planner.routing.torch_files import read_torch
from planner.textfile import check_file, is_file, opened, parse_json, read_text
from planner.tomlfile import MOST_FAULTS, parse, split_sources

FILES = [name for name, reader in READERS.items() if reader.suffix != ".flag" and name != "command line"]
FINE = ("ok", "refused")


def judged(reader: Reader, raw: bytes, folder: Path) -> str:
    scratch, path = folder / "scratch", folder / f"input{reader.suffix}"
    scratch.mkdir()
    path.write_bytes(raw)
    return fuzz.attempt(reader, path, scratch)


def with_member(raw: bytes, name: str, array: object) -> bytes:
    members = members_of(raw)
    buffer = io.BytesIO()
    np.save(buffer, array)  # type: ignore[arg-type]
    members[name] = buffer.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as target:
        for member, content in members.items():
            target.writestr(member, content)
    return packed.getvalue()


HUGE = b"hbm_bytes = 1" + b"0" * 400 + b" # "
BROKE: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "header that is a number": ("measured table", lambda raw: with_member(raw, "header.npy", np.array(4 * 10**9))),
    "keys of no series": ("measured table", lambda raw: with_member(raw, "key_engine.npy", np.zeros(0, int))),
    "codes without names": ("measured table", lambda raw: with_member(raw, "key_engine.npy", np.array([7, 7]))),
    "counts of other rows": ("measured table", lambda raw: with_member(raw, "counts.npy", np.array([1, 10**6]))),
    "no time column": ("nccl-tests log", lambda raw: raw.replace(b" time ", b" tame ")),
    "repeats beyond int": ("nccl-tests log", lambda raw: raw.replace(b" iters: 20", b" iters: " + b"9" * 5000)),
    "a message beyond int": ("nccl-tests log", lambda raw: raw.replace(b"  1048576 ", b"  1" + b"0" * 400 + b" ")),
    "a name beyond folders": ("hardware TOML", lambda raw: b"name = '../" + b"a" * 9000 + b"'\n" + raw),
    "an expert that is null": ("placement JSON", lambda raw: raw.replace(b"[0, 1", b"[null, 1", 1)),
    "experts beyond memory": ("routing JSON", lambda raw: raw.replace(b"[0, 1", b"[2000000000, 1")),
    "a number beyond float": ("hardware TOML", lambda raw: raw.replace(b"hbm_bytes = ", HUGE, 1)),
    "a thousand columns": ("points.csv", lambda raw: raw.replace(b"id,", b"id," + b"x," * 60_000, 1)),
    "columns without end": ("routing CSV", lambda raw: b"," * 10**6 + raw),
    "one row without end": ("routing CSV", lambda raw: raw + b"a,3,0," + b"0," * 10**5 + b"\n"),
    "a field without end": ("trace CSV", lambda raw: raw + b"9" * 200_000 + b",1,1\n"),
    "many columns": ("profile CSV", lambda raw: raw.replace(b"engine,", b"engine," + b"x," * 50_000, 1)),
}
"""Damage that fuzzing found, by what it is: the reader and the change to its sane files."""


@pytest.mark.parametrize("name", BROKE)
def test_what_broke_a_reader_once(name: str, tmp_path: Path) -> None:
    kind, change = BROKE[name]
    found = []
    for number, seed in enumerate(READERS[kind].seeds()):
        raw = change(seed)
        if raw != seed:
            (folder := tmp_path / str(number)).mkdir()
            found.append(judged(READERS[kind], raw, folder))
    assert found and set(found) <= set(FINE)


@pytest.mark.parametrize("path", sorted(fuzz.KEPT.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_the_fuzzer_kept(path: Path, tmp_path: Path) -> None:
    assert judged(READERS[path.parent.name.replace("_", " ")], path.read_bytes(), tmp_path) == "refused"


@pytest.mark.parametrize("values", [["x"] * 4, [None] * 4, [[1, 2]] * 4, [b"\xff"] * 4, [-1.0] * 4, [float("nan")] * 4])
@pytest.mark.parametrize("column", ["gemm_dtype", "m", "latency"])
def test_parquet_columns_of_another_kind(values: list[object], column: str, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.read_parquet(io.BytesIO(READERS["parquet"].seeds()[0])).assign(**{column: values})
    frame.to_parquet(buffer := io.BytesIO())
    assert judged(READERS["parquet"], buffer.getvalue(), tmp_path) in FINE


@pytest.mark.parametrize("name", READERS)
def test_fresh_damage(name: str, tmp_path: Path) -> None:
    """A dozen seeded mutants of each kind of file; `benchmarks/fuzz.py` makes millions."""
    reader = READERS[name]
    number = 3 if name == "command line" else 12
    for count, (_, raw) in enumerate(islice(fuzz.mutants(reader, reader.seeds(), random.Random(name)), number)):
        folder = tmp_path / str(count)
        folder.mkdir()
        assert judged(reader, raw, folder) in FINE, raw[:200]


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_hostile_inputs_and_two_seconds_of_damage(name: str) -> None:
    """All fixed inputs (bombs, deep nesting, pickles, devices) and fresh ones under the memory limit, in a child."""
    assert fuzz.run(name, 2.0, seed=1)["findings"] == []


@pytest.mark.parametrize("name", ["trace CSV", "engine TOML", "placement JSON"])
def test_paths_that_are_no_files(name: str, tmp_path: Path) -> None:
    reader, folder = READERS[name], tmp_path / "odd"
    folder.mkdir()
    for number, (kind, path) in enumerate(odd_paths(folder, reader.suffix)):
        scratch = tmp_path / f"scratch{number}"
        scratch.mkdir()
        assert fuzz.attempt(reader, path, scratch) in FINE, kind


@pytest.mark.parametrize(
    "text",
    [
        "a" + ".b" * 40_000 + " = 1",
        "[" + "a." * 40_000 + "a]",
        "a = " + "[" * 50_000,
        "a = " + "9" * 500_000,
        "".join(f"a{'.b' * 40}{line} = 1\n" for line in range(2000)),
        "".join(f"k{line}_source = 'x'\n" for line in range(10_000)),
    ],
    ids=["dotted key", "dotted table", "nesting", "digits", "dotted keys", "sources"],
)
def test_text_that_takes_parsers_for_ever(text: str, tmp_path: Path) -> None:
    assert judged(READERS["calibration TOML"], text.encode(), tmp_path) == "refused"


def test_a_fuzzed_reader_that_fails_is_noticed(tmp_path: Path) -> None:
    """The judge itself: crashes, hangs, silence and execution are findings."""

    def spin(path: Path, scratch: Path) -> None:
        while True:
            pass

    def raises(error: BaseException) -> Reader:
        def read(path: Path, scratch: Path) -> None:
            raise error

        return Reader(".x", list, read)

    folders = iter(tmp_path / str(number) for number in range(9))

    def verdict(reader: Reader) -> str:
        (folder := next(folders)).mkdir()
        return judged(reader, b"", folder)

    assert verdict(raises(KeyError("x"))).startswith("KeyError")
    assert verdict(raises(PlannerError(""))).startswith("message of 0")
    assert verdict(raises(PlannerError("fine"))) == "refused"
    assert verdict(Reader(".x", list, spin, limit_s=0.05)).startswith("hang")
    assert verdict(Reader(".x", list, lambda path, scratch: fuzz.VICTIM.touch())) == "executed what is in the file"
    assert not fuzz.VICTIM.exists()


# --- the bounds themselves ---


def test_text_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text(path) == "one\r\ntwo"
    assert is_file(path) and not is_file(tmp_path / ("n" * 300)) and not is_file(Path("a\0b"))
    with pytest.raises(InputError, match=r"at most 0 MB are read\. Shorten it"):
        check_file(path, most_bytes=3, remedy="Shorten it.")
    path.write_bytes("a = 1".encode("utf-16"))
    with pytest.raises(InputError, match="not UTF-8 text"):
        read_text(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path / ("n" * 300))
    with pytest.raises(InputError, match="a pipe or device"):
        read_text(Path("/dev/zero"))
    with pytest.raises(InputError, match="cannot be read: .*null byte"), opened(Path("a\0b")):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [("[" * 100_000, "nested too deeply"), ("9" * 5000, "not valid JSON"), ("{", "not valid JSON: .* line 1")],
)
def test_json_that_is_none(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"here: {message}"):
        parse_json(text, "here")


def test_tomls_with_many_dots_in_values_are_read() -> None:
    text = 'a = "' + "e.g. " * 60 + '"\nb = [' + "1.5, " * 60 + "]\n# " + "." * 80 + "\n" + "c.d.e = 1\n"
    assert parse(text, "here")["c"] == {"d": {"e": 1}}
    with pytest.raises(InputError, match="a key of more than"):
        parse(".".join(["'a'"] * 60) + " = 1", "here")


def test_sources_need_a_key_that_they_are_of() -> None:
    tables = {"layer_s": 1, "layer_s_source": "x", "prompt_source": "y", "prompt_s": 2, "note_source": "kept"}
    facts, sources = split_sources(tables)
    assert facts == {"layer_s": 1, "prompt_s": 2, "note_source": "kept"}
    assert sources == {"layer_s": "x", "prompt": "y"}


def test_messages_and_hints_stay_short() -> None:
    assert len(str(PlannerError("x" * 100_000))) < 9000
    assert str(PlannerError("short")) == "short"
    assert len(nearest("a" * 10**6, ["b" * 10**6, "c"])) < 300
    many = "".join(f"k{number} = 1\n" for number in range(5000))
    with pytest.raises(InputError) as caught:
        from planner.calibration import Calibrations
        from planner.tomlfile import checked

        checked(Calibrations, parse(many, "here"), "here")
    assert len(str(caught.value).splitlines()) == MOST_FAULTS + 2


def archive(path: Path, **arrays: object) -> Path:
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


def test_arrays_are_plain_and_no_larger_than_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "a.npz", whole=np.arange(6).reshape(2, 3), real=np.array([0.5]), empty=np.zeros((0, 3)))
    found = read_arrays(path, InputError, 1e6)
    assert found["whole"].tolist() == [[0, 1, 2], [3, 4, 5]] and found["empty"].shape == (0, 3)
    np.save(tmp_path / "f.npy", np.asfortranarray(np.arange(6).reshape(2, 3)))
    assert read_array(tmp_path / "f.npy", InputError, 1e6).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(InputError, match="not plain numbers"):
        read_arrays(archive(tmp_path / "o.npz", a=np.array([{}], dtype=object)), InputError, 1e6)
    with pytest.raises(InputError, match="at most 1 MB"):
        read_arrays(archive(tmp_path / "l.npz", a=np.zeros(200_000)), InputError, 1e6)
    monkeypatch.setattr(arrayfile, "_BOMB_BYTES", 1e6)
    with pytest.raises(InputError, match="unpack to 2 MB"):
        read_arrays(archive(tmp_path / "b.npz", a=np.zeros(200_000)), InputError, 1e9)
    buffer = io.BytesIO()
    np.save(buffer, np.arange(4))
    lie = buffer.getvalue().replace(b"(4,)", b"(9,)").replace(b"(9,), }", b"(4000000000,), }")[: len(buffer.getvalue())]
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as target:
        target.writestr("a.npy", lie)
    with pytest.raises(InputError, match="cannot be read as .npz"):
        read_arrays(tmp_path / "lie.npz", InputError, 1e12)


def test_a_pickle_may_not_ask_for_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for pickled in (b"\x80\x02]r\xff\xff\xff\x7f.", b"\x80\x04\x8e\x00\x00\x00\x00\x01\x00\x00\x00x."):
        with zipfile.ZipFile(path, "w") as target:
            target.writestr("archive/data.pkl", pickled)
        with pytest.raises(InputError, match="cannot be read as a file of torch.save"):
            read_torch(path, 1e9)


def test_a_model_named_as_a_script_stays_a_name(tmp_path: Path) -> None:
    """Names come into the report escaped; tests/test_report.py looks at every place."""
    from planner.model import load

    config = {"architectures": ["MixtralForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 100}
    config |= {"num_local_experts": 4, "num_experts_per_tok": 2, "model_type": "mixtral"}
    path = tmp_path / "<script>alert(1)<" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(config))
    assert load(str(path)).name == "<script>alert(1)<"
