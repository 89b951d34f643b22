"""Hostile pickles and records: what no pickler would write, byte by byte, in an archive that is sound otherwise."""
import struct
import time
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from helpers import ROOT, start
from hostile import ORDERED_DICT, SECONDS, archive, code, guarded, in_a_state, model, pickled, repacked, tensor, tried
from utils.checkpoint import load_checkpoint, load_model
from utils.files import read_tensors

pytest.importorskip("resource", reason="limits to memory and alarm clocks are Unix's")


# ----------------------------------------------------------------------------------------------------------------------
# In place of a checkpoint's own

PICKLES = {
    "a list in itself": b"\x80\x02]q\0h\0a.", "a long number": b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".",
    "a very long number": b"\x80\x02\x8b\xff\xff\xff\x7f.", "a number in words": b"I" + b"9" * 10_000 + b"\n.",
    "a long memo": b"\x80\x02Nr\xff\xff\xff\x7f.", "a long text": b"\x80\x02X\xff\xff\xff\xff.", "no end": b"\x80\x02N",
    "nothing": b"", "an empty stack": b"\x80\x02.", "a mark": b"\x80\x02(.", "another protocol": b"\x80\x05N.",
    "a frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.", "a storage": b"\x80\x02ctorch\nFloatStorage\n.",
    "a storage called": b"\x80\x02ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R.", "an id": b"\x80\x02K\1Q.",
    "an id of a storage that is none": b"\x80\x02(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x009X\3\0\0\0cpuK\1tQ.",
    "an id for another device": b"\x80\x02(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\4\0\0\0cudaK\1tQ.",
    "an id out of its folder": b"\x80\x02(X\7\0\0\0storagectorch\nFloatStorage\nX\6\0\0\0../../X\3\0\0\0cpuK\1tQ.",
    "a state": b"\x80\x02ccollections\nOrderedDict\n)R}}sb.", "a class": b"\x80\x02ccollections\nOrderedDict\n.",
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_by_hand(name, model, tmp_path):
    path = pickled(model, tmp_path / "c.pt", PICKLES[name])
    assert tried(name, path, lambda: load_model(path)) is None


def test_marks_by_hand(model, tmp_path):
    """Of nothing, which no pickler writes, and of half a pair."""
    path, head = tmp_path / "c.pt", b"\x80\x02"
    for value, content in ((), b"(t."), ([], b"](e."), ({}, b"}(u."), (["a"], b"](X\1\0\0\0ae."):
        assert read_tensors(pickled(model, path, head + content)) == value
    for content in b"}(X\1\0\0\0au.", b"}(X\1\0\0\0aK\1X\1\0\0\0bu.":
        with pytest.raises(ValueError):
            read_tensors(pickled(model, path, head + content))


def test_records_of_another_size(model, tmp_path):
    """A storage says how many numbers it has; they must not be taken from beyond the record's end."""
    path = tmp_path / "c.pt"
    with zipfile.ZipFile(model) as archive:
        record = next(entry for entry in archive.infolist() if entry.file_size == 512 and "/data/" in entry.filename)
        sound = archive.read(record)
    for case, content in ("cut", sound[:4]), ("short", sound[:-4]), ("long", sound + bytes(4)), ("longer", sound * 100):
        repacked(model, path, lambda entry, old: content if entry == record.filename else old)
        assert tried(case, path, lambda: load_model(path)) is None, case
        path.write_bytes(path.read_bytes().replace(*(struct.pack("<I", zlib.crc32(x)) for x in (content, sound))))
        assert tried(f"{case}, with the old checksum", path, lambda: load_model(path)) is None, case


# ----------------------------------------------------------------------------------------------------------------------
# One value that is not sound, in a checkpoint that is

def crafted(value, **records):
    """The bytes of a checkpoint that is sound but for the value of this code; it has one record, of four floats."""
    return archive(in_a_state(value), records={"data/0": bytes(16), **records})


COLLIDING = [code(k * (2**61 - 1)) for k in range(10_000)]  # whole numbers that all have the hash 0
MANY = tensor(size=(10**9,), stride=(0,))  # of one number; to unpack it would take hours and terabytes
CRAFTED = {
    "a length below 0": crafted(tensor(length=-4)), "a huge length": crafted(tensor(length=2**62)),
    "a length beyond 64 bits": crafted(tensor(length=2**200)), "a length that is too small": crafted(tensor(length=1)),
    "no length": crafted(tensor(length=b"N")),
    "the length True": crafted(tensor(length=b"\x88", size=(), stride=()), **{"data/0": bytes(4)}),
    "an offset below 0": crafted(tensor(offset=-1)), "an offset by one": crafted(tensor(offset=1)),
    "a huge offset": crafted(tensor(offset=2**62)), "an offset beyond 64 bits": crafted(tensor(offset=2**200)),
    "a size below 0": crafted(tensor(size=(-2, -2))), "a size by one": crafted(tensor(size=(2, 3))),
    "huge sizes": crafted(tensor(size=(2**62, 2**62))), "a size beyond 64 bits": crafted(tensor(size=(2, 2**200))),
    "huge sizes of one number": crafted(tensor(size=(2**62, 2**62), stride=(0, 0))),
    "a stride below 0": crafted(tensor(stride=(-1, 1), offset=3)), "a huge stride": crafted(tensor(stride=(2**62, 1))),
    "a stride beyond 64 bits": crafted(tensor(stride=(2**200, 1))), "a stride too few": crafted(tensor(stride=(1,))),
    "words for numbers": crafted(tensor(size="22", stride="21")),
    "None for numbers": crafted(tensor(offset=b"N", size=b"N", stride=b"N")),
    "floats for sizes": crafted(tensor(size=(b"G@" + bytes(7),), stride=(1,))),
    "a tensor for a storage": crafted(tensor(storage=MANY, size=(5,), stride=(1,))),
    "a tensor for an id": crafted(MANY + b"Q"), "a tensor for a size": crafted(tensor(size=MANY, stride=MANY)),
    "a tensor for arguments": crafted(b"ctorch._utils\n_rebuild_tensor_v2\n" + MANY + b"R"),
    "a tensor for a dict": crafted(ORDERED_DICT + tensor(size=(10**9, 2), stride=(0, 0)) + b"\x85R"),
    "big-endian": crafted(tensor(), byteorder=b"big"), "no byte order known": crafted(tensor(), byteorder=b"pdp"),
    "two pickles": crafted(tensor(), **{"more/data.pkl": in_a_state(b"N")}), "a pickle of no folder": in_a_state(b"N"),
    "a record out of its folder": crafted(tensor(key="../data/0")), "a record far out": crafted(tensor(key="/data/0")),
    "the pickle for a record": crafted(tensor(key="../data.pkl")), "no such record": crafted(tensor(key="1")),
    "a tuple for a key": crafted(b"})Ns"), "None for a key": crafted(b"}NNs"), "True for a key": crafted(b"}\x88Ns"),
    "a float for a key": crafted(b"}G" + bytes(8) + b"Ns"), "a key below 0": crafted(b"}" + code(-1) + b"Ns"),
    "a large key": crafted(b"}" + code(2**31) + b"Ns"), "a tensor for a key": crafted(b"}" + tensor() + b"Ns"),
    "colliding keys": crafted(b"}(" + b"N".join(COLLIDING) + b"Nu"),
    "colliding pairs": crafted(ORDERED_DICT + b"](" + b"N\x86".join(COLLIDING) + b"N\x86e\x85R"),
    "a storage called": crafted(b"ctorch\nFloatStorage\n)R"), "a tuple of fewer than none": crafted(b"NN(\x86t\x86"),
}


def deep_tuple(depth):
    return b")" + b"\x85" * depth


def deep_list(depth):
    return b"]" * (depth + 1) + b"a" * depth


OF_DEPTH = {
    "a deep key": crafted(b"}" + deep_tuple(10**5) + b"Ns"),
    "a deep key of several": crafted(b"}(" + deep_tuple(10**5) + b"Nu"),
    "a deep list": archive(b"\x80\x02" + deep_list(10**5) + b"."),
    "a deep tuple": archive(b"\x80\x02" + deep_tuple(10**5) + b"."),
    "a deep version": archive(
        b"\x80\x02}(" + b"".join(map(code, ("format", "ddpm-mnist", "version", deep_list(10**5)))) + b"u."),
    "a deep length": crafted(tensor(length=deep_list(10**5))),
    "a deep size": crafted(tensor(size=(deep_tuple(10**5), 1))),
    "a deep key of a pair": crafted(ORDERED_DICT + b"](" + deep_tuple(3 * 10**5) + b"N\x86e\x85R"),
}


def test_crafted_files_are_sound_but_for_one_thing(tmp_path):
    """The control. A tensor may repeat a number, as those of torch.save do; it takes no memory until it is used."""
    for case, value, size in ("plain", tensor(), (2, 2)), ("many", MANY, (10**9,)):
        (tmp_path / case).write_bytes(crafted(value))
        more = load_checkpoint(tmp_path / case)["more"]
        assert more.shape == size and more.dtype == torch.float32 and more.untyped_storage().nbytes() == 16


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_files(name, tmp_path):
    path, began = tmp_path / "c.pt", time.process_time()
    path.write_bytes(CRAFTED[name])
    assert tried(name, path, lambda: load_checkpoint(path)) is None
    assert time.process_time() - began < 10


READ_ALL = """
import sys, time
sys.path[:0] = {folders!r}
from hostile import guards, tried
from utils.checkpoint import load_checkpoint
for path in sys.argv[1:]:
    began = time.process_time()
    with guards():
        assert tried(path, path, lambda: load_checkpoint(path)) is None, path
    assert time.process_time() - began < 20, path
    print(path, flush=True)
"""


@pytest.fixture(scope="module")
def survived(tmp_path_factory):
    """The files of OF_DEPTH that a process of its own has refused before it crashed: all of them, one hopes."""
    folder = tmp_path_factory.mktemp("deep")
    (folder / "read_all.py").write_text(READ_ALL.format(folders=[str(ROOT), str(ROOT / "tests")]))
    for name, content in OF_DEPTH.items():
        (folder / name).write_bytes(content)
    process = start(folder / "read_all.py", *(folder / name for name in OF_DEPTH))
    out, err = process.communicate(timeout=SECONDS)
    return {Path(line).name for line in out.splitlines()}, f"exit code {process.returncode}\n{err}"


@pytest.mark.parametrize("name", OF_DEPTH)
def test_deep_files(name, survived):
    """What is nested hundreds of thousands deep crashes a Python that hashes, compares or prints it."""
    assert name in survived[0], survived[1]
