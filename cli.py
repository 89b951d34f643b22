"""What the commands share: flag types with clear messages, the choice of device, and failures in one line."""
import argparse
import math
import os
import signal
import sys

import torch


class Parser(argparse.ArgumentParser):
    """argparse whose usage errors are one line on stderr, exit code 2, and whose --help shows the defaults."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n".replace("%%", "%"))


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


def pick_device(name):
    """The torch.device for --device: auto takes CUDA, else MPS, else the CPU.

    Raises:
        RuntimeError: a GPU was asked for by name and there is none.
    """
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if name == "auto":
        name = next(kind for kind in available if available[kind]())
    elif not available[name]():
        raise RuntimeError(f"--device {name} was asked for, but torch finds no such device here; use --device cpu")
    return torch.device(name)


def run(main):
    """Runs a command's `main()` and exits: 0 on success, 1 with one line on stderr on failure, 130 on Ctrl-C.

    The traceback of a failure is shown only if the environment variable TRACEBACK is set.
    """
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
        text = str(error) if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        _fail(" ".join(text.split()), 1)


def _fail(text, code):
    print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)
    sys.exit(code)
