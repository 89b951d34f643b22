"""Files in and out: nothing half written, nothing executed, nothing believed that the file only claims."""
import contextlib
import errno
import os
import pickle
import random
import signal
import stat
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from helpers import DEVICE, ROOT
from hostile import ORDERED_DICT, archive, code, in_a_state, repacked
from utils import files
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.files import atomic_write, check_target, lock_folder


def names(folder):
    return sorted(item.name for item in folder.iterdir())


def make_fifo(folder):
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


def python(code, *arguments):
    """Starts a process that runs this code, which finds our modules, and has pipes for its input and output."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from utils.files import *\n{code}"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ----------------------------------------------------------------------------------------------------------------------
# Atomic writes

def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "new" / "folder" / "x"
    with atomic_write(target) as file:
        file.write(b"12")
        file.flush()
        assert not target.exists()
        file.write(b"34")
    assert target.read_bytes() == b"1234" and names(target.parent) == ["x"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_exception_leaves_the_old_file_and_no_other(tmp_path, error):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(error), atomic_write(tmp_path / "x") as file:
        file.write(b"new")
        raise error
    assert (tmp_path / "x").read_bytes() == b"old" and names(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call):
    """The error names the file, which that of a failed write does not do by itself."""
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "x").write_bytes(b"old")
    if call != "write":
        monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space") as error, atomic_write(tmp_path / "x") as file:
        file.write(b"new")
        if call == "write":
            full()
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "x")
    assert str(tmp_path / "x") in str(error.value)
    assert (tmp_path / "x").read_bytes() == b"old" and names(tmp_path) == ["x"]


def test_a_file_that_may_not_grow_is_named(tmp_path):
    """By a limit of the system's, which fails as a full disk does: in the midst of a write."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large") as error, atomic_write(tmp_path / "x") as file:
            file.write(bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(tmp_path / "x") and names(tmp_path) == []


def test_an_error_that_names_another_file_is_left_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"), atomic_write(tmp_path / "x"):
        open(tmp_path / "nowhere")
    assert names(tmp_path) == []


def test_the_bytes_are_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        events.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def noted_replace(source, target):
        events.append(("replace", os.path.dirname(source) == os.path.dirname(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with atomic_write(tmp_path / "x") as file:
        file.write(b"1234")
    assert events == [("fsync", 4), ("replace", True)]


@pytest.mark.parametrize("refusals", [0, 3, 99])
def test_on_windows_a_file_that_somebody_reads_is_waited_for(tmp_path, monkeypatch, refusals):
    """A virus scanner, say. It is let go within seconds, or else the old file stays."""
    waited, replace, left = [], os.replace, [refusals]

    def refusing(source, target):
        left[0] -= 1
        if left[0] >= 0:
            raise PermissionError(13, "Access is denied", str(target))
        replace(source, target)

    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(os, "replace", refusing)
    monkeypatch.setattr(files.time, "sleep", waited.append)
    with pytest.raises(PermissionError) if refusals == 99 else contextlib.nullcontext():
        with atomic_write(tmp_path / "x") as file:
            file.write(b"new")
    assert (tmp_path / "x").read_bytes() == (b"old" if refusals == 99 else b"new")
    assert names(tmp_path) == ["x"] and len(waited) == min(refusals, 3)


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path):
    """This process and another are in the midst of writing a file; the other is killed. What it left goes with the next
    write."""
    with atomic_write(tmp_path / "x") as living:
        living.write(b"the living")
        dead = python("with atomic_write(sys.argv[1]) as file:\n file.write(b'theirs'); print('writing', flush=True);"
                      " input()", tmp_path / "x")
        said, there = dead.stdout.readline(), names(tmp_path)
        dead.kill()
        dead.communicate()
        assert said == "writing\n" and len(there) == 2
        with atomic_write(tmp_path / "y") as file:  # of another name: no business of its
            file.write(b"ours")
        assert len(names(tmp_path)) == 3
        with atomic_write(tmp_path / "x") as file:
            file.write(b"ours")
        assert len(names(tmp_path)) == 3 and (tmp_path / "x").read_bytes() == b"ours"
    assert names(tmp_path) == ["x", "y"] and (tmp_path / "x").read_bytes() == b"the living"


@pytest.mark.parametrize("locked", [True, False])
def test_a_file_that_another_takes_for_a_leftover_is_made_anew(tmp_path, monkeypatch, locked):
    """The other is quicker to lock the new file: it has removed it already, or is about to."""
    lock, seen = files._lock, []

    def slow(file):
        seen.append(file.name)
        if len(seen) > 1:
            return lock(file)
        if locked:
            os.remove(file.name)
        return locked

    monkeypatch.setattr(files, "_lock", slow)
    with atomic_write(tmp_path / "x", tidy=False) as file:
        file.write(b"ours")
    assert len(seen) == 2 and names(tmp_path) == ["x"] and (tmp_path / "x").read_bytes() == b"ours"


def test_a_name_is_no_pattern(tmp_path):
    (tmp_path / ".a[1].0123abcd.tmp").touch()
    (tmp_path / ".x.0123abcd.tmp").touch()
    for name in "a[1]", "*", "a**b":
        with atomic_write(tmp_path / name) as file:
            file.write(b"new")
    assert names(tmp_path) == sorted(["a[1]", "*", "a**b", ".x.0123abcd.tmp"])


def test_a_target_is_tried_and_nothing_is_left(tmp_path):
    check_target(tmp_path / "folder" / "x")
    (tmp_path / "y").write_bytes(b"old")
    check_target(tmp_path / "y")
    assert names(tmp_path) == ["folder", "y"] and names(tmp_path / "folder") == []
    assert (tmp_path / "y").read_bytes() == b"old"
    with pytest.raises(OSError, match="too long"):
        check_target(tmp_path / ("x" * 250))  # a name that has room itself, but not with what the temporary one adds


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "x")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "x").read_bytes() == b"new"


@pytest.mark.parametrize("target", [lambda folder: DEVICE, make_fifo, lambda folder: folder])
def test_what_is_not_a_file_is_not_replaced(tmp_path, target):
    target = target(tmp_path)
    mode = os.stat(target).st_mode
    with pytest.raises(ValueError, match="not a regular file"), atomic_write(target) as file:
        file.write(b"new")
    assert stat.S_IFMT(os.stat(target).st_mode) == stat.S_IFMT(mode)


# ----------------------------------------------------------------------------------------------------------------------
# A folder's lock

def test_a_locked_folder_is_locked_for_others_until_the_end(tmp_path, capsys):
    with lock_folder(tmp_path):
        second = python("with lock_folder(sys.argv[1]): print('got it')", tmp_path)
        out, err = second.communicate()
        with pytest.raises(RuntimeError, match="another run is writing to"), lock_folder(tmp_path):
            pass
    assert "another run is writing to" in err and out == ""
    with lock_folder(tmp_path):
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL], ids=errno.errorcode.get)
def test_a_drive_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, number):
    """Some network drives have none. A file is written there nevertheless, and nothing taken for a leftover."""
    fcntl = pytest.importorskip("fcntl")

    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".x.0123abcd.tmp").touch()
    with lock_folder(tmp_path), lock_folder(tmp_path), atomic_write(tmp_path / "x") as file:
        file.write(b"new")
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 2 and err.count(f"warning: {tmp_path} ") == 2
    assert (tmp_path / "x").read_bytes() == b"new" and names(tmp_path) == [".lock", ".x.0123abcd.tmp", "x"]


