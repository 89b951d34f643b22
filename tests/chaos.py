"""Chaos: train.py is killed by SIGKILL again and again, resumed each time, and must end as if nothing had happened.

    python tests/chaos.py --kills 100 --seed 0

Half of the kills come at a random moment, half at a named one: in a file half written, written, on the disk, renamed.
After each the checkpoint must load and have lost nothing that was saved, and every line of metrics.csv be whole and
there once. At the end everything must equal an uninterrupted run, by ==, but for what the clock said.

This process imports torch and forks a child for each attempt: that takes milliseconds, where a new Python would take
seconds. The hooks are installed in the child; train.py knows nothing of them. Controls that must be noticed come last:
without them all of this could pass by comparing nothing.
"""
import argparse
import collections
import contextlib
import csv
import dataclasses
import io
import json
import math
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

# Before NumPy and torch start threads of theirs, on the CPU or for a GPU: a fork would not have them.
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from tqdm import tqdm

import train
from helpers import CLOCK, FLAGS, ROOT, call
from utils import checkpoint, files, pictures
from utils.cli import run
from utils.data import DATASETS, load_dataset
from utils.metrics import Validation

STEPS = 13  # of 8 images out of 60: two epochs; the last report is one of its own
REPORTS = [5, 10, 13]
RUN = [*FLAGS, "--epochs", "4", "--max-steps", str(STEPS), "--report-every", "5"]
MOMENTS = ("half written", "written", "on the disk", "renamed")
FILES = ("checkpoint.pt", "metrics.csv", "settings.json", "loss.png", "step_0000010.png")


class Broken(AssertionError):
    """What a kill must not do, was done."""


# ----------------------------------------------------------------------------------------------------------------------
# In the child

