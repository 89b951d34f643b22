"""Training survives SIGKILL at any moment. chaos.py does it; run by itself it does it a hundred times."""
import os
import subprocess
import sys

import pytest

from helpers import ROOT, WARNINGS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork, nor a SIGKILL, here")
def test_training_survives_sigkill():
    """Three kills, and seven controls that must be noticed. In a process of its own, since it forks."""
    command = [sys.executable, ROOT / "tests" / "chaos.py", "--kills", "3", "--seed", "0"]
    chaos = subprocess.run(command, env={**os.environ, "PYTHONWARNINGS": WARNINGS}, text=True, capture_output=True)
    assert chaos.returncode == 0, chaos.stdout + chaos.stderr
    assert "3 kills" in chaos.stdout and chaos.stdout.count(": noticed") == 7 and chaos.stdout.endswith("all well\n")
    assert chaos.stderr == ""
