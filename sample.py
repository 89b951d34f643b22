"""Draws images from a trained model: python sample.py --n 64 --gif."""
import utils  # first: Ctrl-C while the rest is imported prints one line, not a traceback
import contextlib
import math
import sys
from functools import partial

import torch

from ddpm import SAMPLERS, ImageNoise, to_device
from diffusion_model import guided
from diffusion_schedules import sampling_timesteps
from utils.checkpoint import load_model
from utils.cli import Bar, Parser, integer, path, pick_device, run, say
from utils.data import class_of, finished, to_uint8
from utils.files import check_target, npz_writer
from utils.pictures import Gallery
from utils.ranks import RANK, WORLD, in_order, join
from utils.settings import SAMPLER, add_sampling_flags, check_labels, guided_steps, sampling_defaults


def generate(model, n, *, sampler=SAMPLER, steps=None, guidance=None, guidance_interval=None, guide=None, seed=0,
             batch_size=64, clip=True, digit=None, share=(0, 1)):
    """Samples n images, a batch at a time. Image i depends on (seed, i) and the settings, not on n or batch_size.

    Args:
        model: a diffusion_model.Model.
        steps, guidance, guidance_interval (lowest and highest noise level to guide at), guide ("early" or "label"):
            None: as sampling_defaults.
        digit: the class of all images; None: the classes in the shares they have in the training data.
        share: (k, m): only the batches k, k + m, k + 2m and so on: one process's part.
    Returns:
        an iterator of (labels, process), one per batch. labels: int64 [B], or None at guidance 0 or if the model knows
        no classes. process: the iterator of (t, x [B, C, H, W], x0_hat) that DDPM.sample returns.
    Raises:
        UsageError: as sampling_defaults and check_labels.
    """
    settings, device, classes = model.settings, next(model.network.parameters()).device, model.num_classes
    steps, guidance, (low, high), early = sampling_defaults(model, sampler, steps, guidance, guidance_interval, guide)
    check_labels(model, digit, guidance, early)
    timesteps = sampling_timesteps(model.ddpm.T, steps, SAMPLERS[sampler].spacing, model.ddpm.alpha_bars)
    acts = guided_steps(model, timesteps, low, high)
    class_shares = settings.get("class_shares") or [1.0] * classes
    shape = settings["image_channels"], settings["image_size"], settings["image_size"]

    def batches():
        for start in range(share[0] * batch_size, n, share[1] * batch_size):
            indices = range(start, min(start + batch_size, n))
            labels = None if not classes or guidance == 0 else torch.tensor(  # at 0 without labels
                [class_of(i, class_shares) if digit is None else digit for i in indices])
            predict_noise = guided(model, None if labels is None else to_device(labels, device), guidance, acts, early)
            noise_fn = ImageNoise(seed, indices)
            x_T = noise_fn(torch.empty(len(indices), *shape, device=device))
            yield labels, model.ddpm.sample(predict_noise, x_T, sampler=sampler, timesteps=timesteps,
                                            noise_fn=noise_fn, clip=clip)

    return batches()  # a generator, so its body runs later; the checks above run now


def follow(batches, n, wanted=set):
    """Carries out the batches of `generate`: an iterator of images uint8 [B, C, H, W], labels int64 [B] or None, and
    a list of (t, x_t, x0_hat), uint8, of those that are among the first n images, for each t in wanted(timesteps)."""
    for labels, process in batches:
        steps, x_t, chosen = [], process.x_T, wanted(process.timesteps)
        for t, x, x0_hat in process:
            if n > 0 and t in chosen:
                steps.append((t, to_uint8(x_t[:n]).cpu(), to_uint8(x0_hat[:n]).cpu()))
            x_t = x
        n -= len(x)
        yield finished(x), labels, steps


