"""Edits images with a trained model: python edit.py inpaint --image test:17 --mask right.

    inpaint  fills in part of an image, so that it matches the rest
    vary     noises an image part of the way, and denoises it again
    blend    morphs one image into another, through images in between
"""
import utils  # first: Ctrl-C while the rest is imported prints one line, not a traceback
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ddpm import SAMPLERS, ImageNoise
from diffusion_model import guided
from diffusion_schedules import sampling_timesteps
from utils.checkpoint import load_model
from utils.cli import Parser, UsageError, integer, number, path, pick_device, run
from utils.data import DATASETS, finished, load_dataset, to_float
from utils.files import check_target, npz_writer
from utils.pictures import GRID_GREY, enlarged, fit_picture, make_grid, read_mask, read_picture, save_gif, save_png
from utils.settings import (EVERYWHERE, SAMPLER, add_sampling_flags, check_labels, check_steps, default_guidance,
                            guide_of, guided_steps, interval_of, sampling_defaults)

# Flags that only some edits have a use for.
ONLY_FOR = {"mask": ["inpaint"], "rounds": ["inpaint"], "strength": ["vary"], "sampler": ["vary"], "to": ["blend"],
            "frames": ["blend"], **dict.fromkeys(["n", "digit", "guide", "guidance", "guidance_interval", "clip"],
                                                 ["inpaint", "vary"])}
STEPS = 50  # of inpaint and blend


def inpaint(model, image, hole, label, indices, flags):
    """Images [B, C, H, W], numbered `indices`: `image` float [1, C, H, W], filled in where `hole` bool [H, W] is."""
    noise_fn, image = ImageNoise(flags.seed, indices), image.expand(len(indices), -1, -1, -1)
    visited, predict_noise = plan(model, "logsnr", flags.steps or min(STEPS, model.ddpm.T), model.ddpm.T, label,
                                  len(indices), flags, rounds=flags.rounds)
    return last_image(model.ddpm.inpaint(predict_noise, noise_fn(image), image, ~hole, timesteps=visited,
                                         rounds=flags.rounds, noise_fn=noise_fn, clip=flags.clip), len(visited))


def vary(model, image, label, indices, flags):
    """Images [B, C, H, W], numbered `indices`: `image` float [1, C, H, W], noised a part of the way and sampled back.
    SDEdit, Meng et al. 2022 (arXiv 2108.01073), algorithm 1, for our process."""
    noise_fn, image = ImageNoise(flags.seed, indices), image.expand(len(indices), -1, -1, -1)
    T, sampler = math.ceil(round(flags.strength * model.ddpm.T, 6)), flags.sampler or SAMPLER
    if T == 0:
        return image
    steps, *_ = sampling_defaults(model, sampler, flags.steps, 1)
    steps = max(1, min(T, round(steps * T / model.ddpm.T)))  # fewer, as the way is shorter
    visited, predict_noise = plan(model, SAMPLERS[sampler].spacing, steps, T, label, len(image), flags)
    noise, t = noise_fn(image), torch.full((len(image),), T - 1, device=image.device)
    # At full strength there is nothing left of the image, not even the little that is left at t = T-1.
    x = noise if flags.strength == 1 else model.ddpm.q_sample(image, t, noise)
    return last_image(model.ddpm.sample(predict_noise, x, sampler=sampler, timesteps=visited, noise_fn=noise_fn,
                                        clip=flags.clip), len(visited))


def blend(model, images, flags):
    """Images [frames, C, H, W] from one of `images` float [2, C, H, W] to the other: both are taken back to the noise
    from which "ddim" would make them, and it makes images of the noise in between. Without labels."""
    steps = flags.steps or min(STEPS, model.ddpm.T)
    if steps < 2:
        raise UsageError("blend needs at least 2 steps")
    visited, predict_noise = plan(model, "logsnr", steps, model.ddpm.T, None, 2, flags)
    # Pure black stays black and has no noise to go back to. So images first get a little, that of the last timestep.
    t = torch.full((2,), visited[-1], device=images.device)
    a, b = model.ddpm.invert(predict_noise, model.ddpm.q_sample(images, t, ImageNoise(flags.seed, range(2))(images)),
                             timesteps=visited)
    share = torch.linspace(0, 1, flags.frames, device=images.device).view(-1, 1, 1, 1)
    # Along the great circle, so that the length stays that of noise (Shoemake 1985):
    #   x = (sin((1 - share) angle) a + sin(share angle) b) / sin(angle)
    angle = torch.acos(F.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-0.9999, 0.9999))
    x = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
    return torch.cat([last_image(model.ddpm.sample(predict_noise, part, sampler="ddim", timesteps=visited),
                                 len(visited)) for part in x.split(flags.batch_size)])


def plan(model, spacing, steps, T, label, n, flags, rounds=1):
    """The timesteps to visit, `steps` of the first T, as a list; and the model as a function of (x_t, t), guided as the
    flags say: without a label only by its early self, and not at all in a blend."""
    check_steps(model, steps)
    early = guide_of(model, flags.guide)
    visited = sampling_timesteps(T, steps, spacing, model.ddpm.alpha_bars[:T])
    if flags.edit == "blend" or label is None and not early:
        return visited.tolist(), model
    guidance = default_guidance(model, early) if flags.guidance is None else flags.guidance
    low, high = interval_of(model, visited, guidance, flags.guidance_interval, early)
    if (low, high) == EVERYWHERE and flags.guidance is None and not flags.guidance_interval:
        guidance = 1  # then there is mostly so little noise that it is settled which digit it is
    acts = [act for act in guided_steps(model, visited, low, high) for _ in range(rounds)]
    labels = None if label is None else torch.full((n,), label, device=next(model.network.parameters()).device)
    return visited.tolist(), guided(model, labels, guidance, acts, early)


