"""Trains a diffusion model: python train.py. With no flags it learns MNIST.

The story: read the settings, load the images, build network and optimiser (or take them from a checkpoint), then step
by step draw a batch, timesteps and noise, follow the gradient of the loss, and now and then save and report.

Every random number is a function of (seed, step): nothing about the random state needs saving, and a run that was
interrupted and resumed ends with the same weights, bit for bit, as one that was not (on a CPU with the same number of
threads; on a GPU, whose kernels may add up in any order, nearly).
"""
import argparse
import copy
import csv
import functools
import io
import json
import math
import reprlib
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import (Model, atomic_write, build_network, check_settings, load_checkpoint, lock_folder, plain_tensor,
                        remove_leftovers, restore_network, save_checkpoint)
from cli import Parser, generate, has_bf16, integer, keep_memory, known_classes, number, path, pick_device, run
from data import DATASETS, enlarge, load_dataset, make_grid, save_png, to_float, to_uint8
from ddpm import DDPM, stream_seed
from diffusion_model import drop_labels
from diffusion_schedules import SCHEDULES, make_betas
from muon import Muon

LR_ADAMW = 2e-3  # what the shipped model was trained with

# What a run of few minutes on a CPU takes by default, instead of a width of 128 and 64 images a step: in so little time
# many small steps of a small network do more than few large ones. Frechet distance and share of digits read with
# confidence (two cores with AVX2; one run each; guidance 1.75, after half an hour 1.5):
#     width, images a step   after 1 minute, 1,000 samples   5 minutes, 2,000 samples     30 minutes, 2,000 samples
#     128    64                137 steps   5.11, 58 %          596 steps   0.170, 98 %
#     128    32                220 steps   3.09, 71 %
#      96    64                206 steps   2.18, 79 %
#      96    32                                              1,845 steps   0.128, 98 %
#      64    64                404 steps   0.90, 92 %
#      64    32                724 steps   0.58, 92 %        3,308 steps   0.117, 98 %    18,887 steps   0.068, 99 %
# With guidance 2.5 the last was at 0.36 after a minute; with 16 images a step at 0.53, with learning rates of 3e-3 and
# 8e-3 at 0.40 and 0.39, and with a width of 48 at 0.28. The width of 128 catches up after a quarter of an hour or more:
# 1,875 steps of 64 came to 0.076.
FEW_MINUTES, SMALL = 30, {"width": 64, "batch_size": 32}

# How often a timestep is drawn, and how much its loss, that of the noise, counts then: both in proportion to powers of
# alpha_bar_t. (0, 0) is L_simple. That weights the error of v by alpha_bar_t, and so makes little of the noisy
# timesteps, where a digit is decided; (0, -1) would make up for all of it. Their middle, (0, -0.5), was best of the
# three: after 1,500 steps Frechet distance 1.9, against 2.5 and 2.4. But it is wasteful to draw often what counts
# little. Draw it less often instead: after 600 steps with Muon, and a warm-up of 50, (0, -0.5) ended at 0.46 and a
# validation loss of 0.0248, (0.5, -1), which is the same in expectation, at 0.44 and 0.0243, (0.25, -1) at 0.38 and
# 0.0245. With a warm-up of 200: 0.51, 0.51, 0.42. (2,000 samples with guidance 1.25, one run each.)
WEIGHTINGS = {"v": (0.25, -1), "balanced": (0, -0.5), "simple": (0, 0)}

