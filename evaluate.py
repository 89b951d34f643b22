"""How good are the samples? python evaluate.py measures the shipped model, --npz FILE any generator of 28x28 digits.

Most figures stand beside the same figures for real digits and for pure noise, from the same run. Most compare with the
10,000 test digits, which train.py never trains on.

The story: read or draw the samples, look at them through the shipped classifier, compare them with the test digits
(Frechet and kernel distance, precision and recall, density and coverage), with the training digits (are they copies?),
pixel by pixel (black where digits are black, of one ink, in a box of 20 pixels, centred?), and let a network of its own
try to tell them apart. With a checkpoint there is also the bound on its likelihood.
"""
import utils  # first: Ctrl-C while the rest is imported prints one line, not a traceback
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ddpm import SAMPLERS
from sample import draw
from utils.checkpoint import load_model
from utils.classifier import CLASSIFIER_SHA256, classify, load_classifier, train_classifier
from utils.cli import Parser, UsageError, integer, path, pick_device, run, say, tolerated
from utils.data import DATASETS, class_of, load_dataset, pick, read_npz, to_uint8
from utils.files import check_target, write_json
from utils.metrics import (FEWEST, Digits, bits_figures, class_figures, distribution_figures, frechet_spread,
                           memorisation_figures, nearest_neighbours, pixel_figures, real_draws, reaches,
                           tell_figures, two_sample_figures)
from utils.pictures import make_grid, plot_sweep, read_folder, save_png, upscale
from utils.ranks import RANK, WORLD, join
from utils.settings import EVERYWHERE, add_sampling_flags, check_labels, sampling_defaults

PAIRS = 64  # in the picture of nearest neighbours

# The steps that each sampler is swept over. "ddpm" needs many; those without noise gain little beyond 20.
SWEEP_STEPS = {"dpm++sde": (5, 10, 15, 20, 30, 50), "ddpm": (20, 100, 250, 1000)}
OTHER_STEPS = (5, 10, 20, 50)
SWEEP_GUIDANCE = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0, 3.0)


def load_digit_model(flags):
    """The Model of --checkpoint.

    Raises:
        FileNotFoundError, ValueError: the file is not sound, or the model makes something other than MNIST digits.
    """
    model = load_model(flags.checkpoint, pick_device(flags.device), flags.ema, flags.precision)
    settings, dataset = model.settings, model.settings.get("dataset", "MNIST")
    if (settings["image_channels"], settings["image_size"]) != (1, 28) or dataset != "MNIST":
        known = type(dataset) is str and dataset in DATASETS
        raise ValueError(f"{flags.checkpoint} was trained on {dataset if known else 'other images'}; "
                         "classifier and references are MNIST's, so only models of MNIST digits can be measured")
    return model


# ----------------------------------------------------------------------------------------------------------------------
# The whole evaluation

# key, name in the table, what a reader should know
ROWS = (
    ("frechet", "Frechet distance", "0 is best; beside it, that of as many real digits"),
    ("frechet_ratio", "  over that of real digits", "1: as good as they are; compare it at the same n only"),
    ("kid", "kernel distance (KID)", "0 is best"),
    ("precision", "precision", "share of samples among real digits"),
    ("recall", "recall", "share of real digits among samples"),
    ("density", "density", "real digits around a sample"),
    ("coverage", "coverage", "share of real digits with a sample near"),
    ("class_entropy", "class entropy", "1: all digits equally often"),
    ("confident", "classifier is confident", "share with a top probability above 0.9"),
    ("label_agreement", "classifier agrees", "share classified as their label"),
    ("nearest_neighbour_ratio", "nearest training digit", "1: as far as test digits, 0: copies"),
    ("copied", "  nearer than any test digit", "share; 0 is best"),
    ("two_sample_accuracy", "told apart by a network", "0.5: it cannot tell them from real digits, 1: it always can"),
    ("box", "longest side is 20 pixels", "share; here and in the next six rows, closest to real is best"),
    ("centred", "centre of mass in the middle", "share; within half a pixel of (14, 14)"),
    ("specks", "isolated pixels", "per image"),
    ("ink", "one shade of white", "of the pixels from 252 to 255 the share that has the commonest level"),
    ("levels", "grey levels", "distinct ones in an image"),
    ("zeros", "pixels that are 0", "share"),
    ("faint", "pixels from 1 to 12", "share"),
    ("grey_distance", "histogram of grey levels", "0: the same as that of test digits, 1: nothing in common"),
    ("bits_per_dim", "bits per dimension", "an upper bound, without labels, over all T timesteps; 8: knows nothing"),
    ("bits_prior", "  of which L_T, the prior", ""),
    ("bits_diffusion", "  of which L_{T-1} ... L_1", ""),
    ("bits_decoder", "  of which L_0, the decoder", ""),
)
# How far a figure may be off: a standard error over samples (for the Frechet distance of real digits, the standard
# deviation over the sets of them), or the lowest and the highest of three networks on the same samples.
SPREAD = {"frechet": ("_stderr",), "frechet_ratio": ("_stderr",), "kid": ("_stderr",),
          "nearest_neighbour_ratio": ("_stderr",), "two_sample_accuracy": ("_low", "_high"),
          "bits_per_dim": ("_stderr",)}


