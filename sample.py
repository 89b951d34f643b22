"""Draws images from a trained model: python sample.py --n 64 --gif."""
import contextlib
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import atomic_write, check_target, load_model
from cli import Parser, add_sampling_flags, generate, integer, path, pick_device, run
from data import enlarge, make_grid, save_gif, save_png, to_uint8
from ddpm import ImageNoise

GRID_IMAGES = 400  # more of them show nothing more; --npz has them all
GIF_IMAGES = 100
GIF_FRAMES = 30


def parse_flags():
    """The command line as a namespace."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=integer(1, 1_000_000), default=64, metavar="N", help="how many images")
    parser.add_argument("--digit", type=integer(0, 9999), metavar="D",
                        help="the class of all images; default: all classes, in their shares of the training data")
    parser.add_argument("--gif", action="store_true", help="write the way from noise to images too")
    parser.add_argument("--npz", type=path, metavar="FILE",
                        help="write the images as arrays too: images uint8 [N, H, W] ([N, 3, H, W] in colour), labels")
    parser.add_argument("--out", type=path, default="samples", metavar="DIR", help="where grid.png and process.gif go")
    add_sampling_flags(parser)
    return parser.parse_args()


def film(states, levels):
    """GIF_FRAMES pictures of the way from noise to images, evenly spaced in what there is to see.

    Args:
        states: uint8 [B, C, H, W] each, in the order of sampling, the noise first.
        levels: of each state the share of signal in it, sqrt(alpha_bar), rising to 1. Steps even in t would show noise
            for half of the time, steps even in log-SNR noise and then a finished digit.
    Returns:
        list of uint8 tensors [B, C, H, W]. Between two states the picture moves on a straight line, as a step does.
    """
    frames = []
    for place in np.interp(np.linspace(levels[0], 1, GIF_FRAMES), levels, range(len(levels))):
        before, share = int(place), place % 1
        after = states[min(before + 1, len(states) - 1)]
        frames.append(torch.lerp(states[before].float(), after.float(), share).round().to(torch.uint8))
    return frames


@contextlib.contextmanager
def npz_writer(path, shape):
    """Context that yields a function to write images and labels with, batch by batch, into an .npz file (atomically),
    so that there may be more of them than the memory holds. numpy.savez would want all of them at once.

    Args:
        shape: of all images together.
    """
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        all_labels = []
        with archive.open("images.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": shape})

            def write(images, labels):
                array.write(images.numpy().tobytes())
                all_labels.append(labels.numpy())

            yield write
        with archive.open("labels.npy", "w") as array:
            np.lib.format.write_array(array, np.concatenate(all_labels))


def main():
    flags = parse_flags()
    out = Path(flags.out)
    for target in filter(None, (out / "grid.png", out / "process.gif", flags.npz)):
        check_target(target)  # now, and not after an hour of sampling
    model = load_model(flags.checkpoint, pick_device(flags.device), flags.ema, flags.precision)
    batches = generate(model, flags.n, sampler=flags.sampler, steps=flags.steps, guidance=flags.guidance,
                       guidance_interval=flags.guidance_interval, seed=flags.seed, batch_size=flags.batch_size,
                       clip=flags.clip, digit=flags.digit)

    channels, size = model.settings["image_channels"], model.settings["image_size"]
    first, shown, films = 0, [], []
    with contextlib.ExitStack() as stack:
        if flags.npz:
            shape = (flags.n, size, size) if channels == 1 else (flags.n, channels, size, size)
            write = stack.enter_context(npz_writer(flags.npz, shape))
        bar = stack.enter_context(tqdm(total=flags.n, unit="image", disable=None))
        for batch_labels, process in batches:
            filmed = max(0, min(flags.batch_size, GIF_IMAGES - first)) if flags.gif else 0
            levels, states = [], []
            for t, x, x0_hat in process:
                if filmed:
                    if not states:  # the pure noise that it starts from comes first in each image's stream
                        again = ImageNoise(flags.seed, range(first, first + len(x[:filmed])))
                        states.append(to_uint8(again(x[:filmed])).cpu())
                    states.append(to_uint8(x[:filmed]).cpu())
                    levels.append(model.ddpm.alpha_bars[t].sqrt().item())  # of the x before this step
            if not torch.isfinite(x).all():
                raise RuntimeError("the samples have NaN or infinite pixels; leave --no-clip out, or train on")
            images = to_uint8(x).cpu()
            if flags.npz:
                write(images, torch.full((len(x),), -1) if batch_labels is None else batch_labels)
            if first < GRID_IMAGES:
                shown.append(images)
            if filmed:
                films.append(film(states, levels + [1.0]))
            first += len(x)
            bar.update(len(x))

    grid = make_grid(torch.cat(shown)[:GRID_IMAGES])
    save_png(out / "grid.png", enlarge(grid, max(1, 720 // max(grid.shape[:2]))))
    made = [out / "grid.png" if flags.n <= GRID_IMAGES else f"{out / 'grid.png'} (the first {GRID_IMAGES})"]
    if flags.gif:
        frames = [make_grid(torch.cat(batches)) for batches in zip(*films)]
        save_gif(out / "process.gif", [enlarge(frame, max(1, 490 // max(frame.shape[:2]))) for frame in frames])
        made.append(out / "process.gif")
    if flags.npz:
        made.append(flags.npz)
    print(*made, sep="\n")  # after all is written: whoever reads it may have gone


if __name__ == "__main__":
    run(main)
