"""Edits images with a trained model: python edit.py inpaint --image test:17 --mask right.

    inpaint  fills in a part of an image, so that it fits the rest
    vary     noises an image a part of the way, and samples it back
    blend    goes from one image to another, over images in between
"""
import utils  # first, so that Ctrl-C during the other imports is one line too
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ddpm import ImageNoise
from diffusion_model import guided
from diffusion_schedules import sampling_timesteps
from sample import finished
from utils.checkpoint import load_model
from utils.cli import Parser, UsageError, integer, number, path, pick_device, run
from utils.data import load_dataset, to_float, to_uint8
from utils.files import check_target, npz_writer
from utils.pictures import fit, make_grid, read_picture, save_gif, save_png, upscale
from utils.settings import add_sampling_flags, noise_level, sampling_defaults

# What only some edits have a use for.
ONLY_FOR = {"mask": ("inpaint",), "rounds": ("inpaint",), "strength": ("vary",), "sampler": ("vary",),
            "to": ("blend",), "frames": ("blend",), "n": ("inpaint", "vary"), "digit": ("inpaint", "vary"),
            "guidance": ("inpaint", "vary"), "guidance_interval": ("inpaint", "vary")}
STEPS = 50  # of inpaint and blend


def inpaint(model, image, mask, label, indices, flags):
    """Images [B, C, H, W] of these numbers that are `image` float [1, C, H, W] where `mask` bool [H, W] is False."""
    noise_fn = ImageNoise(flags.seed, indices)
    steps = flags.steps or min(STEPS, model.ddpm.T)
    visited, predict_noise = plan(model, "ddpm", steps, label, len(indices), flags, rounds=flags.rounds)
    known = image.expand(len(indices), -1, -1, -1)
    return last(model.ddpm.inpaint(predict_noise, noise_fn(known), known, ~mask, timesteps=visited, clip=flags.clip,
                                   rounds=flags.rounds, noise_fn=noise_fn), len(visited))


def vary(model, image, label, indices, flags):
    """Images [B, C, H, W] of these numbers made of `image` float [1, C, H, W], noised a part of the way and sampled
    back: SDEdit, Meng et al. 2022 (arXiv 2108.01073), algorithm 1."""
    noise_fn, image = ImageNoise(flags.seed, indices), image.expand(len(indices), -1, -1, -1)
    start = math.ceil(flags.strength * model.ddpm.T) - 1
    if start < 0:
        return image
    visited, predict_noise = plan(model, flags.sampler, flags.steps, label, len(image), flags, start=start)
    noise = noise_fn(image)
    # At full strength there is nothing left of the image, not even the little that x_T has of it.
    t = torch.full((len(image),), start, device=image.device)
    x = noise if flags.strength == 1 else model.ddpm.q_sample(image, t, noise)
    return last(model.ddpm.sample(predict_noise, x, sampler=flags.sampler, timesteps=visited, noise_fn=noise_fn,
                                  clip=flags.clip), len(visited))


def blend(model, image, other, flags):
    """Images [frames, C, H, W] from one image float [1, C, H, W] to another: both are taken back to the noise that
    "ddim" makes them of, and it makes images of the noise in between. Without labels."""
    visited, predict_noise = plan(model, "ddim", flags.steps or min(STEPS, model.ddpm.T), None, 2, flags)
    a, b = model.ddpm.invert(predict_noise, torch.cat([image, other]), timesteps=visited, clip=flags.clip)
    share = torch.linspace(0, 1, flags.frames, device=a.device).view(-1, 1, 1, 1)
    # On the great circle from a to b, where noise is as long as noise is (Shoemake 1985):
    #   x = (sin((1 - share) angle) a + sin(share angle) b) / sin(angle)
    angle = torch.acos(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-0.9999, 0.9999))
    x = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
    return torch.cat([last(model.ddpm.sample(predict_noise, part, sampler="ddim", timesteps=visited, clip=flags.clip),
                           len(visited)) for part in x.split(flags.batch_size)])


def plan(model, sampler, steps, label, n, flags, start=None, rounds=1):
    """The timesteps to visit, from `start` (None: from the last one) down, in their share of `steps`; and the model,
    guided as --guidance has it, as a function of (x_t, t)."""
    steps, guidance, (low, high) = sampling_defaults(model, sampler, steps, flags.guidance, flags.guidance_interval)
    T, alpha_bars = model.ddpm.T if start is None else start + 1, model.ddpm.alpha_bars
    visited = sampling_timesteps(T, max(1, min(T, round(steps * T / model.ddpm.T))), "logsnr", alpha_bars[:T])
    acts = [low <= noise_level(alpha_bars[t]) <= high for t in visited for _ in range(rounds)]
    if label is None:
        return visited.tolist(), lambda x_t, t: model(x_t, t)
    labels = torch.full((n,), label, device=next(model.network.parameters()).device)
    return visited.tolist(), guided(model, labels, guidance, acts)


def last(process, steps):
    """The last x of a process, with a bar."""
    *_, (_, x, _) = tqdm(process, total=steps, unit="step", leave=False, disable=None)
    return x


# ----------------------------------------------------------------------------------------------------------------------
# What to edit