def evaluate(images, labels=None, *, seed=0, device="cpu", pairs=None):
    """Measures samples, and with them real digits and noise at the same n.

    Args:
        images: uint8 [N, 1, 28, 28], N <= 60,000, in random order (see `pick`).
        labels: int64 [N] or None.
        pairs: where to save a picture of the samples nearest to a training digit, each beside it; None: nowhere.
    Returns:
        figures: flat dict, name -> number, or None where it does not apply (the bits do not, here): every key of ROWS,
            its _real and _noise, its spread as _stderr, or as _low and _high, the ends of its range.
        notes: list of lines for the reader.
    """
    n, generator = len(images), torch.Generator().manual_seed(seed)
    classifier = load_classifier(device)
    train_images, train_labels = load_dataset("MNIST", train=True)
    test_images, test_labels = load_dataset("MNIST", train=False)
    order = torch.randperm(len(test_images), generator=generator)
    test_images, test_labels = test_images[order], test_labels[order]
    draws = real_draws(train_labels, n, seed, labels)

    def seen(images, labels=None):
        return Digits(images, labels, *classify(classifier, images))

    samples, test = seen(images, labels), seen(test_images, test_labels)
    noise = seen(to_uint8(torch.randn(images.shape, generator=generator)))

    reach = reaches(test.features[:n]) if n >= FEWEST["manifold"] else None
    # One set of real digits may lie nearer than another by half of the distance, so theirs is the mean of several.
    sets = [seen(train_images[draw], None if labels is None else train_labels[draw]) for draw in draws]
    figures, of_noise, *each = [distribution_figures(digits, test, seed, reach) for digits in tqdm(
        [samples, noise, *sets], desc="distributions", unit="set", leave=False, disable=None)]
    of_real = {key: None if each[0][key] is None else float(np.mean([one[key] for one in each])) for key in each[0]}
    if figures["frechet"] is not None:
        figures["frechet_stderr"] = frechet_spread(samples.features, test.features, labels, seed)
        of_real["frechet_stderr"] = float(np.std([one["frechet"] for one in each], ddof=1)) if len(each) > 1 else None
        figures["frechet_ratio"] = figures["frechet"] / of_real["frechet"]
        figures["frechet_ratio_stderr"] = figures["frechet_stderr"] / of_real["frechet"]
        of_noise["frechet_ratio"] = of_noise["frechet"] / of_real["frechet"]
        of_real["frechet_ratio"] = 1.0

    figures |= class_figures(samples)  # what the classifier reads in them
    # Of test digits, as the classifier is surer of those it was trained on. But their classes have shares of their own.
    of_real |= class_figures(Digits(*(field[:n] for field in test)))
    of_real["class_entropy"] = class_figures(sets[0])["class_entropy"]
    of_noise |= class_figures(noise)

    for row, digits in (figures, images), (of_real, train_images[draws[0]]), (of_noise, noise.images):
        row |= pixel_figures(digits, test_images) | tell_figures(digits)

    distances, nearest = nearest_neighbours(images, train_images, device)  # are they copies?
    test_distances, _ = nearest_neighbours(test_images, train_images, device, name="nearest neighbours of test digits")
    half = min(n, len(test_distances) // 2)  # so many test digits take the samples' place, beside the others
    figures |= memorisation_figures(distances, test_distances[half:])
    of_real |= memorisation_figures(test_distances[:half], test_distances[half:])

    if n >= FEWEST["two_sample"]:
        figures |= two_sample_figures(images, test_images, device, seed)
        of_real |= two_sample_figures(train_images[draws[0]], test_images, device, seed)

    if pairs:
        closest = distances.argsort()[:PAIRS]
        beside = torch.stack([images[closest], train_images[nearest[closest]]], dim=1).flatten(0, 1)
        with tolerated(f"drawing {pairs}"):
            save_png(pairs, upscale(make_grid(beside, columns=16), 2))

    notes = []
    if n < 10_000:
        notes.append(f"n = {n}: these are figures of {n} samples; compare them only with others at the same n; "
                     "10,000 is customary")
    if missing := [f"{name} (from {fewest})" for name, fewest in FEWEST.items() if n < fewest]:
        notes.append(f"left out, since {n} samples are too few for them: {', '.join(missing)}")
    for name, digits in ("samples", samples), ("test digits", test):
        counts = torch.bincount(digits.probabilities.argmax(dim=1), minlength=10).tolist()
        notes.append(f"share of 0 to 9 in {name}: " + " ".join(f"{count / sum(counts):.3f}" for count in counts))
    return {"n": n} | merge(figures, of_real, of_noise), notes


def merge(figures, of_real, of_noise):
    """One flat dict with every key of ROWS, each followed by its spread, its _real and its _noise; None where there
    is no such figure."""
    merged = {}
    for key, _, _ in ROWS:
        for place, row in ("", figures), ("_real", of_real), ("_noise", of_noise):
            merged[key + place] = row.get(key)
            if place != "_noise":
                merged |= {key + place + spread: row.get(key + spread) for spread in SPREAD.get(key, ())}
    return merged


def print_table(figures):
    """The figures of `merge` for a reader, to stdout: a line each, with those of real digits and of noise."""
    def cell(key, place):
        value = figures[key + place]
        if value is None:
            return "-"
        low, high = figures.get(f"{key}{place}_low"), figures.get(f"{key}{place}_high")
        stderr = figures.get(f"{key}{place}_stderr")
        spread = f" ± {stderr:.2g}" if stderr is not None else f" ({low:.3f}-{high:.3f})" if low is not None else ""
        return (f"{value:.4f}" if 0.01 <= abs(value) < 10 or value == 0 else f"{value:.3g}") + spread

    rows = [("", "samples", "real digits", "noise", "")]
    rows += [(name, cell(key, ""), cell(key, "_real"), cell(key, "_noise"), note) for key, name, note in ROWS]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0])] + [row[i].rjust(widths[i]) for i in (1, 2, 3)] + [row[4]]).rstrip())


