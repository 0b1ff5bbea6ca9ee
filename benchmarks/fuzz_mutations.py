"""Seeded damage to files: bytes, text, JSON values, CSV cells, members of archives; and files that were never sane."""

from __future__ import annotations

import io
import json
import os
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**9, 10**30, 10**400, -(10**12), 0.5, -0.0, 1e308, 1e-320,
    float("inf"), float("-inf"), float("nan"), "", "0", "nan", "1e9", "\x00", "<script>alert(1)</script>",
    "../../etc/passwd", "/dev/zero", "a" * 100_000, "\ud800", "é漢\u202e", [], {}, [[]], [1, "a", None],
    {"value": 1}, [0] * 100_000, "auto", "bf16", "fp8",
]  # fmt: skip
WORDS = [
    b"nan", b"inf", b"-inf", b"-1", b"0", b"1e9", b"1000000000", b"1e308", b"1e400", b"9" * 5000, b"\x00", b"\xff\xfe",
    b'"', b"'", b"'''", b"[", b"]", b"{", b"}", b",", b"=", b"#", b"\n", b"\r\n", b"\r", b"\t", b"\\", b"\\u0000",
    b"\xef\xbb\xbf", b"true", b"null", b"0x1F", b"1_000", b"2026-01-01", b"[[a]]", b"a.a.a.a = 1", b"../", b"%s{}",
    b" " * 1000, b"\xe2\x80\xae", b"<script>", b"1e-400", b"-0", b".", b"..", b"e", b"/dev/zero",
]  # fmt: skip
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")


def specials() -> Iterator[tuple[str, bytes]]:
    """Contents that are wrong for every reader."""
    yield "empty", b""
    yield "zeros", bytes(100_000)
    yield "newlines", b"\n" * 1_000_000
    yield "commas", b"," * 1_000_000
    yield "quotes", b'"' * 100_001
    yield "one long line", b"a" * 3_000_000
    yield "spaces", b"#" + b" " * 300_000 + b"x"
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}"), (b"(", b")")):
        yield f"deep {opening!r}", opening * 100_000
        yield f"deep closed {opening!r}", opening * 50_000 + b"1" + closing * 50_000
    yield "deep toml", b"a = " + b"[" * 50_000 + b"]" * 50_000
    yield "deep inline", b"a = " + b"{a=" * 20_000 + b"1" + b"}" * 20_000
    yield "dotted key", b".".join([b"a"] * 100_000) + b" = 1"
    yield "dotted table", b"[" + b".".join([b"a"] * 100_000) + b"]"
    yield "many dotted keys", b"".join(b"a" + b".b" * 40 + b"%d = 1\n" % i for i in range(10_000))
    yield "many tables", b"".join(b"[[a]]\n" for _ in range(100_000))
    yield "many keys", b"".join(b"k%d = 1\n" % i for i in range(100_000))
    yield "long number", b"a = " + b"9" * 1_000_000
    yield "long json number", b'{"a": ' + b"9" * 1_000_000 + b"}"
    yield "long float", b'{"a": 1e' + b"9" * 1_000_000 + b"}"
    yield "many json keys", b"{" + b",".join(b'"%d": 1' % i for i in range(100_000)) + b"}"
    yield "json list", b"[" + b"1," * 500_000 + b"1]"
    yield "lone surrogate", b'{"architectures": ["\\ud800"], "model_type": "\\udfff"}'
    yield "wide csv", b",".join(b"c%d" % i for i in range(50_000)) + b"\n" + b"1," * 50_000
    yield "long field", b"a,b\n" + b"x" * 200_000 + b",1\n"
    yield "utf-16", '{"a": 1}'.encode("utf-16")
    yield "utf-32", "a = 1".encode("utf-32")
    yield "pickle", b"cos\nsystem\n(S'touch /tmp/moeplan-was-here'\ntR."
    yield "shell", b"#!/bin/sh\ntouch /tmp/moeplan-was-here\n"
    yield "empty zip", b"PK\x05\x06" + bytes(18)
    yield "many source keys", b"".join(b"k%d_source = 'x'\n" % i for i in range(50_000))
    yield "zip bomb", _bomb({}, "a.npy", _npy("<i8", (75_000_000,), b""))
    yield "npy claiming a trillion", _npy("<i8", (10**12,), b"12345678")
    yield "npy claiming 1e9 rows", _npy("<i8", (10**9, 8), b"12345678")
    yield "npy of objects", _npy("|O", (1,), b"cos\nsystem\n(S'touch /tmp/moeplan-was-here'\ntR.")