# The settings of a run, with their defaults. They are stored in its checkpoint; --resume takes them from there.
# name: (default, type or choices, help)
SETTINGS = {
    "dataset": ("MNIST", DATASETS, "what to learn; all but MNIST are downloaded by torchvision"),
    "epochs": (45, integer(1, 1_000_000), "passes over the images; the learning rate falls to 0 over all of them"),
    "minutes": (None, number(0.01, 1e6), "train for this time instead of --epochs: the learning rate falls to 0 over "
                "it. How far a run gets depends on the machine, so it is not reproducible bit for bit"),
    "batch_size": (64, integer(1, 100_000), "images per step; with --minutes up to "
                   f"{FEW_MINUTES} on a CPU by default {SMALL['batch_size']}"),
    "optimizer": ("muon", ("muon", "adamw"), "muon: Muon for the weights inside the network, AdamW for the others; "
                  "adamw: AdamW for all"),
    "lr": (5e-3, number(1e-9, 10), f"peak learning rate; with --optimizer adamw by default {LR_ADAMW}"),
    "warmup": (50, integer(0, 1_000_000), "steps over which the learning rate rises to its peak"),
    "weight_decay": (0.01, number(0, 10), "of the optimizer"),
    "clip_norm": (1.0, number(1e-6, 1e6), "longest gradient; longer ones are shortened to it"),
    "ema": (0.999, number(0, 0.999999), "decay of the moving average of the weights"),
    "label_dropout": (0.1, number(0, 1), "share of images trained without their label, for --guidance; "
                      "1: the model will know no labels"),
    "weighting": ("v", tuple(WEIGHTINGS), "of the timesteps in the loss. simple: L_simple, every t alike; balanced: "
                  "L_simple times alpha_bar_t^(-1/2); v: the error of v, with t drawn in proportion to "
                  "alpha_bar_t^(1/4)"),
    "schedule": ("linear", tuple(SCHEDULES), "table of betas"),
    "timesteps": (1000, integer(1, 100_000), "T"),
    "width": (128, integer(3, 1024), "channels of the UNet at its coarser level; with --minutes up to "
              f"{FEW_MINUTES} on a CPU by default {SMALL['width']}"),
    "depth": (6, integer(1, 64), "residual blocks of the UNet at its coarser level"),
    "precision": ("auto", ("auto", "fp32", "bf16"), "of convolutions and matrix products in training. auto: bf16 where "
                  "the processor computes in it, else fp32; weights and everything else are fp32 always"),
    "seed": (0, integer(0, 2**32 - 1), "of weights, batches, timesteps and noise"),
    "report_every": (2000, integer(1, 10_000_000), "steps between reports: validation loss, metrics.csv, plot, grid"),
}
# These may change when a run is resumed; the others would make it another run.
MAY_CHANGE = {"epochs", "minutes", "report_every"}
# What a report consists of, in this order in metrics.csv.
COLUMNS = ("step", "epoch", "train_loss", "validation_loss", "validation_loss_q1", "validation_loss_q2",
           "validation_loss_q3", "validation_loss_q4", "lr", "grad_norm", "images_per_second", "seconds")


