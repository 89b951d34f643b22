"""What every command does alike: flags, the device, signals, what it prints, and how a failure is told."""
import argparse
import io
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import sample
import train
from helpers import ROOT, assert_one_line, call, few_digits, run_in, trained
from utils import cli
from utils.data import read_npz


def python(code, stdout=subprocess.PIPE, **kwargs):
    """Starts a process that runs this code, which finds our modules, and has pipes for its input and output."""
    return subprocess.Popen([sys.executable, "-W", "error", "-c", code], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                            stdout=stdout, stderr=subprocess.PIPE, **kwargs)


def test_an_old_python_is_refused_in_one_line():
    process = python("import sys; sys.version_info = (3, 9, 2); import utils; print('there')")
    out, err = process.communicate()
    assert process.returncode == 1 and out == "" and err.count("\n") == 1 and "needs Python 3.10" in err


# ----------------------------------------------------------------------------------------------------------------------
# Memory

@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory of glibc")
def test_freed_memory_is_kept_until_the_program_ends():
    program = """
import atexit, torch
def resident():  # MB
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 // 2**20
atexit.register(lambda: print("end", resident()))  # the first to be registered comes last
from utils.cli import keep_memory
keep_memory()
before = resident()
buffers = [torch.ones(5 * 2**20) for _ in range(10)]  # 20 MB each
del buffers
print("kept", resident() - before)
print("before", before)
"""
    out, err = python(program).communicate()
    megabytes = {name: int(value) for name, value in map(str.split, out.splitlines())}
    assert megabytes.keys() == {"kept", "before", "end"} and err == ""
    assert megabytes["kept"] > 190
    assert megabytes["end"] < megabytes["before"] + 20


def test_older_glibc_keeps_as_much_as_it_can(monkeypatch):
    """Up to 2.34 it refuses more than 32 MiB, and then takes the least, once the other limit is set."""
    asked = []

    class Libc:
        malloc_trim = int

        def mallopt(self, which, value):
            asked.append((which, value))
            return int(which != -3 or value <= 1 << 25)

    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: Libc())
    monkeypatch.setattr(cli.atexit, "register", lambda *args: None)
    cli.keep_memory()
    assert asked == [(-3, 1 << 30), (-3, 1 << 25), (-1, (1 << 31) - 1)]


# ----------------------------------------------------------------------------------------------------------------------
# Devices

