"""Draws images from a trained model: python sample.py --n 64 --gif."""
import utils  # first, so that Ctrl-C during the other imports is one line too
import contextlib
from pathlib import Path

import torch
from tqdm import tqdm

from ddpm import SAMPLERS, ImageNoise, to_device
from diffusion_model import guided
from diffusion_schedules import sampling_timesteps
from utils.checkpoint import load_model
from utils.cli import Parser, integer, path, pick_device, run
from utils.data import class_of, to_uint8
from utils.files import check_target, npz_writer
from utils.pictures import gif_frames, make_grid, save_gif, save_png, upscale
from utils.settings import SAMPLER, add_sampling_flags, check_labels, noise_level, sampling_defaults

GRID_IMAGES = 400  # more of them show nothing more; --npz has them all
GIF_IMAGES = 100


def generate(model, n, *, sampler=SAMPLER, steps=None, guidance=None, guidance_interval=None, seed=0, batch_size=64,
             clip=True, digit=None):
    """Samples n images, a batch at a time. Image i depends on (seed, i) and the settings, not on n or batch_size.

    Args:
        model: a diffusion_model.Model.
        steps, guidance, guidance_interval (lowest and highest noise level to guide at): None: as sampling_defaults.
        digit: the class of all images; None: the classes in the shares they have in the training data.
    Returns:
        an iterator of (labels, process), one per batch: labels int64 [B] (None if the model knows no classes), process
        the iterator of (t, x [B, C, H, W], x0_hat) that DDPM.sample returns.
    Raises:
        UsageError: as sampling_defaults and check_labels.
    """
    settings, device, classes = model.settings, next(model.network.parameters()).device, model.num_classes
    steps, guidance, (low, high) = sampling_defaults(model, sampler, steps, guidance, guidance_interval)
    check_labels(model, digit, guidance)
    timesteps = sampling_timesteps(model.ddpm.T, steps, SAMPLERS[sampler].spacing, model.ddpm.alpha_bars)
    # Guidance acts at medium noise only: Kynkaanniemi et al. 2024 (arXiv 2404.07724).
    acts = [low <= noise_level(model.ddpm.alpha_bars[t]) <= high for t in timesteps]
    shape = settings["image_channels"], settings["image_size"], settings["image_size"]

    def batches():
        for start in range(0, n, batch_size):
            indices = range(start, min(start + batch_size, n))
            labels, predict_noise = None, model
            if classes:
                labels = torch.tensor([class_of(i, settings["class_shares"]) if digit is None else digit
                                       for i in indices])
                predict_noise = guided(model, to_device(labels, device), guidance, acts)
            noise_fn = ImageNoise(seed, indices)
            x_T = noise_fn(torch.empty(len(indices), *shape, device=device))
            yield labels, model.ddpm.sample(predict_noise, x_T, sampler=sampler, timesteps=timesteps,
                                            noise_fn=noise_fn, clip=clip)

    return batches()  # only these wait for whoever iterates: the checks above are made now


def finished(x):
    """The samples x, float [B, C, H, W], as images: uint8, on the CPU. Raises RuntimeError if they are not finite."""
    if not torch.isfinite(x).all():
        raise RuntimeError("the samples have NaN or infinite pixels; leave --no-clip out, or train on")
    return to_uint8(x).cpu()


def draw(model, n, name="samples", **settings):
    """n samples of a model, with the settings of `generate`: images uint8 [n, C, H, W], labels int64 [n] or None."""
    images, labels = [], []
    with tqdm(total=n, desc=name, unit="image", leave=False, disable=None) as bar:
        for batch_labels, process in generate(model, n, **settings):
            for _, x, _ in process:
                pass
            images.append(finished(x))
            labels.append(batch_labels)
            bar.update(len(x))
    return torch.cat(images), None if labels[0] is None else torch.cat(labels)


def parse_flags():
    """The command line as a namespace."""
    parser = Parser(__doc__)
    parser.add_argument("--n", type=integer(1, 1_000_000), default=64, metavar="N", help="how many images")
    parser.add_argument("--digit", type=integer(0, 9999), metavar="D",
                        help="the class of all images; default: all classes, in their shares of the training data")
    parser.add_argument("--gif", action="store_true", help="also write a GIF of how they grew out of noise")
    parser.add_argument("--npz", type=path, metavar="FILE",
                        help="also write arrays: images uint8 [N, H, W] ([N, 3, H, W] in colour), labels int64 [N]")
    parser.add_argument("--out", type=path, default="samples", metavar="DIR", help="where grid.png and process.gif go")
    return add_sampling_flags(parser).parse_args()


def main():
    # The model
    flags = parse_flags()
    grid, gif = (Path(flags.out) / name for name in ("grid.png", "process.gif"))
    for target in filter(None, (grid, gif, flags.npz)):  # now, and not after an hour of sampling
        check_target(target)
    model = load_model(flags.checkpoint, pick_device(flags.device), flags.ema, flags.precision)
    batches = generate(model, flags.n, sampler=flags.sampler, steps=flags.steps, guidance=flags.guidance,
                       guidance_interval=flags.guidance_interval, seed=flags.seed, batch_size=flags.batch_size,
                       clip=flags.clip, digit=flags.digit)

    # The images, a batch at a time, and for the GIF what the first of them were on the way
    done, shown, frames, size = 0, [], [], model.settings["image_size"]
    with contextlib.ExitStack() as stack:
        if flags.npz:
            shape = (flags.n, size, size) if model.settings["image_channels"] == 1 else (flags.n, 3, size, size)
            write = stack.enter_context(npz_writer(flags.npz, shape))
        bar = stack.enter_context(tqdm(total=flags.n, unit="image", disable=None))
        for labels, process in batches:
            in_gif = max(0, min(flags.batch_size, GIF_IMAGES - done)) if flags.gif else 0
            states, signal = [to_uint8(process.x_T[:in_gif]).cpu()], []
            for t, x, _ in process:
                if in_gif:
                    states.append(to_uint8(x[:in_gif]).cpu())
                    signal.append(model.ddpm.alpha_bars[t].sqrt().item())  # in the x before this step
            images = finished(x)
            if flags.npz:
                write(images, torch.full((len(images),), -1) if labels is None else labels)
            if done < GRID_IMAGES:
                shown.append(images)
            if in_gif:
                frames.append(gif_frames(states, signal + [1.0]))
            done += len(images)
            bar.update(len(images))

    # The pictures
    picture = make_grid(torch.cat(shown)[:GRID_IMAGES])
    save_png(grid, upscale(picture, max(1, 720 // max(picture.shape[:2]))))
    made = [grid if flags.n <= GRID_IMAGES else f"{grid} (the first {GRID_IMAGES})"]
    if flags.gif:
        pictures = [make_grid(torch.cat(parts)) for parts in zip(*frames)]
        save_gif(gif, [upscale(picture, max(1, 245 // max(picture.shape[:2]))) for picture in pictures])
        made.append(gif)
    if flags.npz:
        made.append(flags.npz)
    print(*made, sep="\n")  # after all is written: whoever reads it may have gone


if __name__ == "__main__":
    run(main)