def last_image(process, steps):
    """The last x of a process, with a bar."""
    for _, x, _ in tqdm(process, total=steps, unit="step", leave=False, disable=None):
        pass
    return x


def load_source(source, model, root="data"):
    """The image that --image or --to names, uint8 [1, C, H, W] as the model has them; its label (None: not known)."""
    channels, size = model.settings["image_channels"], model.settings["image_size"]
    if not (numbered := re.fullmatch("(train|test):([0-9]+)", source)):
        on_black = model.settings.get("dataset", "MNIST") in ("MNIST", "EMNIST", "KMNIST", "QMNIST")
        return fit_picture(read_picture(source), channels, size, source, on_black), None
    dataset, i = model.settings.get("dataset", "MNIST"), int(numbered[2])
    if str(dataset) not in DATASETS:
        raise UsageError(f"{source}: the model was trained on images of its own; give a picture")
    images, labels = load_dataset(dataset, root, train=numbered[1] == "train")
    if i >= len(images):
        raise UsageError(f"{source}: {dataset} has {len(images):,} such images, numbered from 0")
    image, label = images[i:i + 1], labels[i].item()
    if image.shape[1:] != (channels, size, size) or label >= max(1, model.settings["classes"]):
        raise ValueError(f"{source}: the model was trained on other images than {dataset}; give a picture")
    return image, label if model.num_classes else None


def parse_flags():
    """The command line as a namespace."""
    parser = add_sampling_flags(Parser(__doc__))
    parser.add_argument("edit", choices=("inpaint", "vary", "blend"), help="fill in, vary or morph; by default "
                        f"vary uses --sampler {SAMPLER}; inpaint and blend take {STEPS} --steps and no --sampler")
    parser.add_argument("--image", required=True, metavar="SRC", type=path, help="what to edit: a picture, or test:17 "
                        "or train:17 for an image of the data set")
    parser.add_argument("--mask", metavar="PART", type=path, help="what inpaint fills in: left, right, top, bottom, "
                        "centre, or a picture of the image's size, whose white part is filled in")
    parser.add_argument("--rounds", type=integer(1, 1000), default=5, metavar="N", help="times inpaint runs each step")
    parser.add_argument("--strength", type=number(0, 1), default=0.7, metavar="S", help="how far vary noises the image "
                        "(and samples it back, in that share of --steps): 0 not at all, 1 until nothing is left of it")
    parser.add_argument("--to", metavar="SRC", type=path, help="the image that blend goes to")
    parser.add_argument("--frames", type=integer(2, 200), default=12, metavar="N", help="images in a blend")
    parser.add_argument("--digit", type=integer(0, 9999), metavar="D", help="class to draw; default: the image's own")
    parser.add_argument("--n", type=integer(1, 400), default=8, metavar="N", help="how many images")
    parser.add_argument("--data", type=path, default="data", metavar="DIR", help="where data sets are, as in train.py")
    parser.add_argument("--npz", type=path, metavar="FILE", help="also write arrays, as sample.py does")
    parser.add_argument("--out", type=path, default="samples", metavar="DIR", help="where the pictures go")
    parser.set_defaults(sampler=None)
    flags = parser.parse_args()
    for name, edits in ONLY_FOR.items():
        if flags.edit not in edits and getattr(flags, name) != parser.get_default(name):
            option = "no-clip" if name == "clip" else name.replace("_", "-")
            parser.error(f"{flags.edit} has no use for --{option}; leave it out")
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
    image, label = load_source(flags.image, model, flags.data)
    label = None if flags.edit == "blend" else label if flags.digit is None else flags.digit
    guidance, early = 1 if flags.guidance is None else flags.guidance, guide_of(model, flags.guide)
    unknown = label is None and model.num_classes > 0
    if unknown and not early and (guidance not in (0, 1) or flags.guidance_interval or flags.guide):
        raise UsageError("guidance by the label needs one, and this image's is not known; give one with --digit")
    if unknown and not model.supports_guidance:
        raise UsageError("the model was trained with labels only, and " + (
            "a blend has none" if flags.edit == "blend" else "this image's is not known; give one with --digit"))
    check_labels(model, flags.digit, guidance, early)
    label = None if guidance == 0 else label

    # The images, and in the grid before and after them what they come from
    before, after = [image], []
    x0, batches = to_float(image).to(device), torch.arange(flags.n).split(flags.batch_size)
    if flags.edit == "inpaint":
        hole = read_mask(flags.mask, model.settings["image_size"])
        before.append(torch.where(hole, GRID_GREY, image))
        images = [inpaint(model, x0, hole.to(device), label, batch.tolist(), flags) for batch in batches]
    elif flags.edit == "vary":
        images = [vary(model, x0, label, batch.tolist(), flags) for batch in batches]
    else:
        after = [load_source(flags.to, model, flags.data)[0]]
        images = [blend(model, torch.cat([x0, to_float(after[0]).to(device)]), flags)]
    images = finished(torch.cat(images))

    shown = torch.cat([*before, images, *after])
    picture, made = make_grid(shown, columns=len(shown) if len(shown) <= 20 else None), [grid]
    save_png(grid, enlarged(picture, 960))
    if flags.edit == "blend":
        save_gif(gif, [enlarged(make_grid(image[None]), 256) for image in torch.cat([images, images.flip(0)])])
        made.append(gif)
    if flags.npz:
        with npz_writer(flags.npz, (len(images), *images.shape[1 if images.shape[1] == 3 else 2:])) as write:
            write(images, torch.full((len(images),), -1 if label is None else label))
        made.append(flags.npz)
    print(*made, sep="\n")


if __name__ == "__main__":
    run(main)