def draw(model, n, name="samples", batch_size=64, together=False, **settings):
    """n samples of a model, with the settings of `generate`: images uint8 [n, C, H, W], labels int64 [n] or None. If
    several processes draw them `together`, the first one gets them, and the others get None and None."""
    share, drawn, done = (RANK, WORLD) if together else (0, 1), [], 0
    batches = generate(model, n, batch_size=batch_size, share=share, **settings)
    with Bar(total=n, desc=name, unit="image", leave=False) as bar:
        for images, labels, _ in in_order(follow(batches, 0), math.ceil(n / batch_size), share):
            drawn.append((images, labels))
            done += len(images)
            bar.advance(len(images), f"{name}: {done:,} of {n:,} images")
    if not drawn:
        return None, None
    images, labels = zip(*drawn)
    return torch.cat(images), None if labels[0] is None else torch.cat(labels)


def parse_flags():
    """The command line as a namespace."""
    parser = Parser(__doc__)
    parser.add_argument("--n", type=integer(1, 1_000_000), metavar="N",
                        help="how many images (default: 64); per class with --classes (default: 8)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--digit", type=integer(0, 9999), metavar="D",
                       help="the class of all images; default: all classes, in their shares of the training data")
    which.add_argument("--classes", action="store_true", help="one row per class (if --n is 40 or less); "
                       "the images of a column share their noise")
    parser.add_argument("--gif", action="store_true", help="also write a GIF of how they grew out of noise")
    parser.add_argument("--trajectory", action="store_true", help="also write a picture of the first images on the "
                        "way: x_t and, below it, the x0_hat that the model predicted from it")
    parser.add_argument("--npz", type=path, metavar="FILE",
                        help="also write arrays: images uint8 [N, H, W] ([N, 3, H, W] in colour), labels int64 [N]")
    parser.add_argument("--png", type=path, metavar="DIR", help="also write each image to a file of its own, by number")
    parser.add_argument("--out", type=path, default="samples", metavar="DIR",
                        help="where grid.png, process.gif and trajectory.png go")
    flags = add_sampling_flags(parser).parse_args()
    flags.n = flags.n or (8 if flags.classes else 64)
    return flags


def main():
    # The model, and the pictures that will be made of its images
    flags = parse_flags()
    gallery = Gallery(flags.out, gif=flags.gif, trajectory=flags.trajectory, png=flags.png,
                      columns=flags.n if flags.classes and flags.n <= 40 else None)
    if flags.npz:
        check_target(flags.npz)  # now, and not after an hour of sampling
    model = load_model(flags.checkpoint, join(pick_device(flags.device)), flags.ema, flags.precision)
    digits = range(max(1, model.num_classes)) if flags.classes else [flags.digit]
    n, size = flags.n * len(digits), model.settings["image_size"]
    if n > Gallery.GRID and not (flags.npz or flags.png) and RANK == 0:
        say(f"only the first {Gallery.GRID} of {n:,} images are kept, in the grid; --npz FILE or --png DIR keeps all",
            sys.stderr)

    # The images, a batch at a time. Several processes share the batches of a class, and the first one gets them all.
    rows = [generate(model, flags.n, sampler=flags.sampler, steps=flags.steps, guidance=flags.guidance,
                     guidance_interval=flags.guidance_interval, guide=flags.guide, seed=flags.seed, clip=flags.clip,
                     batch_size=flags.batch_size, digit=digit, share=(RANK, WORLD)) for digit in digits]
    with contextlib.ExitStack() as stack, Bar(total=n, unit="image") as bar:
        if flags.npz and RANK == 0:
            shape = (n, size, size) if model.settings["image_channels"] == 1 else (n, 3, size, size)
            write = stack.enter_context(npz_writer(flags.npz, shape))
        for row in rows:
            batches = follow(row, gallery.followed - gallery.done, partial(gallery.wanted, model.ddpm.alpha_bars))
            for images, labels, steps in in_order(batches, math.ceil(flags.n / flags.batch_size)):
                gallery.add(images, steps)
                if flags.npz:
                    write(images, torch.full((len(images),), -1) if labels is None else labels)
                bar.advance(len(images), f"{gallery.done:,} of {n:,} images")
    if RANK == 0:
        print(*gallery.save(model.ddpm.alpha_bars), *filter(None, [flags.npz]), sep="\n")  # last: stdout may be gone


if __name__ == "__main__":
    run(main)