# ----------------------------------------------------------------------------------------------------------------------
# Quality against network calls

def sweep(model, n, picture, flags, steps=SWEEP_STEPS, guidance=SWEEP_GUIDANCE):
    """Measures all samplers over steps, and that of --sampler over guidance; prints a Markdown table, saves a plot. All
    are guided in every step, unless --guidance-interval says otherwise.

    Returns:
        list of dicts: sampler, steps, guidance, calls (of the network, per image), seconds (per 1,000 images), and the
        figures of `distribution_figures` and `class_figures`.
    """
    device, seed, T = pick_device(flags.device), flags.seed, model.ddpm.T
    interval = flags.guidance_interval or EVERYWHERE
    usual, usual_g, _, early = sampling_defaults(model, flags.sampler, flags.steps, flags.guidance, guide=flags.guide)
    by_steps = [(sampler, s, usual_g) for sampler in SAMPLERS for s in steps.get(sampler, OTHER_STEPS) if s <= T]
    by_guidance = [(flags.sampler, usual, g) for g in guidance if model.supports_guidance or early and g]
    for sampler, s, g in by_steps + by_guidance:  # now, and not after an hour of it
        sampling_defaults(model, sampler, s, g, interval, flags.guide)
        check_labels(model, None, g, early)
    classifier = load_classifier(device)
    train_images, train_labels = load_dataset("MNIST", train=True)
    test = Digits(None, None, *classify(classifier, pick(*load_dataset("MNIST", train=False), 10_000, seed)[0]))
    wanted = [class_of(i, model.settings["class_shares"]) for i in range(n)] if model.num_classes else None
    draws = real_draws(train_labels, n, seed, None if wanted is None else torch.tensor(wanted))
    each = [distribution_figures(Digits(None, None if wanted is None else train_labels[draw],
                                        *classify(classifier, train_images[draw])), test, seed) for draw in draws]
    real = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
    columns = ("calls", "frechet", "ratio", "precision", "recall", "label_agreement", "seconds")
    print("| sampler | steps | guidance | " + " | ".join(columns).replace("ratio", f"ratio at n = {n:,}") + " |\n"
          + "|---" * (3 + len(columns)) + "|")
    print("| real digits | | | | " + " | ".join(
        [f"{real['frechet']:.4f}", "1.00", f"{real['precision']:.3f}", f"{real['recall']:.3f}", "", ""]) + " |")
    rows, seen = [], {}  # seen: how many images the network has looked at
    for used in filter(None, (model, early)):
        used.network.register_forward_hook(lambda network, x, out: seen.update(images=seen["images"] + len(out)))
    for sampler, s, g in tqdm(by_steps + by_guidance, desc="sweep", unit="run", disable=None):
        start, seen["images"] = time.perf_counter(), 0
        images, labels = draw(model, n, sampler=sampler, steps=s, guidance=g, guidance_interval=interval, seed=seed,
                              guide=flags.guide, batch_size=flags.batch_size, clip=flags.clip, name=f"{sampler} {s}")
        seconds = (time.perf_counter() - start) * 1000 / n
        samples = Digits(images, labels, *classify(classifier, images))
        row = distribution_figures(samples, test, seed) | class_figures(samples)
        row |= {"sampler": sampler, "steps": s, "guidance": g, "calls": seen["images"] / n, "seconds": seconds,
                "ratio": row["frechet"] / real["frechet"]}
        cells = ["" if row[c] is None else f"{row[c]:.4g}" for c in columns]
        with tqdm.external_write_mode(sys.stdout):
            say(f"| {sampler} | {s} | {g:g} | " + " | ".join(cells) + " |")
        rows.append(row)
    if flags.json:
        write_json(flags.json, rows)
    with tolerated(f"drawing {picture}"):  # all of it is printed, and written, by now
        plot_sweep(picture, rows[:len(by_steps)], rows[len(by_steps):], real, n)
    return rows


