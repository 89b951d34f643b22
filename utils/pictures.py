"""Grids, GIFs and plots to files, and single pictures from files."""
import contextlib
import io
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from utils.cli import UsageError, say, tolerated
from utils.files import atomic_write, check_target, remove_leftovers, write_csv
from utils.images import FORMATS, upright

GIF_FRAMES, GIF_LEVELS = 24, 32  # with all 256 grey levels a GIF is twice the size and looks the same
TRAJECTORY_STEPS = 8
GRID_GREY = 48  # of the lines between images


def make_grid(images, columns=None, padding=2):
    """Lays images out as one picture, row by row, as close to a square as possible.

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
    canvas = np.full((c, rows * (h + padding) + padding, columns * (w + padding) + padding), GRID_GREY, dtype=np.uint8)
    for i, image in enumerate(images.cpu().numpy()):
        top, left = padding + i // columns * (h + padding), padding + i % columns * (w + padding)
        canvas[:, top:top + h, left:left + w] = image
    return canvas[0] if c == 1 else canvas.transpose(1, 2, 0)


def upscale(picture, factor):
    """Repeats every pixel factor x factor times: [H, W, ...] -> [H * factor, W * factor, ...]. Small digits stay sharp
    in a viewer that would blur them."""
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def enlarged(picture, side):
    """The picture, upscaled as far as its longer side stays within `side` pixels; if it is longer, as it is."""
    return upscale(picture, max(1, side // max(picture.shape[:2])))


def save_png(path, picture, tidy=True):
    """Writes a uint8 array [H, W] or [H, W, 3] as a PNG, atomically; `tidy` as atomic_write."""
    import imageio.v3 as iio

    with atomic_write(path, tidy) as file:
        iio.imwrite(file, picture, extension=".png")


def save_gif(path, frames, frame_ms=80, rest_ms=2000):
    """Writes uint8 arrays [H, W] or [H, W, 3] as a GIF that loops for ever, in GIF_LEVELS grey levels, atomically.

    Args:
        frames: a sequence of at least one picture; the last one stays for `rest_ms`, the others for `frame_ms`
            milliseconds each (imageio 3 counts in milliseconds, imageio 2 counted in seconds).
    """
    import imageio.v3 as iio

    steps = GIF_LEVELS - 1
    levels = ((np.arange(256) / 255 * steps).round() * 255 / steps).round().astype(np.uint8)
    frames = levels[np.stack(frames)]
    durations = [frame_ms] * (len(frames) - 1) + [rest_ms] if len(frames) > 1 else rest_ms
    with atomic_write(path) as file:
        iio.imwrite(file, frames, extension=".gif", duration=durations, loop=0)


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
    for place in gif_places(signal):
        before, share = int(place), place % 1
        after = states[min(before + 1, len(states) - 1)]
        frames.append(torch.lerp(states[before].float(), after.float(), share).round().to(torch.uint8))
    return frames


def gif_places(signal):
    """Where the frames of a GIF lie among its states: 1.5 is halfway between states 1 and 2. `signal` as gif_frames."""
    return np.interp(np.linspace(signal[0], 1, GIF_FRAMES), signal, range(len(signal)))


def trajectories(steps):
    """x_t and, below it, x0_hat for each of the images, from noise (left) to the image, as every lecture shows it.

    Args:
        steps: a list of (x_t, x0_hat), uint8 [B, C, H, W] each.
    Returns:
        a picture as of make_grid.
    """
    rows = [[pair[which][image] for pair in steps] for image in range(len(steps[0][0])) for which in (0, 1)]
    return make_grid(torch.stack(sum(rows, [])), columns=len(steps))


class Gallery:
    """The pictures of sample.py, made as the images come, a batch at a time: a grid; on request a GIF of how they
    grew out of noise, their trajectories, and a PNG of each.

    Args:
        out: the folder for all but the single ones, whose folder is `png`.
        columns: of the grid; None: as make_grid.
    Attributes:
        followed: the number of images whose steps it wants to see.
    Raises:
        UsageError: `png` is `out`.
        OSError, ValueError: a file cannot be written, as check_target.
    """

    GRID, GIF, TRAJECTORIES = 400, 100, 4  # images; more of them show nothing more

    def __init__(self, out, *, gif=False, trajectory=False, png=None, columns=None):
        import imageio.v3  # if it is missing, fail now, and not after an hour of sampling

        out, self.png = Path(out), png and Path(png)
        if png and out.resolve() == self.png.resolve():  # evaluate.py --npz would take the grid for an image
            raise UsageError(f"--png {png} is where the grid goes; choose another folder for the single images")
        self.grid, self.gif, self.trajectory = (
            out / "grid.png", gif and out / "process.gif", trajectory and out / "trajectory.png")
        for target in filter(None, (self.grid, self.gif, self.trajectory, self.png and self.png / "000000.png")):
            check_target(target)
        if self.png:
            remove_leftovers(self.png, "*.png")  # once: before each picture it would take ever longer
        self.columns, self.followed = columns, self.GIF if gif else self.TRAJECTORIES if trajectory else 0
        self.done, self.shown, self.steps, self.on_trajectory = 0, [], [], set()

    def wanted(self, alpha_bars, timesteps):
        """The set of those timesteps, of all that a process visits, whose x_t and x0_hat the pictures show. Notes which
        are the trajectory's."""
        if self.trajectory:
            self.on_trajectory = {timesteps[round(k)] for k in np.linspace(0, len(timesteps) - 1, TRAJECTORY_STEPS)}
        if not self.gif:
            return self.on_trajectory
        places = gif_places(alpha_bars[timesteps].sqrt().tolist() + [1.0])
        beside = {k for place in places for k in (int(place), int(place) + 1)}
        return self.on_trajectory | {timesteps[k] for k in beside if k < len(timesteps)}

    def add(self, images, steps):
        """Takes a batch of images uint8 [B, C, H, W], and (t, x_t, x0_hat) of the first of them for each t wanted."""
        for i, image in enumerate(images if self.png else (), self.done):
            save_png(self.png / f"{i:06}.png", make_grid(image[None], padding=0), tidy=False)
        if self.done < self.GRID:
            self.shown.append(images)
        if self.done < self.followed:
            self.steps.append(steps)
        self.done += len(images)

    def save(self, alpha_bars):
        """Writes the pictures, with the alpha_bars [T] of the process. Returns what was made, a list for print."""
        shown = torch.cat(self.shown)[:self.GRID]
        picture = make_grid(shown, self.columns)
        save_png(self.grid, enlarged(picture, 720))
        made = [self.grid if self.done <= self.GRID else f"{self.grid} (the first {self.GRID})"]
        # For each t, x_t and x0_hat of all that were followed.
        timesteps = [t for t, *_ in self.steps[0]] if self.steps else []
        steps = [[torch.cat([part[which] for part in batches])[:self.followed] for which in (1, 2)]
                 for batches in zip(*self.steps)]
        if self.gif:
            signal = alpha_bars[timesteps].sqrt().tolist() + [1.0]
            frames = gif_frames([x_t for x_t, _ in steps] + [shown[:self.followed]], signal)
            frames = [make_grid(frame, self.columns) for frame in frames]
            save_gif(self.gif, [enlarged(frame, 245) for frame in frames])
            made.append(self.gif)
        if self.trajectory:
            picture = trajectories([[x[:self.TRAJECTORIES] for x in pair] for t, pair in zip(timesteps, steps)
                                    if t in self.on_trajectory])
            save_png(self.trajectory, enlarged(picture, 720))
            made.append(self.trajectory)
        if self.png:
            others = len(list(self.png.glob("*.png"))) - self.done
            made.append(f"{self.png} ({self.done} files{f', beside {others} that were there' if others else ''})")
        return made


