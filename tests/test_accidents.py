"""Everyday accidents, each of which costs no run: terminals that close, disks that fill up, packages that are missing,
notebooks, other ways to start Python."""
import contextlib
import errno
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

import evaluate
import sample
import train
from helpers import FLAGS, ROOT, assert_one_line, before_step, call, contents, few_digits, metrics, run_in, start
from utils import checkpoint, cli, settings
from utils.checkpoint import load_checkpoint


@pytest.fixture(scope="module", autouse=True)
def quick():
    with few_digits():
        yield


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Flags for a process of its own, which knows nothing of few_digits: it trains on eight pictures in a folder."""
    folder = tmp_path_factory.mktemp("eight")
    (folder / "pictures").mkdir()
    for i in range(8):
        iio.imwrite(folder / "pictures" / f"{i}.png", np.full((28, 28), 30 * i, np.uint8))
    return ["--images", folder / "pictures", "--grey", "--image-size", 28, "--data", folder, "--timesteps", 4,
            "--epochs", 1000]


# ----------------------------------------------------------------------------------------------------------------------
# Terminals

@pytest.mark.skipif(not hasattr(os, "login_tty"), reason="no such terminals here, or Python before 3.11")
def test_a_terminal_that_closes_in_the_midst_of_a_run_loses_nothing(tmp_path, eight):
    """A real one, on which the bar is drawn until it is gone."""
    ours, theirs = os.openpty()
    command = [sys.executable, ROOT / "train.py", *FLAGS, *eight, "--report-every", 1, "--out", tmp_path]
    process = subprocess.Popen(list(map(str, command)), stdin=theirs, stdout=theirs, stderr=theirs,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=lambda: os.login_tty(0))
    try:
        os.close(theirs)
        seen = b""
        while b"validation" not in seen:
            seen += os.read(ours, 1000)
        os.close(ours)
        assert process.wait(timeout=60) == 128 + signal.SIGHUP
    finally:
        process.kill()
        process.wait()
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] >= 1 and [row["step"] for row in metrics(tmp_path)] == [
        str(row["step"]) for row in state["history"]]


@pytest.mark.skipif(not shutil.which("head") or not hasattr(signal, "SIGHUP"), reason="another kind of shell")
def test_nohup_train_head_goes_on_to_its_end(tmp_path, eight):
    """nohup python train.py | head -n 1, whose terminal is closed after a step."""
    process = start("train.py", *FLAGS, *eight, "--max-steps", 12, "--save-every", 1, "--out", tmp_path,
                    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    head = subprocess.run(["head", "-n", "1"], stdin=process.stdout, stdout=subprocess.PIPE, text=True)
    process.stdout.close()
    while process.poll() is None and not (tmp_path / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    with process.stderr as file:
        assert file.read() == "" and process.wait() == 0 and head.stdout.startswith("model")
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 12 and len(metrics(tmp_path)) == 1


def test_a_stderr_that_was_closed_before_the_start_costs_no_run(tmp_path, monkeypatch):
    """python train.py 2>&-, as some who start programs in the background have it."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, FLAGS), "--max-steps", "1", "--out", str(tmp_path)])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    with contextlib.suppress(SystemExit):
        cli.run(train.main)
    if sys.stderr:  # what took its place
        sys.stderr.close()
    assert (tmp_path / "checkpoint.pt").exists() and (tmp_path / "metrics.csv").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Notebooks

def test_a_run_in_a_notebook_and_the_command_that_it_prints(tmp_path, monkeypatch, eight):
    """Jupyter names a back end that only it has, and a matplotlibrc may ask for what is not installed. The command is
    run where the run was: not in the folder of the scripts."""
    (tmp_path / "rc").write_text("text.usetex: True\nfont.family: No Such Font\nbackend: qtagg\nsavefig.format: svg\n")
    monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path / "rc"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    process = start("train.py", *FLAGS, *eight, "--max-steps", 2, "--out", "my run", cwd=tmp_path)
    out, err = process.communicate(timeout=900)
    assert (process.returncode, err) == (0, "")
    pictures = [tmp_path / "my run" / name for name in ("loss.png", "samples/step_0000002.png")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    sample_, it, python, script, *flags = shlex.split(out.splitlines()[-1])
    assert (sample_, it, python) == ("sample", "it", "python")
    monkeypatch.chdir(tmp_path)
    assert Path(script).resolve() == ROOT / "sample.py"
    made = call(sample, *flags)
    assert (made.code, made.err) == (0, "")
    assert all(Path(path).is_file() for path in made.out.split())


@pytest.mark.parametrize("backend", ["svg", "module://nowhere", None])
def test_plots_leave_the_back_end_of_a_notebook_as_it_is(monkeypatch, backend):
    """None: it stays open until somebody asks for a window."""
    monkeypatch.delenv("MPLBACKEND", raising=False)
    if backend:
        monkeypatch.setenv("MPLBACKEND", backend)
    code = """if True:
        import io, os
        from utils.pictures import plot_losses
        plot_losses(io.BytesIO(), [], [[1, 1.0], [2, 0.5]])
        import matplotlib
        chosen = dict.__getitem__(matplotlib.rcParams, "backend")
        print(os.environ.get("MPLBACKEND"), chosen if isinstance(chosen, str) else None)
    """
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stdout.split()) == (0, [str(backend)] * 2), process.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Disks and clocks

