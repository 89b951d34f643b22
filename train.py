"""Trains a diffusion model: python train.py. With no flags it learns MNIST.

Every random number is a function of (seed, step): nothing about the random state needs saving, and a run that was
interrupted and resumed ends with the same weights, bit for bit, as one that was not (without --minutes, on a CPU with
the same number of threads; on a GPU, whose kernels may add up in any order, with almost the same ones).
"""
import utils  # first: Ctrl-C while the rest is imported prints one line, not a traceback
import copy
import math
import sys
import time
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ddpm import DDPM, WEIGHTINGS, exact_dtype, fold_in, to_device
from diffusion_model import Model, build_network, drop_labels
from diffusion_schedules import make_betas
from sample import draw
from utils.checkpoint import Progress, load_checkpoint, rehearse, restore_run, run_folder, save_run, take_weights
from utils.cli import (
    Bar, Parser, StopSignals, UsageError, command, command_to_resume, keep_memory, pick_device, run, say)
from utils.data import to_float
from utils.files import clear_run
from utils.images import check_outside, labels_in_words, load_images
from utils.metrics import Validation
from utils.muon import make_optimizers, set_learning_rate
from utils.pictures import try_out, write_report
from utils.ranks import RANK, WORLD, join, mean_of_all, of_the_first, part, rescued
from utils.settings import (
    EARLY_IMAGES, parse_run_flags, resumed_settings, settings_of_a_file, settings_of_a_run, settings_of_the_data)


def train(flags, settings, state, out, device):
    """The run, from the data to the last report. `state` is the checkpoint to go on from, or None."""
    # The data: the whole set is one uint8 tensor on the device, 47 MB, and there is no loader to wait for.
    images, labels, classes = load_images(settings, flags.data, device=device)  # --images stay in their file
    settings |= settings_of_the_data(settings["dataset"], images, labels.cpu(), classes, settings.pop("levels", None))

    # The model; the moving average (EMA) of its weights, which is what will be sampled; the optimizers.
    torch.manual_seed(settings["seed"])
    network = build_network(settings).to(device, memory_format=torch.channels_last)
    if flags.init:
        take_weights(network, flags.init)
    average = copy.deepcopy(network).requires_grad_(False).eval()
    ddpm = DDPM(make_betas(settings["schedule"], settings["timesteps"]))
    model, ema = Model(network, ddpm, settings, settings["precision"]), Model(average, ddpm, settings)
    optimizers = make_optimizers(network, settings)

    # The objective: how often each timestep is drawn, and how much its error counts.
    p, w, importance = objective(ddpm, settings["weighting"], device)

    # Where the run stands, how far it goes, and how it is judged on the way.
    progress, validation = Progress(device, out / "checkpoint.pt"), Validation(settings, flags.data, device)
    save = partial(save_run, settings, progress, network, ema, optimizers)
    if state:
        restore_run(progress.checkpoint, state, settings, progress, network, ema, optimizers)
    else:
        rehearse(settings, network, optimizers)
    batch_size, minutes = settings["batch_size"], settings["minutes"]
    total = math.inf if minutes else math.ceil(settings["epochs"] * len(images) / batch_size)
    last = min(total, flags.max_steps or math.inf)
    begin(out, settings, ema, device, len(images), last, progress)

    # The loop. With several processes, each does its part of every step; the first does all else.
    if flags.compile:
        network.compile()
    bar = Bar(total=None if minutes else last * batch_size, initial=progress.step * batch_size, unit="image")
    with bar, StopSignals() as stop, rescued(lambda: progress.step and save()):  # at step 0 an old run may be there
        start = time.monotonic() - progress.seconds  # monotonic: nobody can set that clock back
        while progress.step < last:
            step, began = progress.step, time.monotonic()
            share = stop.agreed((began - start) / (60 * minutes) if minutes else step / total)  # alike in all processes
            if stop.signal or share >= 1:
                break
            progress.lr = set_learning_rate(optimizers, settings, step, share)

            # One step: a batch, its loss, the gradient, the optimizers, the moving average.
            x0, y, t, noise = draw_batch(step, images, labels, settings, p)
            torch.manual_seed(fold_in(settings["seed"], step, 2 + RANK))  # for networks that have dropout
            # L = E over x0, t ~ p and noise of  w(t) || noise - noise_theta(x_t, t, y) ||^2
            errors = ddpm.loss(partial(model, labels=y), x0, t, noise)  # [B]
            network.zero_grad()
            (w[t] * errors).mean().backward()
            loss = (importance[t] * errors.detach()).mean()  # an estimate of L_simple, for the reports
            mean_of_all([loss, *(p.grad for p in network.parameters() if p.grad is not None)], len(t) / batch_size)
            grad_norm = torch.nn.utils.clip_grad_norm_(network.parameters(), settings["clip_norm"])
            progress.add(loss, grad_norm)
            for optimizer in optimizers:
                optimizer.step()
            update_ema(average, network, min(settings["ema"], (1 + step) / (10 + step)))  # a short memory at first
            progress.advance()
            if RANK:
                continue
            if progress.step == 1:
                clear_run(out)  # --overwrite: the old run goes when a step has shown that this one works
            if progress.step == math.ceil(EARLY_IMAGES / batch_size):
                ema.early = copy.deepcopy(average)  # for autoguidance

            # Where it stands. A save comes before the files of a report, so that --resume can still write them.
            bar.advance(batch_size, f"step {progress.step:>7,}  {share:4.0%} done")
            if progress.step % 50 == 0:
                bar.set_postfix_str(f"loss {progress.means()[0]:.4f}")
            progress.seconds = time.monotonic() - start
            progress.since_report["seconds"] += max(1e-6, time.monotonic() - began)  # by a coarse clock it may be 0
            reported = progress.step % settings["report_every"] == 0 or progress.unreported(total, minutes) >= 0.5
            if reported:
                progress.report(validation.losses(ema), batch_size, len(images))
                progress.seconds = time.monotonic() - start  # its time is part of the budget too
            if progress.step % flags.save_every == 0:
                save()
            if reported:
                report(out, progress, ema)

        # The end. Saved before the last report, which a longer run, by --resume, would not have made here.
        if RANK:
            return
        save()
        stopped = stop.signal  # a later one finds the run complete
        if stopped is None and progress.since_report["steps"]:
            progress.report(validation.losses(ema), batch_size, len(images))
            report(out, progress, ema)
    end(stopped, progress, progress.step - (state["step"] if state else 0))