def parse_flags():
    """The command line -> (namespace of the flags that are no settings, dict of the settings given explicitly)."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=path, metavar="DIR",
                        help="where the run goes; default: runs/ and the data set's name in small letters")
    parser.add_argument("--data", type=path, default="data", metavar="DIR",
                        help="where the images are unpacked or downloaded")
    parser.add_argument("--resume", action="store_true", help="go on from checkpoint.pt in --out")
    parser.add_argument("--overwrite", action="store_true", help="start anew over a run that is already in --out")
    parser.add_argument("--max-steps", type=integer(1, 10**12), metavar="N",
                        help="stop after N steps in all; the learning rate still follows --epochs, so that --resume "
                        "can go on as if it had never stopped")
    parser.add_argument("--save-every", type=integer(1, 10**12), default=1000, metavar="N",
                        help="steps between checkpoints")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                        help="where to compute; auto: CUDA, else MPS, else the CPU")
    group = parser.add_argument_group("settings of the run")
    for name, (default, kind, text) in SETTINGS.items():
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind, "metavar": "N"}
        group.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS,
                           help=text + (f" (default: {default})" if default is not None else ""), **how)
    flags = parser.parse_args()
    given = {name: getattr(flags, name) for name in SETTINGS if hasattr(flags, name)}
    if "minutes" in given and ("epochs" in given or flags.max_steps):
        parser.error("--minutes sets the length of the run; leave out --epochs and --max-steps")
    if flags.resume and flags.overwrite:
        parser.error("--resume goes on with a run, --overwrite throws it away; choose one")
    return flags, given


def resumed_settings(path, state, given):
    """The settings of the run in `state`, with those given now that may change.

    Raises:
        ValueError: a setting given now differs from the run's and is not one that may change, or the file is not sound.
    """
    settings = state.get("settings")
    check_settings(path, settings)
    for name, (default, kind, _) in SETTINGS.items():
        value = settings.get(name)
        try:
            if isinstance(kind, tuple):
                valid = type(value) is str and value in kind
            else:
                valid = type(value) in (int, float) and kind(str(value)) == value or value is default is None
        except argparse.ArgumentTypeError:
            valid = False
        if not valid or name not in settings:
            raise ValueError(f"{path}: its setting {name} is {reprlib.repr(value)}, which no run has")
    if given.get("precision") == "auto":  # which the run has decided long ago
        given = {name: value for name, value in given.items() if name != "precision"}
    for name, value in given.items():
        if value != settings[name] and name not in MAY_CHANGE:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {value} differs from the {settings[name]} of the run in {path}; leave it out, or "
                             "start another run with another --out")
    if "epochs" in given:
        settings["minutes"] = None
    return {name: settings[name] for name in SETTINGS} | given


def check_progress(path, state):
    """Raises ValueError unless a run can stand where, by step, seconds, history and recent, the one in `state` does."""
    def count(value, low=0, high=1e30):
        return type(value) in (int, float) and low <= value <= high

    step, seconds, history, recent = (state[name] for name in ("step", "seconds", "history", "recent"))
    if type(step) is not int or not 0 <= step <= 10**12 or not count(seconds) or (seconds and not step):
        raise ValueError(f"{path}: no run is at step {reprlib.repr(step)} after {reprlib.repr(seconds)} seconds")
    if not isinstance(history, list) or not all(isinstance(row, dict) and row.keys() == set(COLUMNS)
                                                and all(map(count, row.values())) for row in history):
        raise ValueError(f"{path}: its history is not a list of reports")
    since = step - (history[-1]["step"] if history else 0)
    if not isinstance(recent, dict) or type(recent.get("steps")) is not int or recent["steps"] != since or since < 0:
        raise ValueError(f"{path}: it does not know its steps since the last report")
    sums = recent.get("sums")
    if not count(recent.get("seconds"), low=1e-9 if since else 0) or not isinstance(sums, list) or len(sums) != 2 \
            or not all(map(count, sums)):
        raise ValueError(f"{path}: what it counts since the last report are no numbers")


def make_optimizers(network, settings):
    """AdamW for all of the network, or Muon for the matrices inside it and AdamW for what is left: biases, and the
    layers at the ends, where image, time and label come in and the prediction goes out."""
    matrices = {name: p for name, p in network.named_parameters() if settings["optimizer"] == "muon" and p.ndim > 1
                and not name.startswith(("stem.", "out.", "time.", "label."))}
    others = [p for name, p in network.named_parameters() if name not in matrices]
    common = {"lr": settings["lr"], "weight_decay": settings["weight_decay"]}
    optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.99), fused=others[0].device.type != "mps", **common)]
    if matrices:
        optimizers.append(Muon(matrices.values(), **common))
    return optimizers


def restore_optimizers(path, optimizers, saved, step):
    """Fills the optimizers with the moments that `saved`, the checkpoint's list of their states, holds. All else about
    them, the learning rate for one, follows from the settings.

    Raises:
        ValueError: they are not those of its weights after `step` steps.
    """
    if not isinstance(saved, list) or len(saved) != len(optimizers):
        raise ValueError(f"{path}: its optimizers are not those of its settings")
    for optimizer, state in zip(optimizers, saved):
        weights, moments = optimizer.param_groups[0]["params"], state.get("state") if isinstance(state, dict) else None
        if not isinstance(moments, dict) or moments.keys() != set(range(len(weights) if step else 0)):
            raise ValueError(f"{path}: its optimizers are those of another network")
        restored = {}
        for i, weight in enumerate(weights if step else []):
            shapes = ({"momentum": weight.shape} if isinstance(optimizer, Muon) else
                      {"step": (), "exp_avg": weight.shape, "exp_avg_sq": weight.shape})
            if not isinstance(moments[i], dict) or moments[i].keys() != shapes.keys():
                raise ValueError(f"{path}: its optimizers are not those of its settings")
            restored[i] = {name: plain_tensor(path, f"{name} {i} of an optimizer", moments[i][name], shape)
                           for name, shape in shapes.items()}
            if any((restored[i][name] < 0).any() for name in ("step", "exp_avg_sq") if name in shapes):
                raise ValueError(f"{path}: its optimizers have squares below 0")
        optimizer.load_state_dict({"state": restored, "param_groups": optimizer.state_dict()["param_groups"]})


def main():
    flags, given = parse_flags()
    settings = {name: default for name, (default, _, _) in SETTINGS.items()}
    device = pick_device(flags.device)
    if given.get("optimizer") == "adamw":
        settings["lr"] = LR_ADAMW
    if device.type == "cpu" and given.get("minutes", math.inf) <= FEW_MINUTES:
        settings |= SMALL
    settings |= given
    out = Path(flags.out or Path("runs") / settings["dataset"].lower())
    checkpoint = out / "checkpoint.pt"
    if flags.resume and not checkpoint.exists():
        raise FileNotFoundError(f"no checkpoint at {checkpoint} to go on from; leave --resume out, or choose another "
                                "--out")
    keep_memory()
    with lock_folder(out):
        if checkpoint.exists() and not flags.resume and not flags.overwrite:
            raise ValueError(f"{out} already holds a run; go on with it by --resume, start anew by --overwrite, or "
                             "choose another --out")
        # All other files have the same name in every run, so that atomic_write finds what a killed one left of them.
        remove_leftovers(out / "samples", "step_*.png")
        state = None
        if flags.resume:
            state = load_checkpoint(checkpoint)
            settings = resumed_settings(checkpoint, state, given)
        train(flags, settings, state, out, checkpoint, device)


def draw_batch(step, images, labels, settings):
    """Everything random about a step, as a function of (seed, step): x0, labels, t and noise, on the images' device.

    The data is read as an endless row of shuffled epochs and a batch may span two, so that every image comes exactly
    once per epoch whatever the batch size.
    """
    seed, batch_size, device = settings["seed"], settings["batch_size"], images.device
    position = torch.arange(step * batch_size, (step + 1) * batch_size)
    epoch, index = position // len(images), position % len(images)
    chosen = torch.cat([shuffled(seed, e, len(images))[index[epoch == e]] for e in epoch.unique().tolist()]).to(device)

    generator = torch.Generator(device).manual_seed(stream_seed(seed, step, 1))
    x0 = to_float(images[chosen])
    y = drop_labels(labels[chosen], settings["label_dropout"], settings["classes"], generator)
    # u uniform in 0..1, one draw from each of B equal parts: the same expectation as B free draws, less variance.
    within = torch.rand(batch_size, generator=generator, device=device)
    u = (torch.arange(batch_size, device=device) + within) / batch_size
    # t is the first timestep up to which the shares sum to more than u. (Summed in float64, which MPS does not have.)
    sums = timestep_shares(settings["schedule"], settings["timesteps"], settings["weighting"]).cumsum(0)
    t = torch.searchsorted(sums.float().to(device), u, right=True).clamp(max=settings["timesteps"] - 1)
    noise = torch.randn(x0.shape, generator=generator, device=device)
    return x0, y, t, noise


@functools.lru_cache(maxsize=2)
def timestep_shares(schedule, timesteps, weighting):
    """How often each timestep is drawn: float64 [T], with a sum of 1."""
    shares = DDPM(make_betas(schedule, timesteps)).alpha_bars ** WEIGHTINGS[weighting][0]
    return shares / shares.sum()


@functools.lru_cache(maxsize=2)
def shuffled(seed, epoch, n):
    """The order of the n images in an epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(stream_seed(seed, epoch, 0)))


