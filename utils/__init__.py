"""What every research repo needs and nobody clones it for. The commands import it first: while Python imports torch,
which takes a second, Ctrl-C prints one line and no traceback; then utils.cli.run takes over."""
import os
import sys


def _one_line_for_ctrl_c(kind, error, traceback, otherwise=sys.excepthook):
    if not issubclass(kind, KeyboardInterrupt) or hasattr(sys, "ps1"):  # at a prompt it is no end
        return otherwise(kind, error, traceback)
    print(f"{os.path.basename(sys.argv[0])}: error: interrupted", file=sys.stderr)
    os._exit(130)


os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a process that is not found is a line of ours, not forty of C++
sys.excepthook = _one_line_for_ctrl_c