# ----------------------------------------------------------------------------------------------------------------------
# The parts of a step

def objective(ddpm, weighting, device):
    """Tables [T] on the device: p, the probability of drawing each timestep; w, the weight of its error; and its
    importance weight, which turns errors at t ~ p into an estimate of L_simple."""
    p, w = (function(ddpm.alpha_bars) for function in WEIGHTINGS[weighting])
    if not (p.shape == w.shape == (ddpm.T,) and (p >= 0).all() and 0 < p.sum() < math.inf and w.isfinite().all()):
        raise ValueError(f"weighting {weighting}: how often t is drawn and how much its error counts must be two "
                         "finite tables [T], the first without negative numbers and not all 0")
    p = p / p.sum()
    # importance = 1 / (T p): a t drawn k times as often as under uniform sampling counts 1 / k
    return p.to(exact_dtype(device)).to(device), w.float().to(device), (1 / (ddpm.T * p)).float().to(device)


def draw_batch(step, images, labels, settings, p):
    """Everything random about a step, a function of (seed, step): x0, labels, t ~ p, noise, on the labels' device.
    With several processes, each gets its part.

    The data is an endless sequence of shuffled epochs, each image once in each, and a batch may span two of them.
    """
    seed, batch_size, device, n = settings["seed"], settings["batch_size"], labels.device, len(images)
    position = torch.arange(step * batch_size, (step + 1) * batch_size)  # in that sequence
    epoch, index = position // n, position % n
    chosen = torch.cat([shuffled(seed, e, n)[index[epoch == e]] for e in epoch.unique().tolist()])
    on_device = to_device(chosen, device)
    x0 = images[part(on_device)] if images.device == device else to_device(images[part(chosen)], device)

    generator = torch.Generator(device).manual_seed(fold_in(seed, step, 1))
    y = drop_labels(labels[on_device], settings["label_dropout"], settings["classes"], generator)
    # u uniform in 0..1, one draw from each of B equal strata: same expectation as B independent draws, less variance.
    u = ((torch.arange(batch_size, device=device) + torch.rand(batch_size, generator=generator, device=device))
         / batch_size).clamp(max=1 - 2 ** -24)  # it may round to 1, which no cumulative p exceeds
    # t is the first timestep where the cumulative p exceeds u.
    t = torch.searchsorted(p.cumsum(0).float(), u, right=True).clamp(max=len(p) - 1)
    noise = torch.randn(batch_size, *x0.shape[1:], generator=generator, device=device)
    return to_float(x0), part(y), part(t), part(noise)