def cosine(progress):
    """The share of the peak learning rate at a share 0..1 of the run: half a cosine, from 1 to 0."""
    return (1 + math.cos(math.pi * progress)) / 2


class Validation:
    """L_simple on test images at fixed timesteps with fixed noise, so that one report compares with the next."""

    IMAGES = 2000

    def __init__(self, settings, root, device):
        images, labels = load_dataset(settings["dataset"], root, train=False)
        n = min(self.IMAGES, len(images))
        if not known_classes(settings):
            labels = torch.full_like(labels, settings["classes"])  # "no label", the only one that is trained
        self.images, self.labels = images[:n].to(device), labels[:n].to(device)
        self.t = torch.arange(n, device=device) * settings["timesteps"] // n  # spread over 0..T-1, in order

    @torch.no_grad()
    def losses(self, model):
        """The mean loss over each quarter of the timesteps, a list of 4 floats: from least to most noise."""
        generator = torch.Generator().manual_seed(0)
        losses = []
        for x, y, t in zip(self.images.split(100), self.labels.split(100), self.t.split(100)):
            noise = torch.randn(x.shape, generator=generator).to(x.device)
            losses.append(model.ddpm.loss(lambda x_t, t: model.denoiser(x_t, t, y), to_float(x), t, noise))
        return [quarter.mean().item() for quarter in torch.cat(losses).tensor_split(4)]


