"""What every command needs: flags with clear messages, the device, signals, failures in one line."""
import argparse
import atexit
import contextlib
import ctypes
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from utils import what_is_missing
from utils.ranks import LOCAL_RANK, LOCAL_WORLD, RANK, WORLD, largest


class UsageError(ValueError):
    """A flag that makes no sense for the model at hand: exit code 2, like those that never do."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # "(default: None)" and "(default: False)" tell nobody anything
        return action.help if action.default is None or action.nargs == 0 else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose usage errors are one line on stderr, exit code 2, and whose --help shows the defaults.

    Args:
        doc: the command's docstring, of which --help shows the first line. None under python -OO.
    """

    def __init__(self, doc):
        super().__init__(description=(doc or "").partition("\n")[0], formatter_class=_Help, allow_abbrev=False)

    def error(self, message):
        """Ends the program with one line on stderr and exit code 2."""
        _fail(f"{' '.join(message.split())} (see --help)", 2)


def integer(low, high):
    """An argparse type: a whole number from `low` to `high`, both included."""
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return value
    return parse


def number(low, high):
    """An argparse type: a finite number from `low` to `high`, both included."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # nan fails too
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
        return value
    return parse


def path(text):
    """An argparse type: the path of a file or folder. An empty one is a mistake: "$OUT", say, where OUT is not set."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return os.path.expanduser(text)  # which a shell does not do after "--out="


def add_device_flag(parser):
    """--device, for pick_device."""
    parser.add_argument("--device", type=_device, default="auto", metavar="DEVICE", help="where to compute: auto, cpu, "
                        "cuda, cuda:1 (the second GPU) or mps; auto: CUDA, else MPS, else the CPU")


def _device(text):
    if not re.fullmatch("auto|cpu|mps|cuda(:[0-9]{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of auto, cpu, cuda, cuda:0, cuda:1 ... or mps")
    return text


def pick_device(name):
    """The torch.device for --device: auto takes CUDA, else MPS, else the CPU. Of several processes, each gets a GPU.

    Raises:
        RuntimeError: a GPU was asked for by name or number and there is none, or not one for each process.
    """
    available = {"cuda": torch.cuda.is_available, "cpu": lambda: True,
                 "mps": lambda: WORLD == 1 and torch.backends.mps.is_available()}  # gloo does not support it
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind]())
    if name == "mps" and WORLD > 1:
        raise RuntimeError("--device mps is for one process only; use --device cpu, or leave torchrun out")
    kind, _, number = name.partition(":")
    if not available[kind]() or (number and int(number) >= torch.cuda.device_count()):
        raise RuntimeError(f"--device {name} was asked for, but torch finds no such device here; use --device cpu")
    if kind == "cuda" and LOCAL_WORLD > 1:
        if number:
            raise RuntimeError(f"--device {name} is one GPU, and there are {LOCAL_WORLD} processes; use --device cuda")
        if LOCAL_WORLD > torch.cuda.device_count():
            raise RuntimeError(f"{LOCAL_WORLD} processes need a GPU each, and there are {torch.cuda.device_count()}; "
                               "start fewer with --nproc-per-node, or use --device cpu")
        name = f"cuda:{LOCAL_RANK}"
    return torch.device(name)


def faster_in_bf16(device):
    """Whether this device trains faster in bfloat16: a CPU with AMX does, or one of AMD's whose AVX-512 has it. Intel's
    AVX-512 is slower in it than in fp32 (EXPERIMENTS.md, Speed), and so is an H100 with a network as small as ours (On
    a GPU)."""
    able = getattr(torch.cpu, "get_capabilities", dict)()  # of torch 2.10 and later
    avx512 = able.get("avx512_bf16") and "Intel" not in able.get("cpu_name", "")
    return device.type == "cpu" and bool(able.get("amx_bf16") or avx512)


