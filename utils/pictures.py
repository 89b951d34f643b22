"""Images out: grids, GIFs and plots, as files."""
import math

import numpy as np
import torch

from utils.files import atomic_write, write_csv

GIF_FRAMES = 30


def make_grid(images, columns=None, padding=2):
    """Lays images out as one picture, row by row, on as near a square as there is.

    Written out because torchvision.utils.make_grid would double the start-up time of sample.py.

    Args:
        images: uint8 tensor [N, C, H, W], C = 1 or 3, N >= 1.
        columns: images per row; the default is ceil(sqrt(N)).
    Returns:
        uint8 array [rows * (H + padding) + padding, columns * (W + padding) + padding] (with a last axis of 3 if
        C = 3). The lines between images are dark grey, so that the edge of a black image shows.
    """
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = np.full((c, rows * (h + padding) + padding, columns * (w + padding) + padding), 48, dtype=np.uint8)
    for i, image in enumerate(images.cpu().numpy()):
        top, left = padding + i // columns * (h + padding), padding + i % columns * (w + padding)
        canvas[:, top:top + h, left:left + w] = image
    return canvas[0] if c == 1 else canvas.transpose(1, 2, 0)


def upscale(picture, factor):
    """Repeats every pixel factor x factor times: [H, W, ...] -> [H * factor, W * factor, ...]. Small digits stay sharp
    in a viewer that would blur them."""
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def save_png(path, picture):
    """Writes a uint8 array [H, W] or [H, W, 3] as a PNG, atomically."""
    import imageio.v3 as iio

    with atomic_write(path) as file:
        iio.imwrite(file, picture, extension=".png")


def save_gif(path, frames, frame_ms=60, rest_ms=2000):
    """Writes uint8 arrays [H, W] as a GIF that loops for ever, atomically.

    Args:
        frames: a sequence of at least one picture; the last one stays for `rest_ms`, the others for `frame_ms`
            milliseconds each (imageio 3 counts in milliseconds, imageio 2 counted in seconds).
    """
    import imageio.v3 as iio

    durations = [frame_ms] * (len(frames) - 1) + [rest_ms] if len(frames) > 1 else rest_ms
    with atomic_write(path) as file:
        # optimize=False: where a frame has all 256 grey levels Pillow's optimiser writes some pixels wrong.
        iio.imwrite(file, np.stack(frames), extension=".gif", duration=durations, loop=0, optimize=False)


def gif_frames(states, signal):
    """GIF_FRAMES pictures of the way from noise to images, evenly spaced in what there is to see.

    Args:
        states: uint8 [B, C, H, W] each, in the order of sampling, the noise first.
        signal: for each state the share of the image in it, sqrt(alpha_bar), rising to 1. Steps even in t would show
            noise for half of the time, steps even in log-SNR noise and then a finished digit.
    Returns:
        list of uint8 tensors [B, C, H, W]. Between two states the picture moves on a straight line, as a step does.
    """
    frames = []
    for place in np.interp(np.linspace(signal[0], 1, GIF_FRAMES), signal, range(len(signal))):
        before, share = int(place), place % 1
        after = states[min(before + 1, len(states) - 1)]
        frames.append(torch.lerp(states[before].float(), after.float(), share).round().to(torch.uint8))
    return frames


def write_report(out, history, samples):
    """The files of a report in a run's folder, each atomically: metrics.csv and loss.png of its history (dicts), and a
    grid of its samples (uint8 [N, C, H, W])."""
    with atomic_write(out / "metrics.csv") as file:
        write_csv(file, history)
    plot_losses(out / "loss.png", history)
    save_png(out / "samples" / f"step_{history[-1]['step']:07d}.png", upscale(make_grid(samples), 2))


def plot_losses(path, history):
    """Training and validation loss, and the latter by quarter of t, against the step: a PNG of a run's reports."""
    import matplotlib  # imported here: it takes half a second
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

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
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))  # few enough not to run into each other
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.grid(alpha=0.3, which="both")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)  # below, where it hides no line
    with atomic_write(path) as file:
        figure.savefig(file, format="png")


def plot_sweep(path, by_steps, by_guidance, real, n):
    """Left the Frechet distance against network calls, right against guidance: a PNG of what evaluate.py --sweep found.

    Args:
        by_steps, by_guidance: rows of the sweep, dicts.
        real: the figures of real digits, a dict.
        n: how many samples each row is of.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for sampler in dict.fromkeys(row["sampler"] for row in by_steps):
        line = [row for row in by_steps if row["sampler"] == sampler]
        left.loglog([row["calls"] for row in line], [row["frechet"] for row in line], "o-", label=sampler)
    left.set(xlabel="network calls per image", ylabel=f"Frechet distance to the test digits, n = {n:,}")
    line = sorted(by_guidance, key=lambda row: row["guidance"])
    shares = right.twinx()
    shares.set(ylim=(0, 1), ylabel="precision, recall")
    if line:
        right.semilogy([row["guidance"] for row in line], [row["frechet"] for row in line], "o-",
                       label=f"{line[0]['sampler']}, {line[0]['steps']} steps")
        for key, style in ("precision", "C1s:"), ("recall", "C2^:"):
            shares.plot([row["guidance"] for row in line], [row[key] for row in line], style, label=key)
    right.set(xlabel="guidance")
    for axes, handles in (left, []), (right, shares.get_lines()):
        axes.axhline(real["frechet"], color="gray", linestyle="--", label="real digits")
        axes.grid(alpha=0.3)
        axes.legend(handles=axes.get_lines() + list(handles), ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