def read_picture(path):
    """A picture of one of FORMATS, the first of several: uint8 [1, 3, H, W].

    Raises:
        FileNotFoundError, ValueError: with one line that says what is wrong with the file.
    """
    from PIL import Image

    if not os.path.exists(path):
        raise FileNotFoundError(f"no picture at {path}; for an image of the data set write test:17 or train:17")
    try:
        with Image.open(path, formats=FORMATS) as image:
            pixels = np.array(upright(image).convert("RGB"))
    except Exception as error:  # of which Pillow has many
        raise ValueError(f"{path} is not a picture that can be read ({type(error).__name__})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def read_mask(mask, size):
    """What to fill in of an image, bool [size, size]: half of it, its middle, or what is white in a picture.

    Raises:
        FileNotFoundError, ValueError: there is no such picture, or it is of another size, or nothing in it is white.
    """
    half, quarter, all_of_it = size // 2, size // 4, slice(None)
    parts = {"left": (all_of_it, slice(half)), "right": (all_of_it, slice(half, None)), "top": (slice(half), all_of_it),
             "bottom": (slice(half, None), all_of_it), "centre": (slice(quarter, -quarter), slice(quarter, -quarter))}
    if mask in parts:
        hole = torch.zeros(size, size, dtype=torch.bool)
        hole[parts[mask]] = True
        return hole
    if not os.path.exists(mask):
        raise FileNotFoundError(f"no mask {mask}; give one of {', '.join(parts)}, or a picture")
    picture = read_picture(mask).float().mean(dim=(0, 1))
    height, width = picture.shape
    if (height, width) != (size, size):
        raise ValueError(f"the mask {mask} has {width}x{height} pixels, and must have {size}x{size}")
    if not (picture > 127).any():
        raise ValueError(f"the mask {mask} has nothing white, and so nothing to fill in")
    return picture > 127


def read_folder(folder):
    """The PNGs in a folder, in the order of their names: uint8 [N, 1, 28, 28].

    Raises:
        FileNotFoundError, ValueError: there is none, or one is not a grey picture of 28x28 pixels.
    """
    images = []
    for path in sorted(Path(folder).iterdir()):
        if path.suffix.lower() != ".png" or path.name.startswith(".") or path.is_dir():
            continue
        picture = read_picture(path)
        if picture.shape[-2:] != (28, 28) or (picture != picture[:, :1]).any():
            raise ValueError(f"{path} is not a grey picture of 28x28 pixels")
        images.append(picture[:, :1])
    if not images:
        raise ValueError(f"{folder} is a folder without PNGs")
    return torch.cat(images)


def fit_picture(picture, channels, size, name, on_black=False):
    """The middle of a picture uint8 [1, 3, H, W] as an image uint8 [1, channels, size, size]. If that changes what is
    seen, a line says so, with the picture's `name`; and one says so if it should be white `on_black` and is not."""
    height, width = picture.shape[-2:]
    side, grey = min(height, width), channels == 1
    top, left = (height - side) // 2, (width - side) // 2
    image = picture[..., top:top + side, left:left + side].float()
    if grey:  # as bright as the eye sees the colours: ITU-R BT.601
        image = (image * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    if side != size:
        image = F.interpolate(image, (size, size), mode="area")
    coloured = grey and (picture != picture[:, :1]).any()
    if coloured or (height, width) != (size, size):
        say(f"{name}: the middle of {width}x{height} pixels{' in colour' if coloured else ''}, made {size}x{size}"
            f"{' and grey' if coloured else ''}", sys.stderr)
    if on_black and image.mean() > 127:
        say(f"{name} is mostly white, but the model was trained on white on black; invert it", sys.stderr)
    return image.round().to(torch.uint8)


def write_report(out, history, curve, samples):
    """The files of a report in a run's folder, each atomically: metrics.csv and loss.png, and a grid of its samples.
    What cannot be written is a warning: the next report writes all of it again.

    Args:
        history, curve: as Progress has them.
        samples: callable () -> uint8 [N, C, H, W].
    """
    with tolerated(f"writing {out / 'metrics.csv'}"), atomic_write(out / "metrics.csv") as file:
        write_csv(file, history)
    with tolerated(f"drawing {out / 'loss.png'}"), atomic_write(out / "loss.png") as file:
        plot_losses(file, history, curve)
    grid = out / "samples" / f"step_{history[-1]['step']:07d}.png"
    with tolerated(f"drawing {grid}"):
        save_png(grid, upscale(make_grid(samples()), 2))


def try_out():
    """Imports what pictures need, and draws two in memory: what will fail says so now."""
    with tolerated("drawing pictures"):
        import imageio.v3 as iio

        iio.imwrite(io.BytesIO(), np.zeros((1, 1), np.uint8), extension=".png")
        plot_losses(io.BytesIO(), [], [[1, 1.0], [2, 0.5]])


@contextlib.contextmanager
def _matplotlib():
    """Context with matplotlib as it comes, whatever the user's matplotlibrc or a notebook has it do."""
    anew = "matplotlib" not in sys.modules
    backend = os.environ.pop("MPLBACKEND", None) if anew else None  # no import fails for it, and files need none
    import matplotlib

    if backend:  # for the plots that follow ours
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield matplotlib


def plot_losses(file, history, curve):
    """Training and validation loss, and the latter by quarter of t, against the step: a PNG of a run.

    Args:
        file: open, binary.
        history: its reports, dicts.
        curve: of the training loss, pairs of a step and a mean.
    """
    with _matplotlib() as matplotlib:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        matplotlib.rcParams["font.size"] = 9
        figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
        steps = [row["step"] for row in history]
        left, right = figure.subplots(1, 2)
        left.plot(*zip(*curve), label="training", marker=".")
        left.plot(steps, [row["validation_loss"] for row in history], label="validation (EMA weights)", marker=".")
        for i, part in enumerate(("first quarter of t: least noise", "second", "third", "last: most noise"), 1):
            right.plot(steps, [row[f"validation_loss_q{i}"] for row in history], label=part, marker=".")
        for axes, title in (left, "L_simple"), (right, "Validation loss by timestep"):
            axes.set(title=title, xlabel="step", yscale="log")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))  # few enough not to run into each other
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.grid(alpha=0.3, which="both")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)  # below, where it hides no line
        figure.savefig(file, format="png")


@_matplotlib()
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