def keep_memory():
    """Tells glibc, where there is one, to keep freed memory until the program ends. Otherwise it would give large
    buffers back to the system and fault them in again page by page in every step: a twentieth of the time."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # the last on Windows
        libc = ctypes.CDLL(None)
        if not libc.mallopt(-3, 1 << 30):  # M_MMAP_THRESHOLD: take buffers up to 1 GiB from the heap
            libc.mallopt(-3, 1 << 25)  # the most that glibc up to 2.34 accepts
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: and leave them there
        atexit.register(libc.malloc_trim, 0)  # at the end torch takes 0.1 GB more, only to take itself down


class StopSignals:
    """Context: the first Ctrl-C, SIGTERM or SIGHUP (a terminal that closes, unless nohup has it ignored) is remembered
    in .signal, so that a step can end and be saved. A second Ctrl-C or SIGTERM ends the program at once."""

    def __init__(self):
        self.signal = None
        self.terminals = [stream for stream in (sys.stdout, sys.stderr) if stream.isatty()]

    def __enter__(self):
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        self.before = {number: signal.signal(number, self._note) for number in numbers
                       if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN}
        return self

    def _note(self, number, frame):
        self.signal = number
        if number in (signal.SIGINT, signal.SIGTERM):
            for which in signal.SIGINT, signal.SIGTERM:  # not SIGHUP: the terminal may close before all is saved
                signal.signal(which, self.before[which])
            if number == signal.SIGINT and sys.stderr in self.terminals and RANK == 0:
                with contextlib.suppress(OSError):  # not print, which this may have interrupted
                    os.write(sys.stderr.fileno(), b"\nfinishing the step, then saving; a second Ctrl-C stops without\n")
        else:  # the terminal has gone, and must not be written to
            for stream in self.terminals:
                to_nowhere(stream)

    def agreed(self, share):
        """The largest `share` of the run that any process has done. Also gives all of them a signal that one got."""
        number, share = largest(self.signal or 0, share)
        self.signal = int(number) or self.signal
        return share

    def __exit__(self, *exception):
        for which, handler in self.before.items():
            signal.signal(which, handler)


def command_to_resume():
    """The command line that goes on with this run of train.py."""
    arguments = [argument for before, argument in zip(["", *sys.argv], sys.argv) if before != "--init"
                 and argument not in ("--overwrite", "--resume", "--init") and not argument.startswith("--init=")]
    nodes = ["--nnodes", str(WORLD // LOCAL_WORLD)] if WORLD > LOCAL_WORLD else []  # the user adds the address
    start = ["torchrun", *nodes, "--nproc-per-node", str(LOCAL_WORLD), "--"] if nodes or LOCAL_WORLD > 1 else ["python"]
    return _joined([*start, *arguments, "--resume"])


def command(script, *arguments):
    """The command line that runs another script of this project, from the folder that we are in."""
    return _joined(["python", nearby(Path(__file__).parent.parent / script), *map(str, arguments)])


def nearby(path):
    """A path, a string, as seen from the folder that we are in. On another drive of Windows it stays as it is."""
    try:
        return os.path.relpath(path)
    except ValueError:
        return str(path)


def _joined(arguments):
    return subprocess.list2cmdline(arguments) if os.name == "nt" else shlex.join(arguments)


def say(text, file=None):
    """Prints a line. If whoever read it has gone, this one and all further ones go nowhere, so that no work is lost."""
    file = file or sys.stdout
    try:
        print(text, file=file, flush=True)
    except OSError:
        to_nowhere(file)


def to_nowhere(stream):
    """What is written to a standard stream is thrown away from now on."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Bar(tqdm):
    """tqdm's bar. Without a terminal it prints a line a minute instead."""

    def __init__(self, **kwargs):
        super().__init__(unit_scale=True, disable=RANK > 0 or None, dynamic_ncols=True, smoothing=0.05, **kwargs)
        self.spoke = time.monotonic()

    def advance(self, n, line):
        """Counts n more. Without a terminal it prints the line, at most once a minute."""
        self.update(n)
        if self.disable and time.monotonic() - self.spoke > 60:
            self.spoke = time.monotonic()
            say(line)


@contextlib.contextmanager
def tolerated(what):
    """Context in which a failure is one line of warning and not the end: work must not be lost for a picture."""
    try:
        yield
    except Exception as error:
        say(f"warning: {what} failed; going on without it: {one_line(error)}", sys.stderr)


def run(main):
    """Runs a command's `main()` and exits: 0 on success, 2 on bad usage, 1 on any other failure, 130 on Ctrl-C, the
    last three with one line on stderr (none if it is the reader of our output that has gone).

    The traceback of a failure is shown only if the environment variable TRACEBACK is set.
    """
    for name in "stdout", "stderr":
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))
    if hasattr(sys.stdout, "reconfigure"):  # work that is done must not fail for a name that cannot be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        _fail("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output, `head` perhaps, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("TRACEBACK"):
            raise
        _fail(one_line(error), 2 if isinstance(error, UsageError) else 1)


def one_line(error):
    """What went wrong, and what to do, in one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror}; check the path, its permissions and the free space"
    elif isinstance(error, (ValueError, RuntimeError, OSError)):  # ours, or torch's, which read well
        text = str(error)
    else:
        text = what_is_missing(error) or f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or any(
            words in text for words in ("out of memory", "not enough memory", "allocate memory", "ALLOC_FAILED")):
        text = "out of memory; try a smaller --batch-size"
        if "--resume" in sys.argv:  # which keeps the size of the batches
            text = "out of memory; free some, or start another run by --init with a smaller --batch-size"
    elif "CUDA error" in text:  # what follows is for those who build torch
        text = text.partition("\n")[0] + "; try --device cpu"
    elif "backend='inductor'" in text:
        text += "; or leave --compile out"
    return " ".join(text.split())


def _fail(text, code):
    if RANK:  # the first process says the same, if it is not this one's alone, and then torchrun ends them all
        time.sleep(3)
    print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)
    sys.exit(code)
