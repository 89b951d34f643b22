"""A model, and a run, to a file and back. What a checkpoint holds is data and never code: utils/files.py reads it."""
import contextlib
import copy
import errno
import io
import math
import os
import pickle
import reprlib
from pathlib import Path

import torch

from ddpm import DDPM, exact_dtype
from diffusion_model import Model, build_network
from diffusion_schedules import make_betas
from utils.cli import UsageError, say
from utils.files import (
    atomic_write, files_of_a_run, lock_folder, read_tensors, remove_leftovers, write_json, write_tensors)
from utils.ranks import RANK, of_the_first
from utils.settings import OF_THE_DATA, SETTINGS, SHIPPED, settings_of_a_file

VERSION = 2


def save_checkpoint(path, state):
    """Writes a dict of tensors and plain Python values, atomically. The format version is added.

    Raises:
        ValueError: there is something in it that load_checkpoint would refuse.
    """
    content = write_tensors({"format": "ddpm-mnist", "version": VERSION, **state})
    with atomic_write(path) as file:
        file.write(content)


def load_checkpoint(path):
    """Reads what `save_checkpoint` wrote, onto the CPU. Nothing in the file is executed.

    Raises:
        FileNotFoundError, ValueError: with one line that says what is wrong with the file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}; " + (
            "it ships with the repo: restore it with git checkout" if path.resolve() == SHIPPED else
            "python train.py makes one, and sample.py without --checkpoint takes the one that ships with the repo"))
    if not path.is_file():
        raise ValueError(f"{path} is not a file; name one, such as the checkpoint.pt of a run")
    try:
        state = read_tensors(path)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values ({error}); it is not one of our checkpoints "
                         "and was not executed") from error
    except MemoryError:
        raise
    except Exception as error:  # zipfile and pickletools raise whatever comes up
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the drive, or the permissions
            error.filename = error.filename or str(path)
            raise
        raise ValueError(f"{path} is not a checkpoint, or only a part of one (it is truncated or damaged)") from error
    if not isinstance(state, dict) or state.get("format") != "ddpm-mnist":
        raise ValueError(f"{path} is a torch file, but not a checkpoint of this project")
    version = state.get("version")
    if type(version) is not int or version not in (1, VERSION):
        raise ValueError(f"{path} has format version {reprlib.repr(version)}; this code reads versions 1 and {VERSION}")
    return _from_version_1(state) if version == 1 else state


def _from_version_1(state):
    """Until November 2026 two layers and one entry had other names, and there was one network."""
    for name in {"model", "ema"} & state.keys():
        if isinstance(state[name], dict):
            state[name] = {key.replace("shrink.", "downsample.").replace("grow.", "upsample."): value
                           for key, value in state[name].items() if isinstance(key, str)}
    if "recent" in state:
        state |= {"since_report": state.pop("recent"), "lr": 0.0, "curve": []}
        with contextlib.suppress(Exception):  # what is wrong with them is found where they are used
            state["since_report"]["sums"].append(state["since_report"]["sums"][0])
            state["curve"] = [[row["step"], row["train_loss"]] for row in state["history"]][:Progress.MOST_POINTS - 1]
    if isinstance(state.get("settings"), dict):
        state["settings"] = {"network": "unet"} | state["settings"]
    return state


# ----------------------------------------------------------------------------------------------------------------------
# A model

def load_model(path=SHIPPED, device="cpu", ema=True, precision="fp32"):
    """A Model in eval mode, with the EMA weights of a checkpoint, or the last raw ones. (Early network: always EMA.)

    Raises:
        FileNotFoundError, ValueError: with one line that says what is wrong with the file.
    """
    state = load_checkpoint(path)
    settings = settings_of_a_file(path, state.get("settings"))
    if (weights := state.get("ema" if ema else "model")) is None:
        raise ValueError(f"{path} has no {'EMA' if ema else 'raw'} weights"
                         + ("" if ema else "; it ships for sampling, leave --no-ema out"))
    steps = state.get("step")
    if steps is not None and (type(steps) is not int or steps < 0):
        raise ValueError(f"{path}: no run is at step {reprlib.repr(steps)}")
    ddpm = DDPM(make_betas(settings["schedule"], settings["timesteps"]))
    early, network = (None if tensors is None else restore_network(path, settings, tensors, device).eval()
                      for tensors in (state.get("early"), weights))
    return Model(network, ddpm, settings, precision, steps, early)


def take_weights(network, path):
    """Gives a network the EMA weights of a checkpoint, where names and shapes are the same, and says which are not.

    Raises:
        FileNotFoundError, ValueError: as load_checkpoint; one is not finite, or none of them fits.
    """
    theirs, ours, learned = load_checkpoint(path).get("ema"), network.state_dict(), dict(network.named_parameters())
    taken = {name: checked_tensor(path, name, value, ours[name], infinite=name not in learned)
             for name, value in (theirs.items() if isinstance(theirs, dict) else ())
             if name in ours and getattr(value, "shape", None) == ours[name].shape}
    if not taken:
        raise ValueError(f"no weight in {path} fits the network of this run")
    network.load_state_dict(taken, strict=False)
    if RANK == 0:
        new = ", ".join(sorted(ours.keys() - taken.keys())) or "none"
        say(f"weights     {len(taken)} of {len(ours)} tensors from {path}; new are: {new}")


def restore_network(path, settings, weights, device):
    """The network that `settings` describe, with `weights` (name -> tensor), on the device. Raises as check_weights."""
    weights = check_weights(path, settings, weights, os.path.getsize(path))
    with torch.random.fork_rng(devices=[]):
        network = build_network(settings)
    network.load_state_dict(weights)
    return network.to(device, memory_format=torch.channels_last)


def check_weights(path, settings, weights, size=math.inf):
    """`weights` (name -> tensor) as the network that `settings` describe has them, in its types.

    Args:
        size: bytes of the file they came from, which a network must not be larger than.
    Raises:
        ValueError: there is no such network, names or shapes are not its own, or a weight is not a finite number.
    """
    try:
        with torch.device("meta"):  # shapes without memory: settings may claim a network far larger than the file
            network = build_network(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except Exception:  # its constructor looks at the numbers in a tensor, which are not there
        with torch.random.fork_rng(devices=[]):
            network = build_network(settings)
    expected, learned = network.state_dict(), {name for name, _ in network.named_parameters(remove_duplicate=False)}
    # In half precision, at least; a tensor may claim more than the file holds.
    least = sum(min(2, value.itemsize) * value.numel() for value in expected.values())
    if not isinstance(weights, dict) or weights.keys() != expected.keys() or least > size:
        raise ValueError(f"{path}: its weights do not fit its network; train.py --init begins with those that do")
    return {name: checked_tensor(path, name, value, expected[name], infinite=name not in learned)
            for name, value in weights.items()}


def checked_tensor(path, name, value, like, infinite=False):
    """`value`, which a checkpoint has as `name`, of the type that `like` has and in memory of its own.

    Raises:
        ValueError: it is not a tensor of that shape and kind, or not finite.
    """
    if not isinstance(value, torch.Tensor) or value.shape != like.shape:
        raise ValueError(f"{path}: {name} is not a tensor of shape {tuple(like.shape)}")
    if value.dtype != like.dtype and not (like.dtype.is_floating_point and value.dtype.is_floating_point):
        raise ValueError(f"{path}: {name} is of type {value.dtype}, and should be of {like.dtype}")
    value = value.detach().to(like.dtype).clone()  # in a file two tensors may share one memory, or one repeat a number
    if value.isnan().any() or not (infinite or value.isfinite().all()):  # a buffer may be a mask of -infinity
        raise ValueError(f"{path}: {name} holds NaN or infinite numbers")
    return value


# ----------------------------------------------------------------------------------------------------------------------
# A run

PARTS = {"settings", "model", "ema", "optimizer", "step", "seconds", "lr", "history", "since_report", "curve"}
# What a report consists of, in this order in metrics.csv.
COLUMNS = ("step", "epoch", "train_loss", "validation_loss", "validation_loss_q1", "validation_loss_q2",
           "validation_loss_q3", "validation_loss_q4", "lr", "grad_norm", "images_per_second", "seconds")


class Progress:
    """Where a run stands: what, besides weights and optimizers, has to survive an interruption.

    Attributes:
        checkpoint: the path of the run's checkpoint.
        step: number of steps made.
        seconds: time spent.
        lr: learning rate of the last step.
        history: the reports so far, each a dict by COLUMNS.
        since_report: the number of steps since the last report, and the seconds they took.
        curve: of the training loss, for the plot: lists of a step and the mean loss since the one before.
        sums: of loss and gradient norm since the last report, and of the loss since the curve's last point, on the
            device; looking at them has a GPU wait.
    """
    MOST_POINTS = 80  # of the curve; then each two become one, so that from step 40 on there are 40 to 79

    def __init__(self, device, checkpoint=None):
        self.checkpoint = checkpoint
        self.step, self.seconds, self.lr, self.history, self.curve = 0, 0.0, 0.0, [], []
        self.since_report = {"steps": 0, "seconds": 0.0}
        self.sums = torch.zeros(3, device=device, dtype=exact_dtype(device))

    def add(self, loss, grad_norm):
        """Adds up loss and gradient norm, tensors without dimensions, of the step at hand. Raises as check_finite."""
        self.sums += torch.stack([loss, grad_norm, loss])
        self.since_report["steps"] += 1
        if self.sums.device.type == "cpu" or self.step % 100 == 0:  # a GPU would have to wait for the numbers
            self.check_finite()

    def advance(self):
        """Ends a step."""
        self.step += 1
        spacing = self.curve[0][0] if self.curve else 1  # of the curve's points, in steps
        if self.step % spacing == 0:
            before = self.curve[-1][0] if self.curve else 0
            self.curve.append([self.step, self.sums[2].item() / (self.step - before)])
            self.sums[2] = 0
            if len(self.curve) == self.MOST_POINTS:
                self.curve = [[step, (loss + other) / 2]
                              for (_, loss), (step, other) in zip(self.curve[::2], self.curve[1::2])]

    def means(self):
        """Mean loss and gradient norm since the last report, two floats."""
        return (self.sums[:2] / self.since_report["steps"]).tolist()

    def check_finite(self):
        """Raises RuntimeError if a loss or gradient was NaN or infinite. The checkpoint is from before."""
        if not torch.isfinite(self.sums).all():
            path = self.checkpoint
            saved = f"{path} is from before and sound" if path.exists() else "nothing was saved yet"
            raise RuntimeError(f"loss or gradient became NaN or infinite near step {self.step}; {saved}. Start a new "
                               "run with a lower --lr or --clip-norm (--resume keeps the old ones)")

    def report(self, losses, batch_size, n):
        """Adds a report to the history, and starts to sum anew.

        Args:
            losses: the validation loss over each quarter of the timesteps.
            n: images in an epoch.
        Raises:
            RuntimeError: as check_finite.
        """
        self.check_finite()
        loss, grad_norm = self.means()
        self.history.append({
            "step": self.step, "epoch": self.step * batch_size / n, "train_loss": loss,
            "validation_loss": sum(losses) / 4, **{f"validation_loss_q{i}": q for i, q in enumerate(losses, 1)},
            "lr": self.lr, "grad_norm": grad_norm,
            "images_per_second": self.since_report["steps"] * batch_size / self.since_report["seconds"],
            "seconds": self.seconds})
        self.since_report = {"steps": 0, "seconds": 0.0}
        self.sums[:2] = 0

    def unreported(self, total, minutes=None):
        """The share of the run since the last report; the whole run has `total` steps or takes `minutes`."""
        last = self.history[-1] if self.history else {"step": 0, "seconds": 0}
        return (self.seconds - last["seconds"]) / (60 * minutes) if minutes else (self.step - last["step"]) / total

    def state_dict(self):
        """What a checkpoint keeps of it."""
        return {"step": self.step, "seconds": self.seconds, "lr": self.lr, "history": self.history, "curve": self.curve,
                "since_report": self.since_report | {"sums": self.sums.tolist()}}

    def load_state_dict(self, path, state):
        """Takes over what the checkpoint at `path` keeps.

        Raises:
            ValueError: a run cannot be in this state.
        """
        def count(value, low=0, high=1e30):
            return type(value) in (int, float) and low <= value <= high

        step, seconds, lr, history, since, curve = (state[name] for name in (
            "step", "seconds", "lr", "history", "since_report", "curve"))
        if type(step) is not int or not 0 <= step <= 10**12 or not count(seconds) or not count(lr) \
                or (seconds and not step):
            raise ValueError(f"{path}: no run is at step {reprlib.repr(step)} after {reprlib.repr(seconds)} seconds")
        if not isinstance(history, list) or not all(isinstance(row, dict) and row.keys() == set(COLUMNS)
                                                    and all(map(count, row.values())) for row in history):
            raise ValueError(f"{path}: its history is not a list of reports")
        steps = step - (history[-1]["step"] if history else 0)
        if not isinstance(since, dict) or type(since.get("steps")) is not int or since["steps"] != steps or steps < 0:
            raise ValueError(f"{path}: the number of steps since its last report is wrong")
        sums = since.get("sums")
        if not count(since.get("seconds"), low=1e-9 if steps else 0) or not isinstance(sums, list) or len(sums) != 3 \
                or not all(map(count, sums)):
            raise ValueError(f"{path}: its sums since the last report are not numbers")
        if not isinstance(curve, list) or len(curve) >= self.MOST_POINTS or not all(
                isinstance(point, list) and len(point) == 2 and type(point[0]) is int and 0 < point[0] <= step
                and count(point[1]) for point in curve):
            raise ValueError(f"{path}: its curve is not a list of steps and losses")
        self.step, self.seconds, self.lr, self.history, self.curve = step, seconds, lr, history, curve
        self.since_report = {"steps": steps, "seconds": since["seconds"]}
        self.sums.copy_(torch.tensor(sums, dtype=self.sums.dtype))


@contextlib.contextmanager
def run_folder(out, resume, overwrite, init):
    """Context in which the folder of a run is locked for others. Of several processes the first alone looks into it.

    Yields:
        the state of the run that is resumed, as load_run, in all processes; None for a new run.
    Raises:
        FileNotFoundError, ValueError, RuntimeError: it does not hold what it should, another run is at work in it, or
            `init`, the checkpoint that the run begins with, would be overwritten.
    """
    if RANK:
        yield of_the_first(None)
        return
    checkpoint = out / "checkpoint.pt"
    if resume and not checkpoint.exists():
        raise FileNotFoundError(f"no checkpoint at {checkpoint} to resume; leave --resume out, or try another --out")
    with lock_folder(out):
        if files_of_a_run(out) and not resume and not overwrite:
            go_on = "continue it with --resume, " if checkpoint.exists() else ""  # it was killed before its first save
            raise ValueError(f"{out} already holds a run; {go_on}start over with --overwrite, or choose another --out")
        if init and Path(init).resolve() in (path.resolve() for path in files_of_a_run(out)):
            raise UsageError(f"--overwrite would delete {init}, which --init begins with; choose another --out")
        # All other files have the same name in every run, so that atomic_write finds what a killed one left of them.
        remove_leftovers(out / "samples", "step_*.png")
        yield of_the_first(load_run(checkpoint) if resume else None)


def save_run(settings, progress, network, ema, optimizers):
    """Writes the checkpoint of a run, and its settings beside it.

    Raises:
        RuntimeError: its loss or gradient was NaN or infinite. Then what was saved before is left.
    """
    progress.check_finite()
    write_json(progress.checkpoint.parent / "settings.json", settings)
    save_checkpoint(progress.checkpoint, _state_of_a_run(settings, progress, network, ema, optimizers))


def _state_of_a_run(settings, progress, network, ema, optimizers):
    return {"settings": settings, **progress.state_dict(), "model": network.state_dict(),
            "ema": ema.network.state_dict(), "early": ema.early and ema.early.state_dict(),
            "optimizer": [state_of(optimizer) for optimizer in optimizers]}


def load_run(path):
    """The state of a run to go on from, from its checkpoint.

    Raises:
        FileNotFoundError, ValueError: with one line that says what is wrong with the file.
    """
    state = load_checkpoint(path)
    if missing := PARTS - state.keys():
        raise ValueError(f"{path} is for sampling only: it lacks {', '.join(sorted(missing))}")
    state["settings"] = settings_of_a_file(path, state["settings"], [*SETTINGS, *OF_THE_DATA])
    check_weights(path, state["settings"], state["model"], os.path.getsize(path))  # before it is built at that size
    return state


def restore_run(path, state, settings, progress, network, ema, optimizers):
    """Fills the parts of a run from `state`, the checkpoint at `path`.

    Raises:
        ValueError: one of them is not sound, or not of this run.
    """
    if (classes := state.get("settings", settings)["classes"]) != settings["classes"]:
        raise ValueError(f"{path} was trained on {classes} classes, and {settings['dataset']} has "
                         f"{settings['classes']} now; start another run with another --out")
    progress.load_state_dict(path, state)
    network.load_state_dict(check_weights(path, settings, state["model"]))
    ema.network.load_state_dict(check_weights(path, settings, state["ema"]))
    if state.get("early") is not None:
        ema.early = copy.deepcopy(ema.network)
        ema.early.load_state_dict(check_weights(path, settings, state["early"]))
    restore_optimizers(path, optimizers, state["optimizer"], progress.step, network, settings)


def rehearse(settings, network, optimizers):
    """Takes a step with copies of network and optimizers, saves them to memory, and restores them: what cannot be saved
    or restored is found before a run and not at its end. Raises ValueError, which says what it is."""
    before = [dict(group) for optimizer in optimizers for group in optimizer.param_groups]
    network, optimizers = after_a_step(network, optimizers, settings)
    for old, new in zip(before, (group for optimizer in optimizers for group in optimizer.param_groups)):
        if changed := [name for name in new if type(new[name]) in (int, float, bool) and new[name] != old.get(name)]:
            raise ValueError(f"an optimizer counts {', '.join(changed)} in its param_groups, which a checkpoint does "
                             "not keep; let it count in its state")
    progress = Progress(torch.device("cpu"))
    progress.step, progress.since_report = 1, {"steps": 1, "seconds": 1.0}
    ema = Model(network, None, settings)
    state = read_tensors(io.BytesIO(write_tensors(_state_of_a_run(settings, progress, network, ema, optimizers))))
    restore_run("a checkpoint of this run", state, settings, progress, network, ema, optimizers)


def after_a_step(network, optimizers, settings):
    """Copies of network and optimizers after a step, whose gradient is that of blank images."""
    network, optimizers = copy.deepcopy((network, optimizers))
    device, size = next(network.parameters()).device, settings["image_size"]
    t = torch.zeros(min(2, settings.get("batch_size", 2)), dtype=torch.long, device=device)
    x = torch.zeros(len(t), settings["image_channels"], size, size, device=device)
    out = network.train()(x, t, t)
    network(x, t, None)  # samples ask for no label, too
    if out.shape != x.shape:
        raise ValueError(f"the network makes {list(out.shape)} of images {list(x.shape)}; it must keep the shape")
    out.sum().backward()
    for p in network.parameters():
        if p.requires_grad and p.grad is None:  # what is not used yet may be later
            p.grad = torch.zeros_like(p)
    for optimizer in optimizers:
        optimizer.step()
    return network, optimizers


def state_of(optimizer):
    """What a checkpoint keeps of an optimizer: an entry for each weight, empty if it has had no gradient yet."""
    state = optimizer.state_dict()
    return {"state": {i: {} for group in state["param_groups"] for i in group["params"]} | state["state"]}


def restore_optimizers(path, optimizers, saved, step, network, settings):
    """Fills the optimizers, of any kind, with the state that `saved`, the checkpoint's list of theirs, holds. All else
    about them, the learning rate for one, follows from the settings.

    Raises:
        ValueError: they are not those of its weights after `step` steps.
    """
    if not isinstance(saved, list) or len(saved) != len(optimizers):
        raise ValueError(f"{path}: its optimizers are not those of its settings")
    likes = after_a_step(network, optimizers, settings)[1]  # of which the names and shapes are those to expect
    for optimizer, like, state in zip(optimizers, likes, saved):
        moments = state.get("state") if isinstance(state, dict) else None
        expected = state_of(like if step else optimizer)["state"]  # some have one before the first step
        if not isinstance(moments, dict) or moments.keys() != expected.keys():
            raise ValueError(f"{path}: its optimizers are those of another network")
        loaded = {}
        for i, entry in expected.items():
            if moments[i] == {}:
                continue
            if not isinstance(moments[i], dict) or moments[i].keys() != entry.keys():
                raise ValueError(f"{path}: its optimizers are not those of its settings")
            for name, wanted in entry.items():
                value, place = moments[i][name], f"{name} {i} of an optimizer"
                if isinstance(wanted, torch.Tensor):
                    value = checked_tensor(path, place, value, wanted)
                elif type(value) is not type(wanted) or value != value:
                    raise ValueError(f"{path}: {place} is {reprlib.repr(value)}")
                loaded.setdefault(i, {})[name] = value
                if name in ("step", "exp_avg_sq") and (torch.as_tensor(value) < 0).any():
                    raise ValueError(f"{path}: {place} is below 0")
        optimizer.load_state_dict({"state": loaded, "param_groups": optimizer.state_dict()["param_groups"]})