@pytest.mark.parametrize("cuda, mps, best", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_takes_the_best_device_there_is(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert cli.pick_device("auto") == torch.device(best)
    for name, there in ("cuda", cuda), ("mps", mps), ("cpu", True):
        if there:
            assert cli.pick_device(name) == torch.device(name)
        else:
            with pytest.raises(RuntimeError, match=f"--device {name} .*--device cpu"):
                cli.pick_device(name)


def test_a_gpu_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in "cuda:0", "cuda:1":
        assert cli.pick_device(name) == torch.device(name)
    with pytest.raises(RuntimeError, match="--device cuda:2 .*--device cpu"):
        cli.pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="--device cuda:0 .*--device cpu"):
        cli.pick_device("cuda:0")


@pytest.mark.parametrize("device", ["cpu:0", "cuda:", "cuda:-1", "cuda:x", "gpu", "", "CUDA", "cuda:1000"])
def test_what_is_no_device_is_bad_usage(device):
    assert_one_line(call(sample, "--device", device), 2, "--device", repr(device), "cuda:1")


@pytest.mark.parametrize("able, expected", [
    ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "AMD EPYC 9R14"}, True), ({"amx_bf16": True}, True),
    ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, True),
    ({"avx512_bf16": True, "amx_bf16": False, "cpu_name": "Intel Xeon"}, False),
    ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, False), ({}, False),
])
def test_bf16_is_for_processors_that_are_faster_in_it(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert cli.faster_in_bf16(torch.device("cpu")) is expected
    assert not cli.faster_in_bf16(torch.device("cuda")) and not cli.faster_in_bf16(torch.device("mps"))


# ----------------------------------------------------------------------------------------------------------------------
# Flags and failures

@pytest.mark.parametrize("kind, good, bad", [
    (cli.integer(1, 5), ["1", "5"], ["0", "6", "1.5", "1e0", "x", ""]),
    (cli.number(0.5, 2), ["0.5", "2", "1e0"], ["0.4", "2.1", "nan", "inf", "x", ""]),
])
def test_both_ends_of_a_range_are_in_it(kind, good, bad):
    assert [kind(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


def test_an_empty_path_is_refused():
    assert cli.path("a folder/b") == "a folder/b"
    with pytest.raises(argparse.ArgumentTypeError, match="empty"):
        cli.path("")


def test_home_is_found_where_a_shell_does_not_look_for_it(monkeypatch):
    """In --out=~/run."""
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("USERPROFILE", "/home/ada")
    assert cli.path("~/run") == "/home/ada/run" and cli.path("runs/~") == "runs/~"


@pytest.mark.parametrize("error, code, text", [
    (cli.UsageError("--x is wrong"), 2, "--x is wrong"), (ValueError("two\nlines"), 1, "two lines"),
    (FileNotFoundError(2, "No such file", "there.pt"), 1, "there.pt: No such file; check the path"),
    (OSError(28, "No space left on device"), 1, "No space left on device; check"),
    (ModuleNotFoundError("No module named 'imageio'", name="imageio"), 1, "imageio is not installed here; activate"),
    (ModuleNotFoundError("No module named 'x'", name="x"), 1, "ModuleNotFoundError: No module named 'x'"),
    (KeyError("name"), 1, "KeyError: 'name'"), (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "out of memory; try a smaller --batch-size"),
    (RuntimeError("DefaultCPUAllocator: not enough memory"), 1, "out of memory; try a smaller --batch-size"),
    (MemoryError("Unable to hold an array"), 1, "out of memory; try a smaller --batch-size"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), 1, "out of memory; try a smaller"),
    (RuntimeError("CUDA error: no kernel image is available\nFor debugging, pass\n"), 1,
     "CUDA error: no kernel image is available; try --device cpu\n"),
    (RuntimeError("backend='inductor' raised:\nNo compiler"), 1,
     "backend='inductor' raised: No compiler; or leave --compile out\n"),
], ids=str)
def test_a_failure_is_one_line_and_a_code(monkeypatch, capsys, error, code, text):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["folder/train.py"])
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    out, err = capsys.readouterr()
    assert end.value.code == code and out == ""
    assert err.startswith(f"train.py: error: {text}") and err.count("\n") == 1 and err.endswith("\n")


def test_torch_and_numpy_out_of_memory_are_known_as_such(monkeypatch, capsys):
    """By what they say themselves, here."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for allocate in (lambda: torch.empty(2**60, dtype=torch.uint8)), (lambda: np.empty(2**60, dtype=np.uint8)):
        with pytest.raises(SystemExit):
            cli.run(allocate)
        assert capsys.readouterr().err == "train.py: error: out of memory; try a smaller --batch-size\n"


def test_a_resumed_run_out_of_memory_is_not_advised_to_do_what_it_refuses(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume"])
    assert "start another run by --init" in cli.one_line(MemoryError())


def test_a_name_that_cannot_be_printed_is_printed_nevertheless(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    cli.run(lambda: print("\u6f22.png"))
    assert written.getvalue().split() == [rb"\u6f22.png"]


def test_a_flag_of_two_lines_is_refused_in_one(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--one\ntwo"])
    with pytest.raises(SystemExit) as end:
        cli.Parser("Does it.").parse_args()
    assert end.value.code == 2
    assert capsys.readouterr().err == "x.py: error: unrecognized arguments: --one two (see --help)\n"


def test_stdout_may_be_closed(monkeypatch):
    """python sample.py >&-"""
    monkeypatch.setattr(sys, "stdout", None)
    cli.run(lambda: print("done"))
    assert sys.stdout.name == os.devnull
    sys.stdout.close()


def test_the_traceback_is_there_for_who_asks(monkeypatch):
    def main():
        raise ValueError("a bug")

    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError, match="a bug"):
        cli.run(main)


@pytest.mark.parametrize("doc", ["Draws images: so.\n\nThe story of it.\n", None])
def test_help_has_the_first_line_of_what_a_command_is_about(doc, capsys):
    """There is none under python -OO."""
    with pytest.raises(SystemExit) as end:
        cli.Parser(doc).parse_args(["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and ("Draws images: so." in out) == bool(doc) and "story" not in out


@pytest.mark.parametrize("error, words", [
    (ValueError("two\nlines"), "two lines"), (KeyError("name"), "KeyError: 'name'"), (MemoryError(), "out of memory"),
    (OSError(28, "No space left", "there.png"), "there.png: No space left"), (ZeroDivisionError(), "ZeroDivisionError"),
], ids=str)
def test_what_is_tolerated_is_a_warning_of_one_line(capsys, error, words):
    with cli.tolerated("drawing it"):
        raise error
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("warning: drawing it failed") and words in err


def test_nothing_is_said_of_what_works_and_the_end_is_not_tolerated(capsys):
    for end in KeyboardInterrupt, SystemExit:
        with pytest.raises(end), cli.tolerated("drawing it"):
            raise end
    with cli.tolerated("drawing it"):
        pass
    assert capsys.readouterr() == ("", "")


def test_no_work_is_lost_for_a_reader_that_has_gone():
    """python train.py | head -1"""
    process = python("""if True:
        import sys
        from utils.cli import run, say
        def work():
            say("first")
            sys.stdin.read()
            for line in "x" * 100_000, "second":
                say(line)
            print("third", flush=True)
            print("work is done", file=sys.stderr)
        run(work)
    """)
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == "work is done\n" and process.wait() == 0
    process.stderr.close()


def test_without_a_terminal_a_line_a_minute_stands_for_the_bar(capsys, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for terminal, said in (False, "step 3\nstep 6\n"), (True, ""):
        file = io.StringIO()
        file.isatty = lambda: terminal
        with cli.Bar(total=100, file=file) as bar:
            for step in range(7):
                bar.advance(10, f"step {step}")
                now[0] += 25
        assert capsys.readouterr().out == said and ("70/100" in file.getvalue().replace(".0", "")) == terminal


def test_commands_to_go_on_with_can_be_pasted(monkeypatch, tmp_path):
    """Wherever one is, and whatever the names."""
    monkeypatch.chdir(tmp_path)
    python, script, *arguments = shlex.split(cli.command("sample.py", "--checkpoint", Path("a b") / "c.pt", "--n", 64))
    assert (python, Path(script).resolve()) == ("python", ROOT / "sample.py")
    assert arguments == ["--checkpoint", "a b/c.pt", "--n", "64"]
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", "a b", "--overwrite", "--lr", "1"])
    resume = ["python", "train.py", "--out", "a b", "--lr", "1", "--resume"]
    assert shlex.split(cli.command_to_resume()) == resume
    for init in ["--init", "m.pt"], ["--init=m.pt"]:
        monkeypatch.setattr(sys, "argv", ["train.py", *init, "--out", "a b", "--lr", "1"])
        assert shlex.split(cli.command_to_resume()) == resume
    monkeypatch.setattr(cli, "LOCAL_WORLD", 3)
    assert shlex.split(cli.command_to_resume()) == ["torchrun", "--nproc-per-node", "3", "--", *resume[1:]]
    for here, of_all in (3, 6), (1, 2):
        monkeypatch.setattr(cli, "LOCAL_WORLD", here)
        monkeypatch.setattr(cli, "WORLD", of_all)
        assert shlex.split(cli.command_to_resume())[:6] == [
            "torchrun", "--nnodes", "2", "--nproc-per-node", str(here), "--"]


def test_commands_to_go_on_with_on_windows(monkeypatch):
    """There a path on another drive is not relative to where we are, and a shell knows no single quotes."""
    def relpath(path):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.setattr(os.path, "relpath", relpath)
    script = str(ROOT / "sample.py")
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        patch.setattr(sys, "argv", ["train.py", "--out", "runs\\a b", "--data", "d\\e"])
        line = cli.command_to_resume()
    assert line == 'python train.py --out "runs\\a b" --data d\\e --resume'
    assert shlex.split(cli.command("sample.py")) == ["python", script]
    assert call(sample, "--help").code == 0


def test_every_seed_of_32_bits_is_accepted(tmp_path, monkeypatch):
    flags = ["--checkpoint", trained(), "--n", 1, "--steps", 1, "--out", tmp_path, "--npz", tmp_path / "x.npz"]
    pixels = []
    for seed in 2**31 - 1, 2**31, 2**32 - 1:
        assert call(sample, *flags, "--seed", seed).code == 0
        pixels.append(read_npz(tmp_path / "x.npz")[0].numpy().tobytes())
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--seed", str(seed)])
        assert evaluate.parse_flags().seed == seed
    assert len(set(pixels)) == 3
    with few_digits():
        assert run_in(tmp_path / "run", "--max-steps", 1, "--seed", 2**32 - 1)["settings"]["seed"] == 2**32 - 1
    for module in sample, evaluate, train:
        assert_one_line(call(module, "--seed", 2**32), 2, "--seed", 2**32 - 1)


# ----------------------------------------------------------------------------------------------------------------------
# Signals

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered_and_the_second_ends_the_program(number):
    def raised(number, frame):
        raise InterruptedError(number)

    before = signal.signal(number, raised)
    try:
        with cli.StopSignals() as stop:
            assert stop.signal is None
            signal.raise_signal(number)
            assert stop.signal == number
            with pytest.raises(InterruptedError):
                signal.raise_signal(number)
        assert signal.getsignal(number) == raised
        with cli.StopSignals() as stop:
            pass
        assert signal.getsignal(number) == raised and stop.signal is None
    finally:
        signal.signal(number, before)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
@pytest.mark.parametrize("first, second", [("SIGINT", "SIGHUP"), ("SIGTERM", "SIGHUP"), ("SIGHUP", "SIGTERM")])
def test_a_terminal_may_close_while_a_run_is_being_stopped(first, second):
    """After Ctrl-C, or at a logout, which sends two signals: it still saves."""
    def raised(number, frame):
        raise InterruptedError(number)

    numbers = [getattr(signal, name) for name in (first, second)]
    before = [(number, signal.signal(number, raised)) for number in numbers]
    try:
        with cli.StopSignals() as stop:
            for number in numbers:
                signal.raise_signal(number)
            assert stop.signal in numbers
        assert all(signal.getsignal(number) == raised for number in numbers)
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def test_at_a_terminal_ctrl_c_is_heard():
    """A step or a report may take a while, and a second Ctrl-C, out of impatience, would lose what was not saved."""
    pty = pytest.importorskip("pty")
    terminal, its = pty.openpty()
    code = "import signal; from utils.cli import StopSignals\nwith StopSignals():\n signal.raise_signal(signal.SIG{})"
    for name, lines in ("INT", 1), ("TERM", 0):
        process = subprocess.Popen([sys.executable, "-c", code.format(name)], cwd=ROOT, stderr=its)
        assert process.wait() == 0
        os.write(its, b"end\n")
        said = b""
        while b"end" not in said:
            said += os.read(terminal, 1000)
        assert said.count(b"second Ctrl-C") == lines and said.count(b"\n") == 1 + 2 * lines
    os.close(its), os.close(terminal)


def test_what_a_script_runs_in_the_background_can_be_stopped():
    """A shell starts it with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with cli.StopSignals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.signal == signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no such signal")
def test_a_terminal_that_closes_stops_a_run_unless_nohup_started_it(tmp_path):
    """What is printed still goes to a file or a pipe. It is started by nohup and, once it has undone that, not."""
    code = """if True:
        import pathlib, signal, sys
        from utils.cli import StopSignals
        signals = []
        for _ in range(2):
            with StopSignals() as stop:
                signal.raise_signal(signal.SIGHUP)
            print("out", flush=True), print("err", file=sys.stderr, flush=True)
            signals.append(stop.signal and int(stop.signal))
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        pathlib.Path(sys.stdin.read()).write_text(repr(signals))
    """
    process = python(code, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    out, err = process.communicate(str(tmp_path / "said"))
    assert process.returncode == 0
    assert (out, err) == ("out\n" * 2, "err\n" * 2)
    assert (tmp_path / "said").read_text() == repr([None, int(signal.SIGHUP)])


def test_nothing_is_written_to_a_terminal_that_has_closed():
    """Another stream, which goes to a pipe, is. And a second SIGHUP, by the kernel after the shell's, ends nothing."""
    pty = pytest.importorskip("pty")
    terminal, its = pty.openpty()
    process = python("""if True:
        import signal, sys
        from utils.cli import StopSignals
        with StopSignals():
            print("there", file=sys.stderr, flush=True), sys.stdin.read()
            signal.raise_signal(signal.SIGHUP), signal.raise_signal(signal.SIGHUP)
        print("out", flush=True), print("err", file=sys.stderr, flush=True)
    """, stdout=its, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))
    assert process.stderr.readline() == "there\n"
    os.close(its), os.close(terminal)
    assert process.communicate() == (None, "err\n") and process.returncode == 0
