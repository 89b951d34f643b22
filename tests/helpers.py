"""What the tests of the commands share: calls in this process, and a tiny trained run."""
import atexit
import contextlib
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

import train
from utils.cli import run
from utils.metrics import Validation

ROOT = Path(train.__file__).resolve().parent

# A place that is no file, to be refused. root, who could lose /dev/null if the code were broken on purpose
# (mutants.py), has one that nobody can replace.
DEVICE = "/dev/null" if getattr(os, "geteuid", lambda: 1)() or not os.path.exists("/dev/pts/ptmx") else "/dev/pts/ptmx"

# Flags of the smallest training run that has every part of a large one.
FLAGS = ["--width", "8", "--depth", "1", "--batch-size", "8", "--timesteps", "20", "--warmup", "4", "--device", "cpu"]


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
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error", "PYTHONUNBUFFERED": ""}
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