@dataclasses.dataclass
class Hooks:
    """What an attempt does beside training. `where` is memory shared with the parent: what was being done, as text."""
    where: mmap.mmap
    target: tuple = ()  # (file, moment, count): dies when it comes there for the count-th time
    pause: float = 0.0  # seconds to stay at each moment of a save, so that a kill at a random time hits it
    halves: int = 0  # a file counts as half written once it has this many bytes
    defect: object = None  # a callable that breaks something, for the controls
    phase: str = "start-up"

    def note(self, text):
        self.where[:] = text.encode().ljust(len(self.where))

    def at(self, name, moment):
        self.note(f"{self.phase}: {name} {moment}" if name != "step" else self.phase)
        self.counts[name, moment] += 1
        if self.target == (name, moment, self.counts[name, moment]):
            os.kill(os.getpid(), signal.SIGKILL)
        if name in ("checkpoint.pt", "metrics.csv"):
            time.sleep(self.pause)

    def enter(self, phase):
        self.phase = phase
        self.note(phase)

    def install(self):
        """Every file goes through files.atomic_write, and so through `open` there, os.fsync and os.replace."""
        self.counts = collections.Counter()
        hooks, fsync, replace = self, os.fsync, os.replace

        class Writer(io.BufferedWriter):
            """Writes its first bytes beyond `halves` in two parts, and comes by in between."""
            half = False

            def write(self, content):
                content = memoryview(content).cast("B")
                if self.half or self.tell() + len(content) <= hooks.halves:
                    return super().write(content)
                self.half = True
                first = super().write(content[:len(content) // 2])
                self.flush()
                hooks.at(hooks.name, "half written")
                return first + super().write(content[len(content) // 2:])

        def hooked_open(path, mode):
            if mode != "xb":
                return open(path, mode)
            hooks.name = Path(path).name[1:].rsplit(".", 2)[0]  # of .NAME.RANDOM.tmp
            return Writer(io.FileIO(path, "x"))

        def hooked_fsync(file):
            hooks.at(hooks.name, "written")
            fsync(file)
            hooks.at(hooks.name, "on the disk")

        def hooked_replace(source, target):
            replace(source, target)
            hooks.at(Path(target).name, "renamed")

        files.open, os.fsync, os.replace = hooked_open, hooked_fsync, hooked_replace
        draw_batch, losses = train.draw_batch, Validation.losses
        save_checkpoint, write_report = checkpoint.save_checkpoint, train.write_report

        def hooked_draw_batch(step, *args):
            self.enter(f"step {step + 1}")
            self.at("step", str(step + 1))
            return draw_batch(step, *args)

        def hooked_losses(*args):
            self.enter(f"validation at {self.phase}")
            return losses(*args)

        def hooked_write_report(out, history, *args):
            self.enter(f"report at step {history[-1]['step']}")
            write_report(out, history, *args)
            self.enter(f"step {history[-1]['step']}")

        def hooked_save_checkpoint(path, state):
            self.enter(f"save at step {state['step']}")
            save_checkpoint(path, state)
            self.enter(f"step {state['step']}")

        train.draw_batch, Validation.losses = hooked_draw_batch, hooked_losses
        checkpoint.save_checkpoint, train.write_report = hooked_save_checkpoint, hooked_write_report
        if self.defect:
            self.defect()


def child(flags, hooks, log):
    """Runs train.py as its last line would, and ends this process."""
    code = 70
    try:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        hooks.install()
        hooks.enter("start-up")
        sys.argv = ["train.py", *map(str, flags)]
        run(train.main)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ----------------------------------------------------------------------------------------------------------------------
# In the parent

@dataclasses.dataclass
class Attempt:
    killed: bool
    where: str  # what it was doing at its end
    seconds: float


def attempt(out, flags, delay=math.inf, **hooks):
    """One run of train.py in a child, which goes on from a checkpoint if there is one; SIGKILL after `delay` seconds.

    Raises:
        Broken: it ended by itself, and not well.
    """
    flags = [*RUN, "--out", out, *flags, "--resume" if (out / "checkpoint.pt").exists() else "--overwrite"]
    where = mmap.mmap(-1, 120)
    where[:] = b"start-up".ljust(len(where))
    with tempfile.TemporaryFile() as log:
        sys.stdout.flush()
        began = time.monotonic()
        pid = os.fork()
        if pid == 0:
            child(flags, Hooks(where, **hooks), log)
        pid_now = status = 0
        while not pid_now and time.monotonic() - began < min(delay, 60):
            pid_now, status = os.waitpid(pid, os.WNOHANG)
            time.sleep(0.002)
        if not pid_now:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
        log.seek(0)
        said = log.read().decode()
    seconds = time.monotonic() - began
    if delay > 60 and seconds > 60:
        raise Broken(f"it hangs at {where[:].decode().strip()}")
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
        raise Broken(f"it failed: {said.strip()}")
    return Attempt(os.WIFSIGNALED(status), where[:].decode().strip(), seconds)


def table(out):
    """The rows of metrics.csv, none if there is none yet.

    Raises:
        Broken: a line is torn, a step comes twice or is missing.
    """
    if not (out / "metrics.csv").exists():
        return []
    content = (out / "metrics.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(content, newline=""), strict=True))
    if not content.endswith("\n") or any(None in row or None in row.values() for row in rows):
        raise Broken(f"metrics.csv has a torn line: {content[-100:]!r}")
    steps = [int(row["step"]) for row in rows]
    if not rows or steps != REPORTS[:len(steps)] or not all(math.isfinite(float(x)) for row in rows
                                                             for x in row.values()):
        raise Broken(f"metrics.csv has the steps {steps}")
    return rows


def saved_step(out, before):
    """The step of the checkpoint, -1 if there is none yet, after a look at all that a kill may have damaged.

    Raises:
        Broken: a file is damaged, or the checkpoint is older than that of step `before`, which was on the disk.
    """
    try:
        step = checkpoint.load_checkpoint(out / "checkpoint.pt")["step"] if (out / "checkpoint.pt").exists() else -1
        table(out)
        if (out / "settings.json").exists():
            json.loads((out / "settings.json").read_text())
    except ValueError as error:
        raise Broken(str(error)) from None
    if step < before:
        raise Broken(f"the checkpoint of step {before} is gone; there is one of step {step}")
    return step


def result(out):
    """All that a finished run leaves, as one dict: the checkpoint's entries, metrics.csv, the other files' bytes."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    content = checkpoint.load_checkpoint(out / "checkpoint.pt")
    del files["checkpoint.pt"], files["metrics.csv"]  # which hold what the clock said
    return {**content, "metrics.csv": table(out), "files": files}


def differences(a, b, name=""):
    """The names of all entries that are not equal, bit for bit, what the clock said aside."""
    if type(a) is not type(b):
        return [name]
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        return [f"{name}.{key}".lstrip(".") for key in a.keys() ^ b.keys()] + [
            each for key in a.keys() & b.keys() - CLOCK
            for each in differences(a[key], b[key], f"{name}.{key}".lstrip("."))]
    return [] if a == b else [name]


@contextlib.contextmanager
def small_world():
    """train.py on the first digits alone, with small grids and a quick plot that is the same each time: here and in all
    children. Yields a folder for their runs."""
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0  # or it starts a thread
    # Its own lock is a semaphore that all forks share: a child killed while it had it would stop all later ones.
    tqdm.set_lock(threading.RLock())
    digits = {train_set: tuple(x[:n].clone() for x in load_dataset("MNIST", ROOT / "data", train=train_set))
              for train_set, n in [(True, 60), (False, 16)]}
    DATASETS["MNIST"] = lambda root, train: digits[train]
    draw = train.draw
    train.draw = lambda model, n, **settings: draw(model, 4, steps=2, **settings)
    pictures.plot_losses = lambda file, history, curve: file.write(
        repr([[row["train_loss"] for row in history], curve]).encode())
    with tempfile.TemporaryDirectory() as folder:  # all that is imported or set up at its first use
        for flags in ["--max-steps", 5], ["--max-steps", 6, "--resume"]:
            call(train, *RUN, *flags, "--out", folder)
    threads = Path("/proc/self/task")
    if threads.is_dir() and len(list(threads.iterdir())) > 1:
        raise RuntimeError("this process has threads, which a fork would lose")
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# ----------------------------------------------------------------------------------------------------------------------

def survive(folder, kills, dice, straight, length):
    """Runs train.py to its end, killed on the way, as often as it takes until there were so many kills.

    Args:
        straight: the result of an uninterrupted run.
        length: how long one takes, in seconds, by the pause of its hooks.
    Raises:
        Broken: see saved_step; or a run ended otherwise than the uninterrupted one.
    """
    hits, done, runs = collections.Counter(), 0, 0
    while done < kills:
        runs += 1
        out, before = folder / f"run{runs}", -1
        allowed = min(dice.randint(3, 8), kills - done)  # of this run, which is then left alone
        while True:
            flags = ["--save-every", dice.choice((1, 2, 3, 7))]
            how = {"halves": dice.choice((0, 1000, 300_000))}
            if not allowed:
                text = ""
            elif dice.random() < 0.5:
                how["pause"] = dice.choice(list(length))
                left = length[how["pause"]] * (1 - max(before, 0) / STEPS)
                how["delay"] = dice.uniform(0, left + 0.05)
                text = f"after {how['delay']:.3f} s"
            else:
                name = dice.choices(FILES, (4, 2, 1, 1, 1))[0]
                how["target"] = name, dice.choice(MOMENTS), 1 if name not in FILES[:2] else dice.randint(1, 3)
                text = "at a named moment"
            end = attempt(out, flags, **how)
            before = saved_step(out, before)
            if not end.killed:
                break
            done, allowed = done + 1, allowed - 1
            hits[end.where.split()[0].strip(":")] += 1
            print(f"kill {done:3}  run {runs:2}  --save-every {flags[1]}  {text:17}  in {end.where}; "
                  + (f"goes on from step {before}" if before >= 0 else "starts anew"))
        different = differences(result(out), straight)
        if different:
            raise Broken(f"run {runs} ended otherwise than the uninterrupted one: {', '.join(different)}")
    print(f"{done} kills, " + ", ".join(f"{count} in {name}" for name, count in hits.most_common()))
    print(f"{runs} runs ended as the uninterrupted one did")


def on_resume(change):
    """A defect: what comes out of the checkpoint is changed."""
    def install():
        load = checkpoint.load_run
        checkpoint.load_run = lambda path: change(load(path))
    return install


def forget_optimizer():
    torch.optim.Optimizer.load_state_dict = lambda optimizer, state: None


def write_in_place():
    @contextlib.contextmanager
    def write(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with files.open(Path(path).parent / f".{Path(path).name}.0.tmp", "xb") as file:
            os.rename(file.raw.name, path)
            yield file

    checkpoint.atomic_write = files.atomic_write = pictures.atomic_write = write


def append_metrics():
    def report(out, history, *args):
        with open(out / "metrics.csv", "a", newline="") as file:
            writer = csv.DictWriter(file, history[0].keys(), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(history[-1])

    train.write_report = report


RENAMED = ("checkpoint.pt", "renamed", 3)  # with --save-every 3: at step 9, four steps after a report
# name: (where it is killed, the defect, what must be noticed). Those with RENAMED do nothing until the run goes on.
CONTROLS = {
    "EMA not restored": (RENAMED, on_resume(lambda state: state | {"ema": state["model"]}), "ema."),
    "optimiser not restored": (RENAMED, forget_optimizer, "optimizer."),
    "one step done twice": (RENAMED, on_resume(lambda state: state | {
        "step": state["step"] - 1, "curve": state["curve"][:-1],
        "since_report": state["since_report"] | {"steps": state["since_report"]["steps"] - 1}}), "model."),
    "sums since the last report lost": (RENAMED, on_resume(
        lambda state: state | {"since_report": state["since_report"] | {"sums": [0.0, 0.0, 0.0]}}), "train_loss"),
    "files written in place": (("checkpoint.pt", "half written", 2), write_in_place, "truncated or damaged"),
    "metrics.csv appended to": (("step", "12", 1), append_metrics, "metrics.csv has the steps [5, 10, 10"),
}


def controls(folder, straight):
    """Every defect must be noticed.

    Raises:
        Broken: one was not.
    """
    attempt(folder / "seed", ["--seed", 1])
    different = differences(result(folder / "seed"), straight)
    for part in "model.", "ema.", "optimizer.", "history.", "metrics.csv.":
        if not any(name.startswith(part) for name in different):
            raise Broken(f"a run with another seed has the same {part}")
    print("control: another seed: noticed")
    if not attempt(folder / "renamed", ["--save-every", 3], target=RENAMED).killed:
        raise RuntimeError(f"the run that several controls go on with was not killed at {RENAMED}")
    for name, (target, defect, words) in CONTROLS.items():
        out = folder / name.replace(" ", "-")
        noticed = ""
        try:
            if target == RENAMED:
                shutil.copytree(folder / "renamed", out)
            elif not attempt(out, ["--save-every", 3], target=target, defect=defect, halves=1000).killed:
                raise RuntimeError(f"the control {name!r} was not killed at {target}")
            saved_step(out, -1)
            attempt(out, ["--save-every", 3], defect=defect)
            noticed = " ".join(differences(result(out), straight))
        except Broken as error:
            noticed = str(error)
        if words not in noticed:
            raise Broken(f"the control {name!r} was not noticed, only this: {noticed or 'nothing'}")
        print(f"control: {name}: noticed", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of --save-every")
    flags = parser.parse_args()
    with small_world() as folder:
        straight_run, slow_pause = attempt(folder / "straight", []), 0.01
        straight = result(folder / "straight")
        slow = attempt(folder / "slow", ["--save-every", 2], pause=slow_pause)
        try:
            different = differences(result(folder / "slow"), straight)
            if straight_run.killed or different:
                raise Broken(f"two uninterrupted runs differ: {', '.join(different)}")
            survive(folder, flags.kills, random.Random(flags.seed), straight,
                    {0.0: straight_run.seconds, slow_pause: slow.seconds})
            controls(folder, straight)
        except Broken as error:
            sys.exit(f"BROKEN: {error}")
    print("all well")


if __name__ == "__main__":
    main()