# ----------------------------------------------------------------------------------------------------------------------

def parse_flags():
    """The command line as a namespace."""
    parser = Parser(__doc__)
    parser.add_argument("--npz", type=path, metavar="FILE",
                        help="measure these images, any generator's, instead of a checkpoint's: uint8 [N, 28, 28] in "
                        "an .npz file, or a folder of PNGs")
    parser.add_argument("--n", type=integer(1, 60_000), metavar="N",
                        help="how many samples, at most as many as there are training digits (default: "
                        "10000; 1000 for each point of --sweep)")
    parser.add_argument("--json", type=path, metavar="FILE",
                        help="also write all figures as one flat JSON object (with --sweep: a list of them)")
    parser.add_argument("--pairs", type=path, default="samples/nearest.png", metavar="FILE",
                        help="picture of the samples nearest to a training digit, each beside it")
    parser.add_argument("--exact", action="store_true", help="exact bits per dimension, from all timesteps and digits")
    parser.add_argument("--sweep", type=path, nargs="?", const="assets/sweep.png", metavar="FILE",
                        help="measure the samplers over steps, and guidance (in every step unless --guidance-interval "
                        "is given), and plot them to FILE (assets/sweep.png)")
    parser.add_argument("--train-classifier", type=path, nargs="?", const="runs/classifier.pt", metavar="FILE",
                        help="train another classifier, as FILE (runs/classifier.pt); the shipped one stays in use")
    add_sampling_flags(parser)
    flags = parser.parse_args()
    needs_model = ("checkpoint", "sampler", "steps", "guidance", "guidance_interval", "guide", "batch_size", "clip",
                   "ema", "precision", "exact")
    for mode, ignored in {"train_classifier": ("npz", "sweep", "json", "pairs", "n", *needs_model),
                          "sweep": ("npz", "exact", "pairs"), "npz": needs_model}.items():
        for name in ignored:
            if getattr(flags, mode) and getattr(flags, name) != parser.get_default(name):
                option = {"clip": "no_clip", "ema": "no_ema"}.get(name, name)
                parser.error(f"--{mode} has no use for --{option}; leave one of them out".replace("_", "-"))
    return flags


