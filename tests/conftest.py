"""The modules under test lie beside this folder, and are not installed. A warning is an error. The whole suite runs in
as many processes as there are cores, up to four (pytest-xdist); some of its tests, in one."""
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: a core each


def pytest_configure(config):
    """Here and not in a pytest.ini, which would be one more file at the top."""
    config.addinivalue_line("filterwarnings", "error")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    if config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None and not (config.option.usepdb or any(
            Path(argument.split("::")[0]).exists() for argument in config.invocation_params.args)):
        config.option.numprocesses = min(4, os.cpu_count())
