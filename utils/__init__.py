"""What every research repo needs and nobody clones it for. The commands import it first: while Python imports torch,
which takes a second, Ctrl-C prints one line and no traceback, and so does a package that is not installed; then
utils.cli.run takes over."""
import os
import sys


def what_is_missing(error):
    """What to do about a package of requirements.txt that is not installed; "" if the error is another."""
    if isinstance(error, ModuleNotFoundError) and error.name in (
            "torch", "torchvision", "numpy", "tqdm", "matplotlib", "imageio"):
        return (f"{error.name} is not installed here; activate the environment that has it (source "
                ".venv/bin/activate), or run: pip install -r requirements.txt")
    return ""


def _in_one_line(kind, error, traceback, otherwise=sys.excepthook):
    text = "interrupted" if issubclass(kind, KeyboardInterrupt) else what_is_missing(error)
    if not text or hasattr(sys, "ps1"):  # at a prompt it is no end
        return otherwise(kind, error, traceback)
    print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)
    os._exit(130 if text == "interrupted" else 1)


if sys.version_info < (3, 10):
    sys.exit(f"this needs Python 3.10 or later, and here it is {sys.version.split()[0]}")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a process that is not found is a line of ours, not forty of C++
# Nobody else's script ends like that: its open files would lose what is not written yet.
if os.path.basename(sys.argv[0]) in ("train.py", "sample.py", "evaluate.py", "edit.py", "-m"):
    sys.excepthook = _in_one_line