@lru_cache(maxsize=2)
def shuffled(seed, epoch, n):
    """The order of the n images in an epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(fold_in(seed, epoch, 0)))


@torch.no_grad()
def update_ema(average, network, decay):
    """EMA of the weights, Ho et al. 2020, appendix B. Buffers, BatchNorm's for example, are copied."""
    # average <- decay average + (1 - decay) weights
    get_ema_multi_avg_fn(decay)(list(average.parameters()), list(network.parameters()), None)
    theirs = dict(network.named_buffers())
    for name, ours in average.named_buffers():
        if name in theirs and theirs[name].shape == ours.shape:  # not a cache that one of them has yet to make
            ours.copy_(theirs[name])


# ----------------------------------------------------------------------------------------------------------------------
# Before and after

def report(out, progress, model):
    """The files of a report, with 64 samples of the model, and a line above the bar."""
    model.steps = progress.step  # by which the guidance is chosen
    write_report(out, progress.history, progress.curve,
                 lambda: draw(model, 64, batch_size=min(64, model.settings["batch_size"]))[0])
    with Bar.external_write_mode(sys.stdout):
        say("step {step:>7,}  epoch {epoch:6.2f}  train {train_loss:.5f}  validation {validation_loss:.5f}  "
            "{images_per_second:6,.0f} images/s".format(**progress.history[-1]))


def begin(out, settings, ema, device, n, last, progress):
    """Says what will be done, tries to draw, and writes the report that a killed run left out."""
    if RANK:
        return
    length = f"{settings['minutes']:g} min" if settings["minutes"] else f"{last:,} steps"
    say(f"model       {sum(p.numel() for p in ema.network.parameters()):,} parameters, width {settings['width']}\n"
        f"images      {n:,} of {settings['dataset']}, {settings['batch_size']} per step{labels_in_words(settings)}\n"
        f"length      {length}{f', of which {progress.step:,} steps are done' if progress.step else ''}\n"
        f"device      {device}{f', {torch.get_num_threads()} threads' if device.type == 'cpu' else ''}"
        f"{f' in each of {WORLD} processes' if WORLD > 1 else ''}, {settings['precision']}\n"
        f"output      {out}")
    try_out()
    if progress.history and not progress.since_report["steps"]:
        report(out, progress, ema)


def end(signal, progress, steps):
    """Says how many steps were made, and what to do next."""
    if signal is not None:
        say(f"stopped at step {progress.step:,}; the run is saved. Go on with: {command_to_resume()}", sys.stderr)
        sys.exit(128 + signal)
    what = ("done       " if steps else
            "no step left: to go on, --resume with more --epochs, --minutes or --max-steps\nit has     ")
    say(f"{what} {progress.step:,} steps in {progress.seconds / 60:.1f} minutes, validation loss "
        f"{progress.history[-1]['validation_loss']:.5f}\n"
        f"sample it   {command('sample.py', '--checkpoint', progress.checkpoint, '--n', 64, '--gif')}")


def parse_flags():
    """The command line -> (namespace of all flags, dict of the settings of the run given explicitly)."""
    return parse_run_flags(Parser(__doc__))


def main():
    flags, given = parse_flags()
    device = join(pick_device(flags.device))
    if flags.init:  # with its network and its noise schedule, unless asked otherwise
        theirs = settings_of_a_file(flags.init, load_checkpoint(flags.init).get("settings"))
        of_a_network = "network", "width", "depth", "schedule", "timesteps", "levels"
        given = {name: theirs[name] for name in of_a_network if name in theirs} | given
    settings = of_the_first(settings_of_a_run(given, device))
    out = Path(flags.out or Path("runs") / settings["dataset"].lower())
    check_outside(settings["images"], {"--out": out, "--data": flags.data})
    keep_memory()
    with run_folder(out, flags.resume, flags.overwrite, flags.init) as state:
        if state:
            settings = resumed_settings(out / "checkpoint.pt", state["settings"], given)
        if settings["batch_size"] < WORLD:
            raise UsageError(f"--batch-size {settings['batch_size']} is too small for {WORLD} processes to share")
        train(flags, settings, state, out, device)


if __name__ == "__main__":
    run(main)