def test_windows_which_has_no_such_locks_goes_on_in_silence(tmp_path, monkeypatch, capsys):
    def replace(old, new, real=os.replace):
        assert file.closed  # it does not rename an open file
        real(old, new)

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(os, "replace", replace)
    with lock_folder(tmp_path), atomic_write(tmp_path / "x") as file:
        file.write(b"new")
    assert capsys.readouterr() == ("", "") and names(tmp_path) == [".lock", "x"]


# ----------------------------------------------------------------------------------------------------------------------
# Whatever is accepted comes back

STRINGS = ["", "x", "two\nlines", "nul\0", "\u00e9\u6f22\U0001f642", "\ud800", "\x7f\x80\xff", "1", "y" * 70_000,
           *"abcdefgh"]
NUMBERS = [0, 1, -1, 255, 256, 65_536, 2**31 - 1, 2**31, -2**31, 2**63, -2**63, 2**64, 10**300, 2**2000 - 1, -2**1999,
           0.0, -0.0, 0.1, 5e-324, 1.7e308, float("inf"), -float("inf"), float("nan")]
SCALARS = [np.bool_(True), np.int8(-5), np.uint8(200), np.int32(7), np.int64(-2**63), np.uint64(2**64 - 1),
           np.float16(0.1), np.float32(0.1), np.float64("nan"), np.float64(-0.0), np.str_("word\ud800")]
DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
          torch.float32, torch.float64]
