"""What the tests of the commands share: calls in this process, and a tiny trained run."""
import atexit
import contextlib
import csv
import functools
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

import train
from utils import pictures
from utils.checkpoint import load_checkpoint
from utils.cli import run
from utils.data import DATASETS, load_dataset
from utils.metrics import Validation

ROOT = Path(train.__file__).resolve().parent

# A place that is no file, to be refused. root, who could lose /dev/null if the code were broken on purpose
# (mutants.py), has one that nobody can replace.
DEVICE = "/dev/null" if getattr(os, "geteuid", lambda: 1)() or not os.path.exists("/dev/pts/ptmx") else "/dev/pts/ptmx"

# A warning is an error in processes too, but for what torch 2.6 leaves behind at its end.
WARNINGS = "error,ignore:Implicitly cleaning up:ResourceWarning"

# Flags of the smallest training run that has every part of a large one.
FLAGS = ["--width", "8", "--depth", "1", "--batch-size", "8", "--timesteps", "20", "--warmup", "4", "--device", "cpu"]
NETWORK = {"network": "bayes", "image_size": 28, "image_channels": 1, "classes": 10, "class_shares": [0.1] * 10,
           "width": 8, "depth": 1}  # the settings of theirs that a network is built from
CLOCK = {"seconds", "images_per_second"}  # what may differ between two equal runs


def call(module, *flags):
    """Runs a command's main() in this process as its last line would: exit code, stdout and stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = [f"{module.__name__}.py", *map(str, flags)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run(module.main)
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def start(name, *flags, **kwargs):
    """Starts a command as a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": WARNINGS, "PYTHONUNBUFFERED": ""}
    return subprocess.Popen([sys.executable, str(ROOT / name), *map(str, flags)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def assert_one_line(result, code, *words):
    """It ended with this code and one line on stderr, with these words and no traceback."""
    assert result.code == code, result.err
    assert result.err.count("\n") == 1 and result.err.endswith("\n") and "Traceback" not in result.err, result.err
    assert ": error: " in result.err and len(result.err) < 1000
    for word in words:
        assert str(word) in result.err


@functools.lru_cache(maxsize=None)
def trained():
    """The checkpoint of a tiny network after 120 steps on real digits, made once for all tests."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with mock.patch.object(Validation, "IMAGES", 40), mock.patch.object(train, "report"):
        result = call(train, *FLAGS, "--max-steps", 120, "--out", folder)
    assert result.code == 0, result.err
    return Path(folder) / "checkpoint.pt"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ----------------------------------------------------------------------------------------------------------------------
# Training runs

N = 200  # images in an epoch of the runs on few digits


@functools.lru_cache(maxsize=None)
def first_digits(train_set):
    """The first digits of MNIST, N to train on or 40 to test on: images and labels, read once for all tests."""
    return tuple(x[:N if train_set else 40].clone() for x in load_dataset("MNIST", train=train_set))


@contextlib.contextmanager
def few_digits():
    """Context: MNIST has its first digits only, N to train on and 40 to test on, and a report neither a plot nor
    samples. In one thread: networks as small as ours are no faster in more, and far slower on a busy machine."""
    digits = {train_set: tuple(x.clone() for x in first_digits(train_set)) for train_set in (True, False)}
    samples, threads = (torch.zeros(1, 1, 28, 28, dtype=torch.uint8), None), torch.get_num_threads()
    with mock.patch.dict(DATASETS, MNIST=lambda root, train: digits[train]), \
            mock.patch.object(pictures, "plot_losses", lambda *args: None), \
            mock.patch.object(train, "draw", lambda *args, **kwargs: samples):
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


def run_in(out, *flags):
    """Trains the tiny network in the folder `out` and returns the checkpoint."""
    result = call(train, *FLAGS, "--out", out, *flags)
    assert result.code == 0, result.err
    return load_checkpoint(out / "checkpoint.pt")


def metrics(out):
    """The rows of metrics.csv, dicts of strings."""
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    """The bytes of all files in a folder, but for the lock."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def same(a, b):
    """Equal bit for bit, what the clock said aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a.keys() - CLOCK)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def before_step(monkeypatch, step, action):
    """Does something when the step begins, once."""
    draw_batch = train.draw_batch

    def drawing(now, *args):
        if now == step:
            monkeypatch.setattr(train, "draw_batch", draw_batch)
            action()
        return draw_batch(now, *args)

    monkeypatch.setattr(train, "draw_batch", drawing)


def crash():
    """Stands for SIGKILL: nothing of the run's own is done after it."""
    raise RuntimeError("crash")