def load_source(source, model):
    """The image that --image or --to names, uint8 [1, C, H, W] as the model has them; its label (None: not known)."""
    channels, size = model.settings["image_channels"], model.settings["image_size"]
    dataset = model.settings.get("dataset", "MNIST")
    if numbered := re.fullmatch("(train|test):([0-9]+)", source):
        images, labels = load_dataset(dataset, train=numbered[1] == "train")
        i = int(numbered[2])
        if i >= len(images):
            raise UsageError(f"{source}: {dataset} has {len(images):,} such images, from 0")
        return images[i:i + 1], labels[i].item() if model.num_classes else None
    return fit(read_picture(source), channels, size, source), None


def load_mask(mask, size):
    """What to fill in, bool [size, size]: half of the image, its middle, or what is white in a picture."""
    half, quarter, all_of_it = size // 2, size // 4, slice(None)
    parts = {"left": (all_of_it, slice(half)), "right": (all_of_it, slice(half, None)), "top": (slice(half), all_of_it),
             "bottom": (slice(half, None), all_of_it), "centre": (slice(quarter, -quarter), slice(quarter, -quarter))}
    if mask in parts:
        filled = torch.zeros(size, size, dtype=torch.bool)
        filled[parts[mask]] = True
        return filled
    picture = read_picture(mask).float().mean(dim=(0, 1))
    height, width = picture.shape
    if (height, width) != (size, size):
        raise ValueError(f"the mask {mask} has {width}x{height} pixels, and must have {size}x{size}")
    return picture > 127


# ----------------------------------------------------------------------------------------------------------------------

def parse_flags():
    """The command line as a namespace."""
    parser = Parser(__doc__)
    parser.add_argument("edit", choices=("inpaint", "vary", "blend"), help="fill in a part; noise it and sample it "
                        "back; go over to another image")
    parser.add_argument("--image", required=True, metavar="SRC", type=path, help="what to edit: a picture, or test:17 "
                        "or train:17 for an image of the data set")
    parser.add_argument("--mask", metavar="PART", type=path, help="what inpaint fills in: left, right, top, bottom, "
                        "centre, or what is white in a picture of the image's size")
    parser.add_argument("--rounds", type=integer(1, 1000), default=5, metavar="N",
                        help="how often inpaint makes each step, for the parts to fit")
    parser.add_argument("--strength", type=number(0, 1), default=0.5, metavar="S",
                        help="how far vary noises the image: 0 not at all, 1 until nothing is left of it")
    parser.add_argument("--to", metavar="SRC", type=path, help="the image that blend goes to")
    parser.add_argument("--frames", type=integer(2, 1000), default=12, metavar="N", help="images of blend, both ends "
                        "included")
    parser.add_argument("--digit", type=integer(0, 9999), metavar="D", help="the class of the new image; default: that "
                        "of the old one, if it is known")
    parser.add_argument("--n", type=integer(1, 10_000), default=8, metavar="N", help="how many images")
    parser.add_argument("--npz", type=path, metavar="FILE", help="also write arrays, as sample.py does")
    parser.add_argument("--out", type=path, default="samples", metavar="DIR", help="where the pictures go")
    flags = add_sampling_flags(parser).parse_args()
    for name, edits in ONLY_FOR.items():
        if flags.edit not in edits and getattr(flags, name) != parser.get_default(name):
            parser.error(f"{flags.edit} has no use for --{name}; leave it out".replace("_", "-"))
    for edit, name in ("inpaint", "mask"), ("blend", "to"):
        if flags.edit == edit and not getattr(flags, name):
            parser.error(f"{edit} needs --{name}")
    return flags


def main():
    flags = parse_flags()
    grid, gif = (Path(flags.out) / f"{flags.edit}.{kind}" for kind in ("png", "gif"))
    for target in filter(None, (grid, gif if flags.edit == "blend" else None, flags.npz)):
        check_target(target)
    device = pick_device(flags.device)
    model = load_model(flags.checkpoint, device, flags.ema, flags.precision)
    if flags.digit is not None and flags.digit >= model.num_classes:
        known = f"0 to {model.num_classes - 1}" if model.num_classes else "no classes"
        raise UsageError(f"--digit {flags.digit}: the model knows {known}")
    image, label = load_source(flags.image, model)
    label = label if flags.digit is None else flags.digit
    x0 = to_float(image).to(device)

    # The images, and in the grid before and after them what they come from
    before, after = [image], []
    batches = torch.arange(flags.n).split(flags.batch_size)
    if flags.edit == "inpaint":
        mask = load_mask(flags.mask, model.settings["image_size"])
        before.append(torch.where(mask, 48, image))  # grey, as the lines of the grid
        images = [inpaint(model, x0, mask.to(device), label, batch.tolist(), flags) for batch in batches]
    elif flags.edit == "vary":
        images = [vary(model, x0, label, batch.tolist(), flags) for batch in batches]
    else:
        after, label = [load_source(flags.to, model)[0]], None
        images = [blend(model, x0, to_float(after[0]).to(device), flags)]
    images = finished(torch.cat(images))

    shown = torch.cat([*before, images, *after])
    picture, made = make_grid(shown, columns=len(shown) if len(shown) <= 20 else None), [grid]
    save_png(grid, upscale(picture, max(1, 960 // max(picture.shape[:2]))))
    if flags.edit == "blend":
        save_gif(gif, [upscale(make_grid(image[None]), 8) for image in torch.cat([images, images.flip(0)])])
        made.append(gif)
    if flags.npz:
        with npz_writer(flags.npz, (len(images), *images.shape[1 if images.shape[1] == 3 else 2:])) as write:
            write(images, torch.full((len(images),), -1 if label is None else label))
        made.append(flags.npz)
    print(*made, sep="\n")


if __name__ == "__main__":
    run(main)
