"""What test_hostile_files.py and test_hostile_flags.py share: guards, the judge of an error, and sound files to damage.

Whatever a file or a flag holds, a command ends soon and in little memory, executes nothing of it, and says in one line
what is wrong. Most of that is tested in this process, under an alarm clock and a limit to the memory. The damage is
done to the checkpoint of a tiny run on 60 made-up digits.
"""
import contextlib
import hashlib
import io
import lzma
import os
import signal
import struct
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import train
from diffusion_model import build_network
from helpers import FLAGS, NETWORK
from sample import generate
from utils import cli, data, pictures
from utils.checkpoint import save_checkpoint

with contextlib.suppress(ImportError):
    import resource  # the tests that need it are skipped on Windows, which does not have it

GIB = 1 << 30
SECONDS = 60  # for one test; the longest takes a tenth


# ----------------------------------------------------------------------------------------------------------------------
# The guards

class Hung(BaseException):
    """Not an Exception, so that nothing which is tested can take it for a damaged file."""


def address_space(what="VmSize"):
    """Bytes of address space this process has, or had at most ("VmPeak"); None where there is no /proc."""
    with contextlib.suppress(FileNotFoundError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(what):
                return int(line.split()[1]) << 10
    return None


@contextlib.contextmanager
def guards():
    """In this context, what hangs ends, also inside a system call, and what asks for a gigabyte does not get it."""
    def ring(number, frame):
        raise Hung(f"still at it after {SECONDS} seconds")

    before, limits, used = signal.signal(signal.SIGALRM, ring), resource.getrlimit(resource.RLIMIT_AS), address_space()
    signal.alarm(SECONDS)
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + GIB, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def guarded():
    with guards():
        yield


def judge(case, path, error):
    """The error is one that a command may end with: of a kind that is expected, in one line that names the file, and
    not for want of memory."""
    case = f"{case}: {error!r:.1000}"
    assert type(error) in (ValueError, RuntimeError) or isinstance(error, OSError), case
    assert "\n" not in str(error) and str(path) in str(error) and len(str(error)) < 1000 + len(str(path)), case
    while error:
        said = str(error).replace(str(path), "")
        assert not isinstance(error, MemoryError) and "memory" not in said and "alloc" not in said, f"{case}, {said}"
        error = error.__cause__ or error.__context__


def tried(case, path, load):
    """What load() returns, or None if the file is refused as it should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each would be a further line on stderr
        try:
            return load()
        except Exception as error:
            judge(case, path, error)
            return None


# ----------------------------------------------------------------------------------------------------------------------
# What is sound, to begin with

def idx(array):
    """The bytes of an IDX file, MNIST's format: dimensions and sizes, big-endian, then the numbers."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def digits(n, seed):
    """The two IDX files of n made-up digits: images, labels."""
    images = np.random.default_rng(seed).integers(0, 256, (n, 28, 28), np.uint8)
    return idx(images), idx((np.arange(n) % 10).astype(np.uint8))


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    """A folder to work in, where MNIST has 60 digits to train on and 20 to test on, shipped as the real ones are."""
    shipped, here = tmp_path_factory.mktemp("shipped"), Path.cwd()
    contents = dict(zip(data.MNIST_MD5, (*digits(60, 0), *digits(20, 1))))
    for name, content in contents.items():
        (shipped / f"{name}.xz").write_bytes(lzma.compress(content, preset=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "SHIPPED_MNIST", shipped)
        patch.setattr(data, "MNIST_MD5", {name: hashlib.md5(content).hexdigest() for name, content in contents.items()})
        patch.setattr(pictures, "plot_losses", lambda *args: None)
        patch.setattr(train, "draw", lambda *args, **kwargs: (torch.zeros(1, 1, 28, 28, dtype=torch.uint8), None))
        os.chdir(tmp_path_factory.mktemp("world"))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # networks as small as ours are no faster in more, and far slower on a busy machine
        yield SimpleNamespace(shipped=shipped, contents=contents)
        torch.set_num_threads(threads)
        os.chdir(here)


@pytest.fixture(scope="module")
def run_checkpoint(world):
    """The checkpoint of a run of three steps, with a report after the second."""
    result = execute(train, *FLAGS, "--max-steps", 3, "--report-every", 2, "--out", "sound")
    assert result.code == 0, result.err
    return Path("sound/checkpoint.pt").resolve()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint for sampling only, as small as they come."""
    settings = NETWORK | {"width": 3, "schedule": "linear", "timesteps": 20, "dataset": "MNIST", "label_dropout": 0.1,
                          "batch_size": 8}
    path = tmp_path_factory.mktemp("model") / "model.pt"
    torch.manual_seed(0)
    save_checkpoint(path, {"settings": settings, "ema": build_network(settings).state_dict()})
    return path


def execute(module, *flags, encoding="utf-8"):
    """Runs a command's main() in this process, with an stdout as particular about its characters as a real one."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding, errors) for name, errors in
               [("stdout", "strict"), ("stderr", "backslashreplace")]}
    code = 0
    with mock.patch.multiple(sys, argv=[f"{module.__name__}.py", *map(str, flags)], **streams):
        try:
            cli.run(module.main)
        except SystemExit as end:
            code = end.code
    out, err = ((stream.flush(), stream.buffer.getvalue().decode())[1] for stream in streams.values())
    return SimpleNamespace(code=code, out=out, err=err)


def draws(case, model):
    """A model that was accepted is one: it draws an image, and of finite numbers."""
    (_, process), = generate(model, 1, steps=1)
    for _, x, _ in process:
        assert torch.isfinite(x).all(), case


# ----------------------------------------------------------------------------------------------------------------------
# Archives and pickles by hand

def repacked(source, target, change=lambda name, content: content, compression=zipfile.ZIP_STORED):
    """Copies the archive that a checkpoint is, with changed entries and the right checksums; change(name, bytes)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return target


def archive(content, entry="data.pkl", records={}):
    """The bytes of a checkpoint with this pickle in it, and records, name -> bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, value in {entry: content, "byteorder": b"little", "version": b"3\n", **records}.items():
            file.writestr(f"archive/{name}", value)
    return packed.getvalue()


def code(value):
    """The pickle code of a string, a whole number or a tuple of them; bytes are code already."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(code, value)) + b"t"
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value)) + value.encode()
    packed = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(packed)]) + packed


def pickled(source, target, content):
    """A copy of a checkpoint with another pickle."""
    return repacked(source, target, lambda entry, old: content if entry.endswith("data.pkl") else old)


def in_a_state(value):
    """A pickle of a checkpoint that is sound but for the value of this code, beside its format and its version."""
    return b"\x80\x02}(" + b"".join(map(code, ("format", "ddpm-mnist", "version", 2, "more", value))) + b"u."


def tensor(offset=0, size=(2, 2), stride=(2, 1), length=4, key="0", kind=b"ctorch\nFloatStorage\n", storage=None):
    """The code of a tensor as torch.save writes it: by default all 4 numbers of record 0."""
    storage = storage or code(("storage", kind, key, "cpu", length)) + b"Q"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + code(
        (storage, offset, size, stride, b"\x89", ORDERED_DICT + b")R")) + b"R"


ORDERED_DICT = b"ccollections\nOrderedDict\n"