VIEWS = [lambda x: x, lambda x: x.T if x.ndim == 2 else x, lambda x: x[1::2] if x.ndim else x,
         lambda x: x.expand(3, *x.shape), lambda x: x[..., :1].expand(x.shape) if x.ndim else x, lambda x: x[None],
         lambda x: x.permute(tuple(range(x.ndim))[::-1]), lambda x: x.flatten()[2:], lambda x: x[:0] if x.ndim else x,
         lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
         lambda x: torch.nn.Parameter(x) if x.is_floating_point() else x]


def random_tensor(generator):
    """A tensor of any bits, type and shape, most of them views of others."""
    dtype = generator.choice(DTYPES)
    shape = [generator.choice([0, 1, 1, 2, 3, 4]) for _ in range(generator.randint(0, 5))]
    count = int(np.prod(shape))
    content = torch.frombuffer(bytearray(generator.randbytes(count * dtype.itemsize + 8)), dtype=torch.uint8)
    content = content[:count * dtype.itemsize]
    content = content % 2 == 0 if dtype == torch.bool else content.view(dtype)
    return generator.choice(VIEWS)(content.view(shape))


def random_value(generator, depth, seen):
    """Anything that a checkpoint can hold; now and then what it holds already, which is then in two places."""
    kind = generator.choice(["string", "number", "bits", "plain", "scalar", "tensor", "tensor", "again"]
                            + ["dict", "list", "tuple"] * (depth > 0))
    if kind == "again" and seen:
        return generator.choice(seen)
    if kind in ("dict", "list", "tuple"):
        values = [random_value(generator, depth - 1, seen) for _ in range(generator.randint(0, 4))]
        keys = generator.sample([*STRINGS, 0, 1, 2, 3, 255, 65_536, 2**31 - 1], len(values))
        value = dict(zip(keys, values)) if kind == "dict" else tuple(values) if kind == "tuple" else values
    else:
        value = {"string": lambda: generator.choice(STRINGS), "number": lambda: generator.choice(NUMBERS),
                 "bits": lambda: generator.choice((-1, 1)) * generator.getrandbits(generator.randint(1, 2000)),
                 "scalar": lambda: generator.choice(SCALARS), "tensor": lambda: random_tensor(generator)}.get(
                     kind, lambda: generator.choice((None, True, False)))()
    seen.append(value)
    return value


def equal(saved, read):
    """The same types and the same bits; NumPy's numbers come back as Python's."""
    if isinstance(saved, torch.Tensor):
        return (type(read) is torch.Tensor and read.dtype == saved.dtype and read.shape == saved.shape
                and not read.requires_grad and bits(read) == bits(saved))
    saved = saved.item() if isinstance(saved, np.generic) else saved
    if type(saved) is not type(read):
        return False
    if isinstance(saved, dict):
        return [*saved] == [*read] and [*map(type, saved)] == [*map(type, read)] and all(
            equal(value, read[key]) for key, value in saved.items())
    if isinstance(saved, (list, tuple)):
        return len(saved) == len(read) and all(map(equal, saved, read))
    return struct.pack("d", saved) == struct.pack("d", read) if isinstance(saved, float) else saved == read


def bits(x):
    x = x.detach().view(torch.int16) if x.dtype == torch.bfloat16 else x.detach()  # which NumPy does not have
    return x.contiguous().numpy().tobytes()


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


def test_whatever_is_saved_comes_back(tmp_path):
    """Of 300 random states, each with some value in two places. torch reads them too, and each tensor has memory of its
    own: what somebody changes in one, or trains, changes in no other."""
    path, counts = tmp_path / "c.pt", dict.fromkeys(DTYPES, 0)
    for seed in range(300):
        generator = random.Random(seed)
        twice = random_value(generator, 2, [])
        state = {"a": twice, "b": [random_value(generator, 3, [twice]) for _ in range(3)], "c": {"again": twice}}
        save_checkpoint(path, state)
        read = load_checkpoint(path)
        assert equal({"format": "ddpm-mnist", "version": 2, **state}, read), f"seed {seed}"
        assert equal(read, torch.load(path, weights_only=True)), f"seed {seed}"
        places = [(x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()) for x in tensors_in(read) if x.numel()]
        assert len({*places}) == len(places), f"seed {seed}"
        for x in tensors_in(read):
            assert x.untyped_storage().nbytes() == x.nbytes, f"seed {seed}"
            counts[x.dtype] += 1
    assert names(tmp_path) == ["c.pt"] and min(counts.values()) > 20