def test_a_disk_that_fills_up_in_the_midst_of_a_checkpoint_is_one_line_with_its_path(tmp_path, monkeypatch):
    """So does a limit on the size of files end it."""
    resource = pytest.importorskip("resource")
    run_in(tmp_path, "--max-steps", 2)
    before, limits = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    before_step(monkeypatch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1])))
    try:
        result = call(train, *FLAGS, "--max-steps", 5, "--resume", "--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(result, 1, tmp_path / "checkpoint.pt", os.strerror(errno.EFBIG))
    assert contents(tmp_path) == before


def test_a_clock_may_stand_still_in_a_step(tmp_path, monkeypatch):
    """As that of Windows does for 16 ms at a time. The run can be saved just after a report, and go on."""
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    for flags in ["--max-steps", 2, "--report-every", 1], ["--max-steps", 3, "--resume", "--report-every", 100], \
            ["--max-steps", 4, "--resume"]:
        result = call(train, *FLAGS, "--out", tmp_path, *flags)
        assert result.code == 0, result.err
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4


def test_the_shipped_model_that_is_missing_is_restored_by_git(tmp_path, monkeypatch):
    """Nobody who left --checkpoint out is told to leave it out."""
    for module in settings, checkpoint:
        monkeypatch.setattr(module, "SHIPPED", tmp_path.resolve() / "mnist.pt")
    monkeypatch.chdir(tmp_path)
    for result in call(sample), call(evaluate), call(sample, "--checkpoint", tmp_path / "mnist.pt"):
        assert_one_line(result, 1, "mnist.pt", "git checkout")
        assert "without --checkpoint" not in result.err
    assert_one_line(call(sample, "--checkpoint", "other.pt"), 1, "other.pt", "train.py", "without --checkpoint")


# ----------------------------------------------------------------------------------------------------------------------
# Python itself

OPTIMIZED = """if True:
    import json, sys
    sys.path.insert(0, "tests")
    import evaluate, sample, train
    from helpers import FLAGS, call, few_digits
    out = sys.argv[1]
    drawn = ["--checkpoint", out + "/checkpoint.pt", "--n", 2, "--steps", 2, "--device", "cpu"]
    with few_digits():
        made = [call(train, *FLAGS, "--max-steps", 2, "--out", out), call(sample, *drawn, "--gif", "--out", out),
                call(evaluate, *drawn, "--json", out + "/figures.json", "--pairs", out + "/pairs.png"),
                *[call(module, "--help") for module in (train, sample, evaluate)]]
    print(json.dumps([__debug__, [vars(result) for result in made]]))
"""


def test_all_commands_run_without_docstrings(tmp_path):
    """python -OO, which leaves assertions out as well."""
    process = subprocess.run([sys.executable, "-OO", "-W", "error", "-c", OPTIMIZED, str(tmp_path)], cwd=ROOT,
                             env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    debug, results = json.loads(process.stdout)
    assert debug is False and [(result["code"], result["err"]) for result in results] == [(0, "")] * 6
    assert {"grid.png", "process.gif", "figures.json", "pairs.png"} < {path.name for path in contents(tmp_path)}
    for result, flag in zip(results[3:], ("--resume", "--gif", "--npz")):
        assert flag in result["out"] and "None" not in result["out"]


@pytest.mark.skipif(os.name == "nt", reason="signals are others there")
@pytest.mark.parametrize("command", ["train.py", "sample.py", "evaluate.py"])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, monkeypatch, command):
    """And what else goes wrong there is told as ever."""
    fake = tmp_path / "torch.py"
    fake.write_text("import time\nprint('importing', flush=True)\ntime.sleep(20)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", f"{command}: error: interrupted\n")
    fake.write_text("raise ImportError('no such torch')\n")
    process = start(command)
    out, err = process.communicate()
    assert process.returncode == 1 and err.startswith("Traceback") and err.endswith("ImportError: no such torch\n")


def test_without_imageio_nothing_is_sampled_in_vain(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "generate", lambda *args, **kwargs: pytest.fail("it was sampled"))
    monkeypatch.setitem(sys.modules, "imageio.v3", None)
    assert_one_line(call(sample, "--out", tmp_path), 1, "imageio")


@pytest.mark.parametrize("module", ["sample", "train"])
def test_python_without_lzma_can_import_all(module):
    code = f"import sys\nsys.modules['_lzma'] = None\nimport {module}"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("command", ["train.py", "sample.py", "evaluate.py", "edit.py"])
def test_without_torch_a_line_says_how_to_get_it(command):
    """As without the environment. -S: packages that were installed are not found."""
    process = subprocess.run([sys.executable, "-S", ROOT / command], capture_output=True, text=True,
                             env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    assert process.returncode == 1 and process.stdout == "" and process.stderr.count("\n") == 1
    assert process.stderr.startswith(f"{command}: error: ") and "is not installed" in process.stderr
    assert "source .venv/bin/activate" in process.stderr and "pip install -r requirements.txt" in process.stderr


def test_a_script_of_others_that_imports_a_part_keeps_its_files_when_it_is_interrupted(tmp_path):
    (tmp_path / "mine.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom utils.data import to_uint8\n"
        "file = open('log.txt', 'w')\nfile.write('not flushed yet')\nraise KeyboardInterrupt\n")
    process = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode != 0 and "KeyboardInterrupt" in process.stderr
    assert (tmp_path / "log.txt").read_text() == "not flushed yet"
