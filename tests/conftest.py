"""The modules under test lie beside this folder, and are not installed. A warning is an error. The whole suite runs in
two processes."""
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    """Here and not in a pytest.ini, which would be one more file at the top."""
    config.addinivalue_line("filterwarnings", "error")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """A plain `pytest` is `pytest -n 2` (pytest-xdist), which takes two thirds of the time. When files are named it
    stays in one process, where --pdb and -s work and the modules are imported once."""
    whole = config.args_source is not config.ArgsSource.ARGS and not config.option.usepdb
    worker = hasattr(config, "workerinput")  # workers load this file too
    if whole and not worker and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses = 2
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each, or they would get into each other's way


@pytest.fixture
def clock(monkeypatch):
    """The clock of a run: each step of training takes `clock.step` seconds, all else none, but when a test moves
    `clock.now` on."""
    import train
    clock, draw_batch = SimpleNamespace(now=0.0, step=0.04), train.draw_batch

    def slow_draw_batch(*args):
        clock.now += clock.step
        return draw_batch(*args)

    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(train, "draw_batch", slow_draw_batch)
    return clock