def test_what_torch_saves_is_read(tmp_path):
    """Views that share a storage, in which they begin anywhere and go anyhow; and what a network's state_dict is."""
    generator, network = random.Random(0), torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    for _ in range(30):
        tensors = [random_tensor(generator).detach() for _ in range(10)]
        tensors += [generator.choice(VIEWS)(x).detach() for x in tensors]
        state = {"format": "ddpm-mnist", "version": 2, "tensors": tensors}
        torch.save(state, tmp_path / "c.pt")
        assert equal(state, load_checkpoint(tmp_path / "c.pt"))
    torch.save({"format": "ddpm-mnist", "version": 2, "model": network.state_dict()}, tmp_path / "c.pt")
    assert equal(dict(network.state_dict()), dict(load_checkpoint(tmp_path / "c.pt")["model"]))


def test_equal_knows_what_differs():
    """The control."""
    for a, b in [(0.0, -0.0), (1, 1.0), (1, True), ("1", 1), ([1], (1,)), ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
                 ({1: 0}, {"1": 0}), (torch.zeros(2), torch.zeros(2, 1)), (torch.zeros(2), -torch.zeros(2)),
                 (torch.zeros(2), torch.zeros(2).double()), (torch.zeros(1), 0.0), ([1, 2], [1]), (None, False),
                 (torch.zeros(2).bfloat16(), torch.ones(2).bfloat16())]:
        assert equal(a, a) and equal(b, b) and not equal(a, b) and not equal(b, a), (a, b)


class TwoLines:
    def __repr__(self):
        return "two\nlines"


class Unprintable:
    def __repr__(self):
        raise RuntimeError


class KindOfTensor(torch.Tensor):
    """Which only code of its own could make again."""


REFUSED = {
    "bytes": lambda: b"bytes", "bytearray": lambda: bytearray(3), "set": lambda: {1}, "frozenset": lambda: frozenset(),
    "complex": lambda: 1j, "range": lambda: range(3), "function": lambda: len, "class": lambda: int,
    "object": object, "an object of two lines": TwoLines, "an object that cannot be printed": Unprintable,
    "kind of string": lambda: type("Kind", (str,), {})("x"), "kind of int": lambda: signal.SIGINT,
    "2**3000": lambda: 2**3000, "-2**3000": lambda: -2**3000, "2**2000": lambda: 2**2000, "-2**2000": lambda: -2**2000,
    "array": lambda: np.zeros(3), "array of two lines": lambda: np.zeros((2, 1)),
    "np.complex64": lambda: np.complex64(1), "np.bytes_": lambda: np.bytes_(b"x"),
    "np.longdouble": lambda: np.longdouble(1), "record": lambda: np.zeros(1, "i4,i4")[0],
    "torch.dtype": lambda: torch.float32, "torch.device": lambda: torch.device("cpu"),
    "complex tensor": lambda: torch.zeros(2, dtype=torch.cfloat),
    "float8": lambda: torch.zeros(2).to(torch.float8_e5m2),
    "uint16": lambda: torch.zeros(2, dtype=torch.uint16), "sparse": lambda: torch.eye(2).to_sparse(),
    "sparse rows": lambda: torch.eye(2).to_sparse_csr(), "meta": lambda: torch.zeros(2, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
    "nested tensor": lambda: torch.nested.nested_tensor([torch.zeros(2)]),
    "kind of tensor": lambda: torch.zeros(2).as_subclass(KindOfTensor),
    "tuple key": lambda: {(1, 2): 0}, "float key": lambda: {1.0: 0}, "None key": lambda: {None: 0},
    "True key": lambda: {True: 0},
    "bytes key": lambda: {b"x": 0}, "key below 0": lambda: {-1: 0}, "2**31 key": lambda: {2**31: 0},
    "np.int64 key": lambda: {np.int64(1): 0}, "tensor key": lambda: {torch.tensor(1): 0},
    "key that is long": lambda: {("x" * 100_000,): 0},
}


@pytest.fixture
def path(tmp_path):
    """A sound file, with a tensor that no compression makes smaller."""
    noise = torch.frombuffer(bytearray(random.Random(0).randbytes(20_000)), dtype=torch.uint8)
    save_checkpoint(tmp_path / "c.pt", {"noise": noise, "word": "word", "list": [1, 2.5, None]})
    return tmp_path / "c.pt"


def not_saved(path, state, *words):
    """Saving it raises ValueError, of one line with these words, and leaves the old file."""
    content = path.read_bytes()
    with pytest.raises(ValueError) as error:
        save_checkpoint(path, state)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    for word in words:
        assert word in str(error.value)
    assert path.read_bytes() == content and names(path.parent) == [path.name]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own: some kinds of tensors are prototypes or deprecated
def test_what_cannot_be_read_is_not_written(name, path):
    """The error says where it is."""
    not_saved(path, {"sound": [1], "optimizer": {"state": {3: ["x", REFUSED[name]()]}}}, "['optimizer']['state'][3][1]")


def test_what_holds_itself_or_is_very_deep_is_not_written(path):
    itself, deep, together = [1], [], {}
    itself.append({"more": (itself,)})
    together["a"] = [together]
    for _ in range(100_000):
        deep = [deep]
    for value in itself, together, deep:
        not_saved(path, {"sound": 1, "here": value}, "deep", "itself")


def test_the_message_does_not_quote_a_book(path):
    not_saved(path, {"x": "y" * 100_000, "k" * 100_000: b"z" * 100_000}, "its state['kkk", "bytes")


# ----------------------------------------------------------------------------------------------------------------------
# What is not sound is refused

def refused(path, words=None):
    """Loading it raises ValueError, of one line of a sane length that names the file. Returns the error."""
    with pytest.raises(ValueError, match=words) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1000
    return error.value


@pytest.mark.parametrize("share", [0, 0.0001, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_file_is_refused(path, share):
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * share)])
    refused(path, "not a checkpoint, or only a part of one")