def archive_specials(members: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """Damaged forms of an archive with `members`: lies about sizes, bombs, traversal, pickles."""
    yield "bomb", _bomb(members, next(iter(members)), next(iter(members.values()))[:128])
    for name, raw in members.items():
        others = {key: value for key, value in members.items() if key != name}
        for shape in ((10**12,), (10**9,), (10**9, 8), (2**62, 4), (0,), (), (3, 0, 2)):
            for kind in ("<i8", "|u1", "<f8", "<U9", "|O", "<M8[s]", "<c16", "|V8"):
                yield f"{name} claims {shape} of {kind}", _zip({**others, name: _npy(kind, shape, b"12345678")})
        yield f"{name} is a pickle", _zip({**others, name: b"cos\nsystem\n(S'touch /tmp/moeplan-was-here'\ntR."})
        yield f"{name} is gone", _zip(others)
        yield f"{name} outside", _zip({**others, f"../../../tmp/{name}": raw})
        yield f"{name} absolute", _zip({**members, f"/tmp/{name}": raw})
        yield f"{name} twice", _zip(members, [(name, raw)])
    yield "overlapping", _overlapping(500)
    bomb = b"\x80\x02" + b"(" * 100_000 + b"."
    yield "pickle of marks", _zip({"archive/data.pkl": bomb})
    laughs = b"\x80\x02]q\x00" + b"".join(b"]q%c(" % (i + 1) + b"h%c" % i * 10 + b"e" for i in range(60)) + b"."
    yield "pickle that laughs", _zip({"archive/data.pkl": laughs})
    yield "pickle of 4 GB", _zip({"archive/data.pkl": b"\x80\x04\x8e" + struct.pack("<Q", 2**32) + b"x."})
    yield "pickle memo", _zip({"archive/data.pkl": b"\x80\x02]r" + struct.pack("<I", 2**31 - 1) + b"."})
    yield "pickle long", _zip({"archive/data.pkl": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"."})
    yield "pickle reduce", _zip({"archive/data.pkl": b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R."})


def _npy(kind: str, shape: tuple[int, ...], data: bytes) -> bytes:
    header = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def _zip(members: dict[str, bytes], more: list[tuple[str, bytes]] | None = None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    if more:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with zipfile.ZipFile(buffer, "a", zipfile.ZIP_DEFLATED) as archive:
                for name, raw in more:
                    archive.writestr(name, raw)
    return buffer.getvalue()


def _bomb(members: dict[str, bytes], name: str, start: bytes) -> bytes:
    """An archive of which one member unpacks to `start` and 600 MB of zeros."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for other, raw in members.items():
            if other != name:
                archive.writestr(other, raw)
        with archive.open(name, "w") as stream:
            stream.write(start)
            for _ in range(600):
                stream.write(bytes(1_000_000))
    return buffer.getvalue()


def _overlapping(count: int) -> bytes:
    """An archive whose `count` entries share one compressed block of 10 MB of zeros (a bomb without recursion)."""
    body = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = body.compress(bytes(10_000_000)) + body.flush()
    crc = zlib.crc32(bytes(10_000_000))
    name = b"a.npy"
    sizes = struct.pack("<III", crc, len(packed), 10_000_000)
    local = b"PK\x03\x04" + struct.pack("<HHHHH", 20, 0, 8, 0, 33) + sizes + struct.pack("<HH", len(name), 0) + name
    entries = b""
    for number in range(count):
        own = b"%04d.npy" % number
        entries += b"PK\x01\x02" + struct.pack("<HHHHHH", 20, 20, 0, 8, 0, 33) + sizes
        entries += struct.pack("<HHHHHII", len(own), 0, 0, 0, 0, 0, 0) + own
    start = len(local) + len(packed)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, count, count, len(entries), start, 0)
    return local + packed + entries + end


def _bytes(rng: random.Random, raw: bytes) -> bytes:
    """A few edits that know nothing of the format."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 8, 32))):
        at, kind = rng.randrange(len(data) + 1), rng.randrange(9)
        until = min(len(data), at + rng.choice((1, 2, 8, 64, 1000)))
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1 and data:
            data[at % len(data)] = rng.randrange(256)
        elif kind == 2:
            del data[at:until]
        elif kind == 3:
            data[at:at] = data[at:until] * rng.choice((1, 2, 50))
        elif kind in (4, 5):
            data[at : until if kind == 5 else at] = rng.choice(WORDS)
        elif kind == 6:
            data = data[:at]
        elif kind == 7:
            found = list(_NUMBER.finditer(bytes(data[:200_000])))
            if found:
                one = rng.choice(found)
                data[one.start() : one.end()] = rng.choice(WORDS)
        else:
            other = rng.randrange(len(data) + 1)
            data[at:at] = data[other : other + rng.choice((1, 16, 300))]
    return bytes(data)


def _lines(rng: random.Random, raw: bytes) -> bytes:
    """Lines deleted, doubled, swapped, joined or multiplied; line ends and encodings changed."""
    lines = raw.split(b"\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(9)
    if kind == 0:
        del lines[at]
    elif kind == 1:
        lines.insert(other, lines[at])
    elif kind == 2:
        lines[at], lines[other] = lines[other], lines[at]
    elif kind == 3:
        lines[at : at + 2] = [b"".join(lines[at : at + 2])]
    elif kind == 4:
        lines[at] = lines[at] * rng.choice((2, 100))
    elif kind == 5:
        lines = lines[: at + 1] * rng.choice((1, 2, 20))
    else:
        text = raw.decode("utf-8", "replace")
        coding = rng.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "utf-7"))
        return raw.replace(b"\n", b"\r\n") if kind == 6 else text.encode(coding, "replace")
    return b"\n".join(lines)


def _cells(rng: random.Random, raw: bytes) -> bytes:
    """One field of one line of a CSV, or the value behind one equals sign, becomes something else."""
    lines = raw.split(b"\n")
    at = rng.randrange(len(lines))
    mark = b"," if b"," in lines[at] and (b"=" not in lines[at] or rng.random() < 0.3) else b"="
    cells = lines[at].split(mark)
    value = rng.choice(VALUES)
    shown = json.dumps(value).encode() if rng.random() < 0.6 else str(value).encode("utf-8", "replace")
    cells[rng.randrange(len(cells))] = b" " + shown if mark == b"=" else shown
    lines[at] = mark.join(cells)
    return b"\n".join(lines)


def _json(rng: random.Random, raw: bytes) -> bytes:
    """One to three values of a JSON document replaced, removed, renamed, copied elsewhere or nested."""
    document = json.loads(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = _pick(rng, document)
        if holder is None:
            return json.dumps(rng.choice(VALUES)).encode()
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(["x", "", "\ud800", key.upper(), f"{key}s"])] = holder.pop(key)
        elif kind == 2:
            other, name = _pick(rng, document)
            holder[key] = other[name] if other is not None and other is not holder else rng.choice(VALUES)
        elif kind == 3:
            value = holder[key]
            for _ in range(rng.choice((1, 3, 200))):
                value = [value] if rng.random() < 0.5 else {"a": value}
            holder[key] = value
        else:
            holder[key] = rng.choice(VALUES)
    try:
        return json.dumps(document).encode()
    except ValueError:  # moved into itself
        return raw


def _pick(rng: random.Random, document: Any) -> tuple[Any, Any]:
    """A container anywhere in `document` and one of its keys; None when there is none."""
    holder, key = None, None
    while isinstance(document, (dict, list)) and document:
        holder = document
        key = rng.choice(list(document)) if isinstance(document, dict) else rng.randrange(len(document))
        document = document[key]
        if rng.random() < 0.35:
            break
    return holder, key


def _archive(rng: random.Random, raw: bytes) -> bytes:
    """One member of an archive damaged, and the archive packed again with sound checksums."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    if name == "header.npy" and rng.random() < 0.8:
        at = members[name].index(b"\n") + 1
        text = rng.choice((_json, _bytes))(rng, members[name][at:])
        members[name] = _npy("|u1", (len(text),), text)
    elif rng.random() < 0.3:
        start = members[name].find(b"\n") + 1
        shape = tuple(rng.choice((0, 1, 2, 3, 7, 10**9)) for _ in range(rng.randrange(4)))
        kind = rng.choice(("<i8", "<i4", "|u1", "<f8", "<f4", "|b1", "<U3", "|S4", "<c16", ">i2"))
        members[name] = _npy(kind, shape, members[name][start:])
    elif rng.random() < 0.2:
        members[rng.choice(list(members))] = members[name]
    else:
        members[name] = _bytes(rng, members[name])
    return _zip(members)


def mutate(rng: random.Random, raw: bytes, suffix: str) -> bytes:
    """`raw` damaged once by a way that fits `suffix`."""
    ways: list[Callable[[random.Random, bytes], bytes]] = [_bytes]
    if suffix == ".json":
        ways += [_json, _json, _json, _lines]
    elif suffix in (".npz", ".pt"):
        ways += [_archive] * 4
    elif suffix not in (".npy", ".parquet"):
        ways += [_lines, _cells, _cells, _cells]
    try:
        return rng.choice(ways)(rng, raw)
    except Exception:  # a file damaged before may not be read at all
        return _bytes(rng, raw)


def odd_paths(folder: Path, suffix: str) -> Iterator[tuple[str, Path]]:
    """Paths with a proper suffix that are no ordinary files."""
    directory = folder / f"directory{suffix}"
    directory.mkdir()
    yield "directory", directory
    for device in ("zero", "null", "urandom", "full"):
        link = folder / f"{device}{suffix}"
        link.symlink_to(f"/dev/{device}")
        yield f"/dev/{device}", link
    loop = folder / f"loop{suffix}"
    loop.symlink_to(loop)
    yield "link to itself", loop
    pipe = folder / f"pipe{suffix}"
    os.mkfifo(pipe)
    yield "pipe", pipe
    sparse = folder / f"sparse{suffix}"
    with sparse.open("wb") as file:
        file.truncate(20 * 2**30)
    yield "20 GB of holes", sparse
    yield "not there", folder / f"not-there{suffix}"
    yield "name too long", folder / ("n" * 300 + suffix)
    strange = folder / os.fsdecode(b"\xff\n<script>" + suffix.encode())
    strange.write_bytes(b"")
    yield "name of odd bytes", strange
