"""Hostile flags: whatever a flag is given, its command refuses it in one line, or does its work."""
import contextlib
import io
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

import benchmark
import evaluate
import sample
import train
from helpers import DEVICE, FLAGS, assert_one_line
from hostile import execute, guarded, model, world
from utils import classifier, cli, settings

pytest.importorskip("resource", reason="limits to memory, alarm clocks and pipes with names are Unix's")

COMMANDS = train, sample, evaluate, benchmark
NUMBERS_AND_NAMES = {"negative": "-5", "huge": str(10**30), "NaN": "nan", "infinity": "inf",
                     "unicode": "\u0661\u00e9\u6f22\U0001f642", "two lines": "one\ntwo",
                     "not UTF-8": os.fsdecode(b"\xff\xfe")}
PLACES_ON_DISK = {"a folder": "folder", "a device": DEVICE, "a pipe": "fifo", "below a file": "file/below",
                  "a long name": "9" * 300}
HOSTILE = {"empty": "", **NUMBERS_AND_NAMES, **PLACES_ON_DISK}
READ = {(train, "--images"), (train, "--init"), (evaluate, "--npz"), (evaluate, "--checkpoint"),
        (sample, "--checkpoint")}


def flags_of(module):
    """The flags of a command, as its parser has them: argparse's actions."""
    found = []

    def caught(parser, *args):
        found.extend(parser._actions)
        raise SystemExit

    with mock.patch.object(cli.Parser, "parse_args", caught), contextlib.suppress(SystemExit):
        module.parse_flags()
    return found


ALL_FLAGS = [(module, action) for module in COMMANDS for action in flags_of(module)]
PATHS = [(module, action) for module, action in ALL_FLAGS if action.type is cli.path]


def named(value):
    return getattr(value, "__name__", None) or getattr(value, "dest", None)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder to be in, where there are a folder, a file and a pipe that nobody writes to."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    os.mkfifo("fifo")
    return tmp_path


@pytest.mark.parametrize("module, action", ALL_FLAGS, ids=named)
def test_values_of_flags(module, action, places):
    """A number or a choice is none of these, and a flag without a value has none; a path can be all, but not empty."""
    before = sorted(os.listdir())
    for name, value in HOSTILE.items():
        for flag in action.option_strings:
            argv = ["x.py", f"{flag}={value}"]
            with mock.patch.object(sys, "argv", argv), contextlib.redirect_stderr(io.StringIO()) as err:
                try:
                    flags = module.parse_flags()
                except SystemExit as end:
                    assert_one_line(SimpleNamespace(code=end.code, err=err.getvalue()), 2, flag)
                else:
                    flags = flags[0] if isinstance(flags, tuple) else flags
                    assert (module, action) in PATHS and value and getattr(flags, action.dest) == value, name
    assert sorted(os.listdir()) == before


def test_the_flags_are_all_there():
    """The control: none is forgotten, and those that take a path are known by their type."""
    assert len(ALL_FLAGS) > 50
    for module, action in ALL_FLAGS:
        assert action.nargs == 0 or action.choices or action.type, action
        assert (action.type is cli.path) == (action.metavar in ("FILE", "DIR")), action
    assert {(module, action.option_strings[0]) for module, action in PATHS} > READ


@pytest.mark.parametrize("module, action", PATHS, ids=named)
def test_paths(module, action, model, places, monkeypatch):
    """Each command with each path: it is refused in one line, or the command does its work there."""
    flag, = action.option_strings
    monkeypatch.setattr(settings, "SHIPPED", model)
    monkeypatch.setattr(classifier, "fit", lambda net, *args, **kwargs: net.eval().requires_grad_(False))
    monkeypatch.setattr(evaluate, "sweep", lambda model, n, path, flags: Path(path).touch())
    rest = {train: [*FLAGS, "--max-steps", 1, "--overwrite"], sample: ["--n", 1, "--steps", 1],
            evaluate: [*([] if flag == "--train-classifier" else ["--n", 256 if flag == "--sweep" else 1]),
                       *([] if flag in ("--npz", "--train-classifier") else ["--steps", 1])]}[module]
    for name, value in HOSTILE.items():
        ends_well = flag == "--data" or (module, flag) not in READ and (
            name in NUMBERS_AND_NAMES or name == "a folder" and action.metavar == "DIR")
        result = execute(module, *rest, f"{flag}={value}")
        if name == "empty":
            assert_one_line(result, 2, flag)
        elif ends_well:
            assert result.code == 0 and result.err == "", (name, result.err)
            assert flag == "--data" or Path(value).exists(), name
        else:
            assert_one_line(result, 1)
            assert value.encode("utf-8", "backslashreplace").decode().split("/")[0].split("\n")[0] in result.err, name
    assert Path("fifo").is_fifo() and Path(DEVICE).is_char_device() and not Path("file").read_bytes()


def test_a_lock_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    assert_one_line(execute(train, *FLAGS, "--max-steps", 1, "--out", tmp_path), 1, tmp_path / ".lock")


def test_a_leftover_that_is_a_pipe_is_not_waited_for(model, tmp_path):
    """It has the name of what a killed process leaves behind."""
    os.mkfifo(tmp_path / ".grid.png.0123abcd.tmp")
    signal.setitimer(signal.ITIMER_REAL, 20)
    result = execute(sample, "--checkpoint", model, "--n", 1, "--steps", 1, "--out", tmp_path)
    assert (result.code, result.err) == (0, "") and (tmp_path / "grid.png").exists()


def test_work_is_not_lost_for_a_name_that_cannot_be_printed(model, tmp_path):
    """As on a terminal that knows ASCII only."""
    flags = ["--checkpoint", model, "--n", 1, "--steps", 1, "--out", tmp_path / "\u6f22"]
    result = execute(sample, *flags, encoding="ascii")
    assert (result.code, result.err) == (0, "") and r"\u6f22" in result.out


def test_they_are_many():
    assert (len(ALL_FLAGS) + len(PATHS)) * len(HOSTILE) >= 500