@pytest.mark.parametrize("content", [
    b"hello\n" * 1000, b"PK\x03\x04" + b"\0" * 500, pickle.dumps({"format": "ddpm-mnist"}),
])
def test_another_file_is_refused(path, content):
    path.write_bytes(content)
    refused(path, "not a checkpoint")


def test_a_flipped_bit_is_noticed(path):
    """Wherever it changes anything: alignment and time stamps of the archive do not."""
    content, sound = path.read_bytes(), load_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        entries = [(archive.open(entry)._orig_compress_start, entry.file_size) for entry in archive.infolist()
                   if entry.filename.endswith(("/data.pkl", "/data/0"))]
    assert len(entries) == 2
    generator = random.Random(0)
    counts = [start + generator.randrange(size) for start, size in entries for _ in range(20)]
    for place in counts + [generator.randrange(len(content)) for _ in range(40)] + [*range(-40, 0)]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        if place in counts:
            refused(path)
        with contextlib.suppress(ValueError):
            assert equal(sound, load_checkpoint(path)), place


class Canary:
    """A payload: unpickling it writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.parametrize("wrap", [lambda canary: canary, lambda canary: {
    "format": "ddpm-mnist", "version": 2, "settings": {}, "ema": {}, "x": canary}], ids=["alone", "in a state"])
@pytest.mark.parametrize("as_torch", [True, False])
def test_nothing_is_executed(tmp_path, wrap, as_torch):
    payload, path = wrap(Canary(tmp_path / "executed")), tmp_path / "c.pt"
    if as_torch:
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    refused(path, "was not executed" if as_torch else "not a checkpoint")
    assert not (tmp_path / "executed").exists()
    if as_torch:  # the control: this canary sings
        torch.load(path, weights_only=False)
        assert (tmp_path / "executed").exists()


def test_repacking_alone_changes_nothing(path, tmp_path):
    assert equal(load_checkpoint(path), load_checkpoint(repacked(path, tmp_path / "r.pt")))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_checkpoint_is_refused_whatever_its_size(path, tmp_path, compression):
    packed = repacked(path, tmp_path / "packed.pt", compression=compression)
    assert packed.stat().st_size > 20_000
    refused(packed, "compressed")


def test_a_zip_bomb_is_not_unpacked(path, tmp_path):
    bomb = repacked(path, tmp_path / "bomb.pt", lambda name, content: content + bytes(
        50_000_000 * name.endswith("data/0")), zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1_000_000
    refused(bomb, "unpacks to 5.* bytes")


# Pickles by hand: a dict of 300 entries, of which 300 copies are made; and tuples of two, each of the one before, that
# a dict has to go through 2 ** 20 times to the bottom.
COPIES = (b"(}q\0(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(300)) + b"u"
          + (ORDERED_DICT + b"h\0\x85R") * 300 + b"t")
TOWER = b"(K\1K\1\x86q\0" + b"h\0h\0\x86q\0" * 20 + b"}h\0Nst"


@pytest.mark.parametrize("content", [COPIES, TOWER, b"}2\x86", b"}\x94"], ids=["copies", "tower", "DUP", "MEMOIZE"])
def test_no_value_is_in_two_places(tmp_path, content):
    """A few bytes could stand for gigabytes, or for hours of work."""
    (tmp_path / "c.pt").write_bytes(archive(in_a_state(content)))
    refused(tmp_path / "c.pt", "operation (BINGET|DUP|MEMOIZE) .*was not executed")
    (tmp_path / "c.pt").write_bytes(archive(in_a_state(content), "DATA.PKL"))  # which torch reads as well
    refused(tmp_path / "c.pt")


def test_a_word_may_be_in_two_places(tmp_path):
    """The control: so it is in every file of torch.save."""
    (tmp_path / "c.pt").write_bytes(archive(in_a_state(code("word") + b"q\0h\0\x86")))
    assert load_checkpoint(tmp_path / "c.pt")["more"] == ("word", "word")


@pytest.mark.parametrize("name", ["builtins bytearray", "__builtin__ bytearray", "_codecs encode", "torch Size",
                                  "torch._utils _rebuild_parameter", "collections Counter", "builtins dict"])
def test_names_that_no_checkpoint_has_are_refused(tmp_path, name):
    """torch would call most of these, with any arguments."""
    (tmp_path / "c.pt").write_bytes(archive(in_a_state(b"c" + name.replace(" ", "\n").encode() + b"\n)R")))
    refused(tmp_path / "c.pt", f"operation GLOBAL .*{name.split('_')[-1][-6:]}.*was not executed")


def test_two_archives_in_one_file_are_the_one_that_was_checked(tmp_path):
    """Python's zipfile goes by where the directory ends and torch by where it is said to begin. Between them lies the
    comment, which can be a directory too."""
    def parts(content):
        end = content.rindex(b"PK\5\6")
        size, start = struct.unpack("<II", content[end + 12:end + 20])
        return content[:start], bytearray(content[start:start + size]), bytearray(content[end:])

    def moved(directory, distance):
        place = 0
        while place < len(directory):
            offset, = struct.unpack("<I", directory[place + 42:place + 46])
            directory[place + 42:place + 46] = struct.pack("<I", offset + distance)
            place += 46 + sum(struct.unpack("<HHH", directory[place + 28:place + 34]))
        return directory

    checked, other = (archive(pickle.dumps({"format": "ddpm-mnist", "version": 2, "seen by": who}, protocol=2))
                      for who in ("zipfile", "torch"))
    (files_a, directory_a, end), (files_b, directory_b, _) = parts(checked), parts(other)
    end[16:20] = struct.pack("<I", len(files_a + files_b + directory_a + end))  # where it is said to begin
    end[20:22] = struct.pack("<H", len(directory_b))  # the length of the comment
    (tmp_path / "c.pt").write_bytes(files_a + files_b + moved(directory_a, len(directory_a) + 22) + end
                                    + moved(directory_b, len(files_a)))
    assert torch.load(tmp_path / "c.pt", weights_only=True)["seen by"] == "torch"  # the control
    assert load_checkpoint(tmp_path / "c.pt")["seen by"] == "zipfile"


def test_a_bomb_of_one_record_that_is_many_is_not_unpacked(tmp_path):
    """The directory names it a hundred times."""
    content = archive(b"\x80\x02}." + bytes(100_000))
    end = content.rindex(b"PK\5\6")
    size, start = struct.unpack("<II", content[end + 12:end + 20])
    directory = content[start:start + size] * 100
    (tmp_path / "c.pt").write_bytes(content[:start] + directory + struct.pack(
        "<4sHHHHIIH", b"PK\5\6", 0, 0, 300, 300, len(directory), start, 0))
    refused(tmp_path / "c.pt", "unpacks to 100.* bytes")


# ----------------------------------------------------------------------------------------------------------------------
# Arrays

def test_an_array_may_have_as_many_bytes_as_were_asked_for_and_no_more(tmp_path):
    for array in np.arange(10.0), np.zeros((0, 28, 28), dtype=np.uint8):
        np.savez(tmp_path / "a.npz", x=array)
        read = files.read_array(tmp_path / "a.npz", "x", array.nbytes)
        assert np.array_equal(read, array) and (read.shape, read.dtype) == (array.shape, array.dtype)
    np.savez(tmp_path / "a.npz", x=np.arange(10.0))
    with pytest.raises(ValueError, match="reads 79 bytes at most"):
        files.read_array(tmp_path / "a.npz", "x", 79)
