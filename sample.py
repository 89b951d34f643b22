"""Draws images from a trained model: python sample.py --n 64 --gif."""
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import atomic_write, load_model
from cli import Parser, add_sampling_flags, generate, integer, pick_device, run
from data import enlarge, make_grid, save_gif, save_png, to_uint8

GRID_IMAGES = 400  # a larger grid shows nothing more; --npz has them all


def parse_flags():
    """The command line as a namespace."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=integer(1, 1_000_000), default=64, metavar="N", help="how many images")
    parser.add_argument("--digit", type=integer(0, 9999), metavar="D",
                        help="the class of all images; default: 0, 1, 2, ... in turn")
    parser.add_argument("--gif", action="store_true", help="write the way from noise to images too")
    parser.add_argument("--npz", metavar="FILE", help="write the images as arrays too: images uint8 [N, H, W], labels")
    parser.add_argument("--out", default="samples", metavar="DIR", help="where grid.png and process.gif go")
    add_sampling_flags(parser)
    return parser.parse_args()


def main():
    flags = parse_flags()
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)  # found out now, not after an hour of sampling
    model = load_model(flags.checkpoint, pick_device(flags.device), ema=flags.ema)
    batches = generate(model, flags.n, sampler=flags.sampler, steps=flags.steps, guidance=flags.guidance,
                       seed=flags.seed, batch_size=flags.batch_size, clip=flags.clip, digit=flags.digit)

    images, labels, film = [], [], []
    with tqdm(total=flags.n, unit="image", disable=None) as bar:
        for batch_labels, process in batches:
            filmed = min(flags.batch_size, flags.n, GIF_IMAGES) if flags.gif and not film else 0
            for t, x, x0_hat in process:
                if filmed:
                    film.append(to_uint8(x[:filmed]).cpu())
            if not torch.isfinite(x).all():
                raise RuntimeError("the samples have NaN or infinite pixels: was the model trained to the end? "
                                   "Without --no-clip they stay in range")
            images.append(to_uint8(x).cpu())  # the only thing kept: memory grows by 784 bytes an image
            labels.append(batch_labels if batch_labels is not None else torch.full((len(x),), -1))
            bar.update(len(x))
    images, labels = torch.cat(images), torch.cat(labels)