def main():
    flags = parse_flags()
    device, start = join(pick_device(flags.device)), time.perf_counter()
    # On MPS some versions of torch train convolutional classifiers wrongly, or crash (their issues 175189 and 175190).
    judge = torch.device("cpu") if device.type == "mps" else device
    n = flags.n or (1000 if flags.sweep else 10_000)
    pairs = None if flags.sweep or flags.train_classifier else flags.pairs
    if WORLD > 1 and (flags.npz or flags.sweep or flags.train_classifier):
        raise UsageError("processes share only the sampling of a --checkpoint; start this without torchrun")
    for target in filter(None, (flags.json, pairs, flags.sweep, flags.train_classifier)):
        check_target(target)  # now, and not after minutes of measuring
    if flags.npz and Path(flags.pairs).resolve().parent == Path(flags.npz).resolve():
        raise UsageError(f"--pairs {flags.pairs} would lie among the images of --npz; put it elsewhere")
    if flags.train_classifier:
        return train_classifier(flags.train_classifier, judge, flags.seed)
    load_classifier(judge)  # what is wrong with it should show now
    if flags.sweep:
        if n < FEWEST["frechet"]:
            raise UsageError(f"--n {n} is too few to sweep with; take {FEWEST['frechet']} or more")
        sweep(load_digit_model(flags), n, flags.sweep, flags)
        return print("\n".join(filter(None, (flags.sweep, flags.json))))

    settings = dict.fromkeys(("sampler", "steps", "guidance", "guide", "guidance_from", "guidance_to"))
    if flags.npz:
        images, labels = (read_folder(flags.npz), None) if Path(flags.npz).is_dir() else read_npz(flags.npz)
    else:
        model = load_digit_model(flags)
        steps, guidance, interval, early = sampling_defaults(model, flags.sampler, flags.steps, flags.guidance,
                                                             flags.guidance_interval, flags.guide)
        settings |= {"sampler": flags.sampler, "steps": steps}
        if early or model.num_classes:
            settings["guidance"] = guidance
            if guidance not in (0, 1):
                settings["guide"] = "early" if early else "label"
                settings["guidance_from"], settings["guidance_to"] = interval
        images, labels = draw(model, n, sampler=flags.sampler, steps=steps, guidance=guidance, guide=flags.guide,
                              guidance_interval=interval, clip=flags.clip, seed=flags.seed,
                              batch_size=flags.batch_size, together=True)
    if RANK:  # all else is the first process's
        return
    images, labels = pick(images, labels, n, flags.seed)
    figures, notes = evaluate(images, labels, seed=flags.seed, device=judge, pairs=flags.pairs)
    figures |= {"seed": flags.seed, "classifier_sha256": CLASSIFIER_SHA256, **settings}
    try:  # the file first, since who reads the table may have gone; and the table, if the bits or the disk fail
        if not flags.npz:
            test_images, _ = load_dataset("MNIST", train=False)
            order = torch.randperm(len(test_images), generator=torch.Generator().manual_seed(flags.seed))
            figures["bits_per_dim_noise"] = 8.0  # each of the 256 grey levels as likely as the others: log2 256
            if model.settings.get("label_dropout") != 0:  # else it knows nothing without labels
                figures |= bits_figures(model, test_images[order], flags.seed, flags.exact)
        if flags.json:
            write_json(flags.json, figures)
    finally:
        print_table(figures)
        print("\n".join([*notes, f"classifier {CLASSIFIER_SHA256[:12]}, seed {flags.seed}, n = {figures['n']}, "
                         f"{time.perf_counter() - start:.0f} s", flags.pairs, *filter(None, [flags.json])]))


if __name__ == "__main__":
    run(main)