def write_report(out, history, model):
    """metrics.csv and loss.png from the history, and 64 samples of the model. All atomically."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, history[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    with atomic_write(out / "metrics.csv") as file:
        file.write(table.getvalue().encode())
    plot_losses(out / "loss.png", history)
    (_, process), = generate(model, 64, batch_size=64)
    for _, x, _ in process:
        pass
    save_png(out / "samples" / f"step_{history[-1]['step']:07d}.png", enlarge(make_grid(to_uint8(x)), 2))


def plot_losses(path, history):
    """Training and validation loss, and the latter by quarter of t, against the step."""
    import matplotlib  # imported here: it takes half a second
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
        steps = [row["step"] for row in history]
        left, right = figure.subplots(1, 2)
        left.plot(steps, [row["train_loss"] for row in history], label="training", marker=".")
        left.plot(steps, [row["validation_loss"] for row in history], label="validation (EMA weights)", marker=".")
        for i, part in enumerate(("first quarter of t: least noise", "second", "third", "last: most noise"), 1):
            right.plot(steps, [row[f"validation_loss_q{i}"] for row in history], label=part, marker=".")
        for axes, title in (left, "L_simple"), (right, "Validation loss by timestep"):
            axes.set(title=title, xlabel="step", yscale="log")
            axes.grid(alpha=0.3, which="both")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)  # below, where it hides no line
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


class StopSignals:
    """Context: the first Ctrl-C or SIGTERM is remembered in .signal, so that a step can end and be saved; a second ends
    the program at once."""

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.signal = number
        self.__exit__()

    def __exit__(self, *exception):
        for which, handler in self.before.items():
            signal.signal(which, handler)


def raise_not_finite(step, checkpoint):
    """Stops a run whose loss or gradient is NaN or infinite. What is on the disk is from before."""
    saved = f"{checkpoint} is from before and sound" if checkpoint.exists() else "nothing was saved yet"
    raise RuntimeError(f"loss or gradient became NaN or infinite near step {step}; {saved}. Start a new run "
                       "with a lower --lr or --clip-norm (--resume keeps the old ones)")


def train(flags, settings, state, out, checkpoint, device):
    """The run itself: set-up, loop, end. `state` is the checkpoint to go on from, or None."""
    # The whole data set is one uint8 tensor on the device: 47 MB, and no loader to wait for.
    images, labels = (tensor.to(device) for tensor in load_dataset(settings["dataset"], flags.data))
    if settings["precision"] == "auto":
        settings["precision"] = "bf16" if has_bf16(device) else "fp32"
    shares = torch.bincount(labels.cpu()) / len(labels)
    settings |= {"image_size": images.shape[-1], "image_channels": images.shape[1], "classes": len(shares),
                 "class_shares": shares.tolist()}
    check_settings(settings["dataset"], settings)  # now, and not when the model is to be sampled
    validation = Validation(settings, flags.data, device)

    if state:
        missing = {"model", "ema", "optimizer", "step", "seconds", "history", "recent"} - state.keys()
        if missing:
            raise ValueError(f"{checkpoint} is for sampling only: it lacks {', '.join(sorted(missing))}")
        check_progress(checkpoint, state)
        network, average = (restore_network(checkpoint, settings, state[name], device) for name in ("model", "ema"))
    else:
        torch.manual_seed(settings["seed"])
        network = build_network(settings).to(device, memory_format=torch.channels_last)
        average = copy.deepcopy(network)
    average.requires_grad_(False).eval()
    optimizers = make_optimizers(network, settings)
    ddpm = DDPM(make_betas(settings["schedule"], settings["timesteps"]))
    model, average_model = Model(network, ddpm, settings, settings["precision"]), Model(average, ddpm, settings)

    # What is drawn k times as often as if all timesteps were alike has to count 1/k, for an estimate of L_simple.
    shares = timestep_shares(settings["schedule"], settings["timesteps"], settings["weighting"])
    rarity = 1 / (ddpm.T * shares)
    weights = ddpm.alpha_bars ** WEIGHTINGS[settings["weighting"]][1]
    weights, rarity = weights.float().to(device), rarity.float().to(device)

    # Where the run stands: everything beside weights and optimiser that has to survive.
    step, seconds, history = 0, 0.0, []
    recent = {"steps": 0, "seconds": 0.0, "sums": [0.0, 0.0]}  # since the last report; sums of loss and gradient norm
    if state:
        restore_optimizers(checkpoint, optimizers, state["optimizer"], state["step"])
        step, seconds, history, recent = (state[name] for name in ("step", "seconds", "history", "recent"))
    sums = torch.tensor(recent["sums"], dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)

    batch_size, minutes = settings["batch_size"], settings["minutes"]
    total = math.inf if minutes else math.ceil(settings["epochs"] * len(images) / batch_size)
    last = min(total, flags.max_steps or math.inf)
    print(f"model       {sum(p.numel() for p in network.parameters()):,} parameters, width {settings['width']}\n"
          f"images      {len(images):,} of {settings['dataset']}, {batch_size} per step\n"
          f"length      {f'{minutes:g} minutes' if minutes else f'{last:,} steps'}"
          f"{f', of which {step:,} steps are done' if step else ''}\n"
          f"device      {device}{f', {torch.get_num_threads()} threads' if device.type == 'cpu' else ''}, "
          f"{settings['precision']}\n"
          f"output      {out}", flush=True)

    if not state:  # what there is of a run that --overwrite throws away, or that was killed before it was saved
        for stale in checkpoint, out / "metrics.csv", out / "loss.png", *(out / "samples").glob("step_*.png"):
            stale.unlink(missing_ok=True)
    with atomic_write(out / "settings.json") as file:
        file.write(json.dumps(settings, indent=2).encode())

    def set_learning_rate(step, progress):
        lr = settings["lr"] * min(1, (step + 1) / max(1, settings["warmup"])) * cosine(progress)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr

    if step:  # that of the step before: a run killed between its last step and its last report takes no other
        set_learning_rate(step - 1, min(1, seconds / (60 * minutes)) if minutes else min(1, (step - 1) / total))

    def check():
        if not torch.isfinite(sums).all():
            raise_not_finite(step, checkpoint)

    def save():
        check()
        recent["sums"] = sums.tolist()
        save_checkpoint(checkpoint, {
            "settings": settings, "step": step, "seconds": seconds, "history": history, "recent": recent,
            "model": network.state_dict(), "ema": average.state_dict(),
            "optimizer": [optimizer.state_dict() for optimizer in optimizers]})

    def report():
        nonlocal recent
        check()  # the sums, which would tell, are cleared below
        average_model.steps = step
        quarters = validation.losses(average_model)
        loss, grad_norm = (sums / recent["steps"]).tolist()
        history.append({
            "step": step, "epoch": step * batch_size / len(images), "train_loss": loss,
            "validation_loss": sum(quarters) / 4, **{f"validation_loss_q{i + 1}": q for i, q in enumerate(quarters)},
            "lr": optimizers[0].param_groups[0]["lr"], "grad_norm": grad_norm,
            "images_per_second": recent["steps"] * batch_size / recent["seconds"], "seconds": seconds})
        sums.zero_()
        recent = {"steps": 0, "seconds": 0.0, "sums": [0.0, 0.0]}
        write_report(out, history, average_model)
        bar.write("step {step:>7,}  epoch {epoch:6.2f}  train {train_loss:.5f}  validation {validation_loss:.5f}  "
                  "{images_per_second:6,.0f} images/s".format(**history[-1]), file=sys.stdout)

    stop = StopSignals()
    network.train()
    bar = tqdm(total=None if minutes else last * batch_size, initial=step * batch_size, unit="image", unit_scale=True,
               disable=None, dynamic_ncols=True, smoothing=0.05)
    with bar, stop:
        start = time.monotonic() - seconds  # the clock that cannot be set, and that counts time before a resume
        while step < last and not stop.signal:
            began = time.monotonic()
            progress = (began - start) / (60 * minutes) if minutes else step / total
            if progress >= 1:
                break
            set_learning_rate(step, progress)
            x0, y, t, noise = draw_batch(step, images, labels, settings)
            losses = ddpm.loss(lambda x_t, t: model.denoiser(x_t, t, y), x0, t, noise)  # L_simple, [B]
            network.zero_grad(set_to_none=True)
            (weights[t] * losses).mean().backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(network.parameters(), settings["clip_norm"])
            sums += torch.stack([(rarity[t] * losses.detach()).mean(), grad_norm])
            # On a GPU looking at a number waits for it, so there it is looked at rarely: at worst weights are lost that
            # were never saved.
            if device.type == "cpu" or step % 100 == 0:
                check()
            for optimizer in optimizers:
                optimizer.step()
            # EMA, Ho et al. 2020, appendix B; with a warm-up, since an average over 1,000 steps that starts at random
            # weights would still be half random after 700.
            decay = min(settings["ema"], (1 + step) / (10 + step))
            torch.optim.swa_utils.get_ema_multi_avg_fn(decay)(
                list(average.parameters()), list(network.parameters()), None)
            step += 1
            recent["steps"] += 1
            bar.update(batch_size)
            if step % 50 == 0:
                bar.set_postfix_str(f"loss {(sums[0] / recent['steps']).item():.4f}")
            seconds = time.monotonic() - start  # after a look at a number, for which a GPU has to finish
            recent["seconds"] += time.monotonic() - began
            if step % settings["report_every"] == 0:
                report()
                seconds = time.monotonic() - start  # the report's are part of the budget too
            if step % flags.save_every == 0:
                save()

        # Saved before the last report, which is therefore not in the checkpoint: a run that --max-steps stopped here
        # and one that never stopped have the same reports.
        save()
        if stop.signal is None and recent["steps"]:
            report()

    if stop.signal is not None:
        print(f"stopped at step {step:,}; the run is saved. Go on with: {command_to_resume()}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    loss = history[-1]["validation_loss"]
    print(f"done        {step:,} steps in {seconds / 60:.1f} minutes, validation loss {loss:.5f}\n"
          f"sample it   {shlex.join(['python', 'sample.py', '--checkpoint', str(checkpoint), '--n', '64', '--gif'])}")


def command_to_resume():
    """The command line that goes on with this run."""
    arguments = [argument for argument in sys.argv if argument not in ("--overwrite", "--resume")]
    return shlex.join(["python", *arguments, "--resume"])


if __name__ == "__main__":
    run(main)
