"""Every setting, said once: its default, what it may be, its line in --help, and whether a resumed run may change it.

A run's settings are a dict, name -> value, stored in its checkpoint. --resume reads them from there, and a model is
rebuilt from them. So the same rows also decide which settings of a foreign checkpoint are believed.
"""
import argparse
import dataclasses
import math
import os
import reprlib
from pathlib import Path
from typing import Any, Callable, NamedTuple

from ddpm import SAMPLERS, WEIGHTINGS
from diffusion_model import NETWORKS, build_network
from diffusion_schedules import SCHEDULES, make_betas, sampling_timesteps
from utils.cli import UsageError, add_device_flag, faster_in_bf16, integer, nearby, number, path
from utils.data import DATASETS, FEWEST_IMAGES, MOST_CLASSES
from utils.images import classes_of

SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "mnist.pt"

# Defaults of a run of a few minutes on a CPU: in so little time, many small steps of a small network do more than a few
# large ones (EXPERIMENTS.md, Short runs). And the defaults of AdamW.
SHORT_RUN_MINUTES, SHORT_RUN = 15, {"width": 64, "batch_size": 64, "lr": 0.01}
ADAMW = {"lr": 2e-3}
SWITCH = (False, True)  # kind of a setting that is False by default, and whose flag has no value
LONGEST_PATH = 4096
MOST_LEVELS = 8  # with a hundred, as photographs have, a network for colour images takes seven times as long


class Setting(NamedTuple):
    """A setting: its default, its type for argparse or a tuple of choices, its help, whether --resume may change it."""
    default: Any
    kind: Callable | tuple
    help: str
    may_change: bool = False


def _short(name):
    return f"; on a CPU with --minutes up to {SHORT_RUN_MINUTES}: {SHORT_RUN[name]}"


# To add a setting: a row here, and the line that reads it; and, so that older checkpoints can be read, what it was in
# them, in OLDER. One that a network takes goes into OF_A_MODEL and into the network's `also_takes`, too.
SETTINGS = {
    "dataset": Setting("MNIST", tuple(DATASETS), "what to learn; MNIST is in assets/, the others are downloaded"),
    "images": Setting(None, path, "train on the pictures in this folder instead: one sub-folder per class, or, "
                      "without labels, all in the folder itself"),
    "image_size": Setting(32, integer(4, 512), "height and width that --images are resized to; data sets keep theirs"),
    "grey": Setting(False, SWITCH, "read --images as grey, not RGB"),
    "skip_broken": Setting(False, SWITCH, "skip --images that cannot be read", may_change=True),
    "images_used": Setting(None, integer(FEWEST_IMAGES, 10**9), "train on only N images, chosen by --seed"),
    "epochs": Setting(20, integer(1, 1_000_000), "passes over the images; the learning rate falls to 0 by the end",
                      may_change=True),
    "minutes": Setting(None, number(0.01, 1e6), "train for N minutes instead of --epochs; the learning rate falls to 0 "
                       "by then. How far a run gets depends on the machine, so it is not reproducible bit for bit",
                       may_change=True),
    "batch_size": Setting(128, integer(1, 100_000), "images per step" + _short("batch_size")),
    "optimizer": Setting("muon", ("muon", "adamw"), "muon: Muon for the weights inside the network, AdamW for the "
                         "others; adamw: AdamW for all"),
    "lr": Setting(5e-3, number(1e-9, 10), "peak learning rate" + _short("lr") + "; with --optimizer adamw: "
                  f"{ADAMW['lr']}"),
    "warmup": Setting(50, integer(0, 1_000_000), "steps over which the learning rate rises to its peak"),
    "weight_decay": Setting(0.01, number(0, 10), "weight decay of the optimizer"),
    "clip_norm": Setting(1.0, number(1e-6, 1e6), "gradients with a larger norm are scaled down to it"),
    "ema": Setting(0.999, number(0, 0.999999), "decay of the moving average of the weights; at step n at most "
                   "(n + 1) / (n + 10)"),
    "label_dropout": Setting(0.1, number(0, 1), "share of images trained without their label, for sample.py "
                             "--guide label; 1: the model will know no labels"),
    "weighting": Setting("medium", tuple(WEIGHTINGS), "timestep weights in the loss. simple: L_simple, all t alike; "
                         "balanced: L_simple times alpha_bar_t^(-1/2); v: the error of v, with t drawn in proportion "
                         "to alpha_bar_t^(1/4); medium: as v, but drawn in "
                         "proportion to (alpha_bar_t (1 - alpha_bar_t))^(1/4)"),
    "schedule": Setting("logsnr", tuple(SCHEDULES), "how the noise grows with t"),
    "timesteps": Setting(1000, integer(1, 100_000), "number of timesteps T"),
    "network": Setting("bayes", tuple(NETWORKS), "unet: a UNet that predicts v; bayes: a UNet that says what to expect "
                       "of each pixel, which Bayes' rule combines with the noisy pixel"),
    "width": Setting(128, integer(3, 1024), "channels of the UNet at its coarser level" + _short("width")),
    "depth": Setting(6, integer(1, 64), "residual blocks of the UNet at its coarser level"),
    "precision": Setting("auto", ("auto", "fp32", "bf16"), "for convolutions and matrix products in training. auto: "
                         "bf16 on a CPU that is faster in it, else fp32 (which on a GPU is TF32 in convolutions). "
                         "All else is always fp32"),
    "seed": Setting(0, integer(0, 2**32 - 1), "random seed: weights, batches, t, noise"),
    "report_every": Setting(2000, integer(1, 10_000_000), "steps between reports: validation loss, metrics.csv, plot, "
                            "grid. The first comes by half of the run at the latest", may_change=True),
}
# What the data decide. (class_shares and levels, which are lists, have checks of their own.)
OF_THE_DATA = {
    "image_channels": Setting(None, (1, 3), "grey or RGB"),
    "classes": Setting(None, integer(0, MOST_CLASSES), "number of labels"),
}
OF_A_MODEL = ("schedule", "timesteps", "network", "width", "depth", "image_size", *OF_THE_DATA)  # to rebuild it
OF_SAMPLING = ("batch_size", "label_dropout")  # what else is read of it, if it is there
OLDER = {"images": None, "images_used": None, "grey": False, "skip_broken": False}  # in checkpoints that lack them


# ----------------------------------------------------------------------------------------------------------------------
# Settings of a run

def parse_run_flags(parser):
    """Gives the parser the flags of train.py: where a run goes, how far, and one for each of SETTINGS.

    Returns:
        flags, a namespace of all that argparse found, and given, a dict of the settings among them that were given.
    """
    parser.add_argument("--out", type=path, metavar="DIR",
                        help="where the run goes; default: runs/ and the name of the data set, or of the folder of "
                        "--images, in lower case")
    parser.add_argument("--data", type=path, default="data", metavar="DIR",
                        help="where data sets are unpacked or downloaded, and decoded --images are kept")
    parser.add_argument("--resume", action="store_true", help="go on from checkpoint.pt in --out")
    parser.add_argument("--init", type=path, metavar="FILE", help="begin with the weights of this checkpoint (not its "
                        "run), where names and shapes match; --network, --width, --depth, --schedule and --timesteps "
                        "default to its own, and the common grey levels are its own")
    parser.add_argument("--overwrite", action="store_true", help="start over, replacing the run in --out")
    parser.add_argument("--max-steps", type=integer(1, 10**12), metavar="N",
                        help="stop after N steps in all; the learning rate still follows --epochs, so that --resume "
                        "can go on as if it had never stopped")
    parser.add_argument("--save-every", type=integer(1, 10**12), default=500, metavar="N",
                        help="steps between checkpoints")
    parser.add_argument("--compile", action="store_true", help="compile the network first, with torch.compile")
    add_device_flag(parser)
    group = parser.add_argument_group("settings of the run")
    for name, (default, kind, text, _) in SETTINGS.items():
        how = {"type": kind, "metavar": "DIR" if kind is path else "N"}
        if isinstance(kind, tuple):
            how = {"action": "store_true"} if kind is SWITCH else {"choices": kind, "type": type(kind[0])}
        group.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS,
                           help=text + (f" (default: {default})" if default is not None and kind is not SWITCH else ""),
                           **how)
    flags = parser.parse_args()
    given = {name: getattr(flags, name) for name in SETTINGS if hasattr(flags, name)}
    if "images" in given:  # --resume may be given in another folder
        given["images"] = os.path.abspath(given["images"])
    if "minutes" in given and ("epochs" in given or flags.max_steps):
        parser.error("--minutes sets the length of the run; leave out --epochs and --max-steps")
    if "images" in given and "dataset" in given:
        parser.error("--images takes the place of --dataset; leave one of them out")
    if "images" not in given and not flags.resume and (alone := given.keys() & {"image_size", "grey", "skip_broken"}):
        parser.error(f"--{min(alone).replace('_', '-')} needs --images DIR")
    if flags.resume and flags.overwrite:
        parser.error("--resume goes on with a run, --overwrite throws it away; choose one")
    if flags.resume and flags.init:
        parser.error("--resume has the weights of its run; leave --init out")
    return flags, given


def settings_of_a_run(given, device):
    """The settings of a new run: those `given`, else those of its presets, else the defaults.

    Raises:
        UsageError: the schedule cannot have so many timesteps, the network no images of this size, the folder of images
            no labels.
        OSError: there is no such folder.
    """
    settings = {name: setting.default for name, setting in SETTINGS.items()}
    if device.type == "cpu" and given.get("minutes", math.inf) <= SHORT_RUN_MINUTES:
        settings |= SHORT_RUN
    if given.get("optimizer") == "adamw":
        settings |= ADAMW
    settings |= given
    if settings["precision"] == "auto":
        settings["precision"] = "bf16" if faster_in_bf16(device) else "fp32"
    try:
        make_betas(settings["schedule"], settings["timesteps"])
    except ValueError as error:
        raise UsageError(f"--timesteps {settings['timesteps']}: {error}") from None
    if settings["images"]:
        # A name that no data set has: what is made for one by its name is not made for these.
        settings["dataset"] = (Path(settings["images"]).resolve().name or "images") + "/"
        names = settings["class_names"] = classes_of(settings["images"])
        if len(names) > MOST_CLASSES:
            raise UsageError(f"{settings['images']} has {len(names):,} sub-folders, each a class, and there can be "
                             f"{MOST_CLASSES:,}; put all pictures into one, or group them")
        if len(names) == 1:
            if given.get("label_dropout", 1) != 1:
                raise UsageError(f"--label-dropout {given['label_dropout']}: {settings['images']} has no sub-folders, "
                                 "or only one, to tell labels by; leave it out")
            settings["label_dropout"] = 1.0
        try:  # now, and not after a million pictures
            build_network(settings | {"image_channels": 3, "classes": 1})
        except ValueError as error:
            raise UsageError(f"--image-size {settings['image_size']}: {error}") from None
    return settings


def settings_of_the_data(dataset, images, labels, classes, levels=None):
    """What the images uint8 [N, C, H, W], the labels int64 [N] and the number of classes of a data set decide. A run
    that is resumed, or begun by --init, keeps the `levels` that its weights are for, even if the images have changed.

    Raises:
        ValueError: there can be no model of such images.
    """
    shares = (labels.bincount(minlength=classes) / len(labels)).tolist()
    settings = {"image_size": images.shape[-1], "image_channels": images.shape[1], "classes": len(shares),
                "class_shares": shares, "levels": common_levels(images) if levels is None else levels}
    check_settings(dataset, settings, ("image_size", *OF_THE_DATA))
    return settings


def common_levels(images):
    """The grey levels that at least one pixel in 200 has, but only the MOST_LEVELS commonest, as a rising list. Some
    ten million pixels are counted."""
    some = images[::math.ceil(images.numel() / 10**7)]
    counts = some.flatten().long().bincount(minlength=256).cpu()
    most = counts.argsort(descending=True, stable=True)[:MOST_LEVELS]
    return sorted(most[counts[most] >= some.numel() / 200].tolist())


def resumed_settings(path, saved, given):
    """The settings of a run to be resumed: those `saved` in its checkpoint at `path`, and those `given` now.

    Raises:
        ValueError: a setting given now differs from the run's and may not change; the folder of its images has gone, or
            has other sub-folders.
    """
    given = {name: value for name, value in given.items() if value != "auto"}  # which the run decided long ago
    for name, value in given.items():
        if value == saved[name] or SETTINGS[name].may_change:
            continue
        if name == "images" and saved[name] and (not os.path.exists(saved[name])
                                                 or os.path.samefile(value, saved[name])):
            continue  # the folder has moved, or it is the same one, spelled differently
        flag = "--" + name.replace("_", "-")
        theirs = "default" if saved[name] is None else saved[name]
        raise ValueError(f"{flag} {value} differs from the {theirs} of the run in {path}; leave it out, or start "
                         "another run with another --out")
    if saved["images"] and "images" not in given and not os.path.exists(saved["images"]):
        raise ValueError(f"{saved['images']} is not there any more; pass the folder where they are now by --images")
    if (folder := given.get("images", saved["images"])) and "class_names" in saved:
        names = classes_of(folder)
        if names != saved["class_names"] and len(names) == saved["classes"]:  # labels would mean something else
            raise ValueError(f"{folder} has the sub-folders {', '.join(names[:8])} now, and had others when the run in "
                             f"{path} began; name them as they were, or start another run with another --out")
    if "epochs" in given:
        given["minutes"] = None
    return {name: saved[name] for name in [*SETTINGS, "class_names", "levels"] if name in saved} | given


def settings_of_a_file(path, settings, names=OF_A_MODEL):
    """The `settings` that the checkpoint at `path` holds, with those of `names` that it is too old for. Raises
    ValueError as check_settings."""
    if isinstance(settings, dict):
        settings = {name: OLDER[name] for name in names if name in OLDER} | settings
    check_settings(path, settings, names)
    return settings


def check_settings(source, settings, names=OF_A_MODEL):
    """Raises ValueError unless `settings`, which came from `source`, is a dict with sound values for all of `names`, as
    their rows have it, class_shares to match, and grey levels as `levels`, if it has them."""
    if not isinstance(settings, dict):
        raise ValueError(f"{source} has no settings")
    for name in (*names, *(name for name in OF_SAMPLING if name in settings)):
        default, kind, *_ = (SETTINGS | OF_THE_DATA)[name]
        value = settings.get(name)
        if name == "dataset" and settings.get("images") is not None:
            kind = path  # it has the name of the folder
        if name in settings and value is None and default is None and name in SETTINGS:
            continue
        try:
            if isinstance(kind, tuple):
                if type(value) is not type(kind[0]) or value not in kind:
                    raise argparse.ArgumentTypeError(f"known are {', '.join(map(str, kind))}")
            elif kind is path:
                if type(value) is not str or not 0 < len(value) <= LONGEST_PATH:
                    raise argparse.ArgumentTypeError("not a path")
            elif type(value) not in ((str,) if kind is str else (int, float)) or kind(str(value)) != value:
                raise argparse.ArgumentTypeError("not a value that it can have")
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{source}: the setting {name} is {reprlib.repr(value)}: {error}") from None
    if "timesteps" in names:
        try:
            make_betas(settings["schedule"], settings["timesteps"])
        except ValueError as error:
            raise ValueError(f"{source}: the setting timesteps is {settings['timesteps']}: {error}") from None
    shares = settings.get("class_shares")
    if not isinstance(shares, list) or len(shares) != settings["classes"] or not all(
            type(share) is float and 0 <= share <= 1 for share in shares):
        raise ValueError(f"{source}: class_shares are not {settings['classes']} numbers from 0 to 1")
    levels = settings.get("levels", [])
    if not isinstance(levels, list) or len(levels) > MOST_LEVELS or not all(
            type(level) is int and 0 <= level <= 255 for level in levels):
        raise ValueError(f"{source}: levels are not whole numbers from 0 to 255, {MOST_LEVELS} at most")


# ----------------------------------------------------------------------------------------------------------------------
# Settings of sampling

SAMPLER = "dpm++sde"  # better than ten steps of dpm++: EXPERIMENTS.md, The clear end

# A run keeps its EMA weights as they were after so many images: what autoguidance compares with. It is the default for
# models that were trained on a million or more (EXPERIMENTS.md, Autoguidance). How much, and where: Samplers.
EARLY_IMAGES, ENOUGH_IMAGES = 120_000, 1_000_000
AUTOGUIDANCE, AUTOGUIDANCE_INTERVAL = 1.7, (0.6, 20.0)

# Classifier-free guidance; and more of it for models that were trained on fewer images than these, as it makes their
# digits clearer (EXPERIMENTS.md, Guidance, Samplers and Short runs).
GUIDANCE, SHORT_RUN_GUIDANCE = 1.15, {32_000: 2.5, 64_000: 2.0, 150_000: 1.5, 1_000_000: 1.35}

# The noise levels between which it acts: where it is decided which digit it will be (ten were compared: EXPERIMENTS.md,
# Guidance interval). Elsewhere it would cost variety or change nothing, so the second call is saved.
GUIDANCE_INTERVAL = 1.3, 35.0
EVERYWHERE = 0.0, 1e9


def add_sampling_flags(parser):
    """Gives the parser the flags by which the commands choose a model and how it samples. Returns it."""
    parser.add_argument("--checkpoint", type=path, default=nearby(SHIPPED), metavar="FILE",
                        help="the trained model")
    parser.add_argument("--sampler", choices=SAMPLERS, default=SAMPLER, help="how to get from noise to an image")
    parser.add_argument("--steps", type=integer(1, 100_000), metavar="N",
                        help="timesteps to visit; default: " + ", ".join(
                            f"{row.steps or 'all T'} for {name}" for name, row in SAMPLERS.items()))
    parser.add_argument("--guide", choices=("early", "label"),
                        help="what guidance leads away from: the network as it was early in its training "
                        "(autoguidance), or the same network without the label (classifier-free guidance); default: "
                        f"early, if the model has it and was shown {ENOUGH_IMAGES:,} images or more (repeats count)")
    parser.add_argument("--guidance", type=number(0, 100), metavar="G",
                        help="0 ignores the label, 1 follows it, more exaggerates how the prediction differs from the "
                        "weaker one (--guide), at a second network call in each guided step; default: "
                        f"{AUTOGUIDANCE} by the early network; by the label "
                        "{} (for a model that was shown few images: {}), or 1 for one that was not trained both with "
                        "labels and without".format(GUIDANCE, ", ".join(
                            f"{guidance} below {images:,}" for images, guidance in SHORT_RUN_GUIDANCE.items())))
    parser.add_argument("--guidance-interval", type=number(*EVERYWHERE), nargs=2, metavar=("LOW", "HIGH"),
                        help="noise levels sqrt((1 - alpha_bar) / alpha_bar) between which to guide; elsewhere "
                        "the network's own prediction is used, at one call. No effect at guidance 0 or 1; everywhere: "
                        "0 1e9; default: {:g} {:g} by the early network, {:g} {:g} by the label, or, if no step lies "
                        "there, everywhere (edit.py: nowhere, unless --guidance is given)".format(
                            *AUTOGUIDANCE_INTERVAL, *GUIDANCE_INTERVAL))
    parser.add_argument("--seed", type=integer(0, 2**32 - 1), default=0, metavar="N",
                        help="image i depends on the seed, on i and on these settings alone")
    parser.add_argument("--batch-size", type=integer(1, 1_000_000), default=64, metavar="N",
                        help="images per network call; changes the memory needed, and the images only by rounding")
    parser.add_argument("--no-clip", dest="clip", action="store_false",
                        help="do not clip the guided x0_hat to [-1, 1]; that of the network alone is always clipped, "
                        "so this changes nothing at guidance up to 1")
    parser.add_argument("--no-ema", dest="ema", action="store_false",
                        help="the raw weights instead of their moving average")
    # Unlike in training, not "auto": the same command should draw nearly the same digits on any processor.
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                        help="bf16 is nearly twice as fast on a CPU with AMX or AMD's AVX-512 for it, and slower on "
                        "others; images differ slightly")
    add_device_flag(parser)
    return parser


def sampling_defaults(model, sampler, steps=None, guidance=None, guidance_interval=None, guide=None):
    """(steps, guidance, guidance_interval, early) for a Model and a sampler, where they are not given. `early` is the
    Model to be guided by; None: by the label.

    Raises:
        UsageError: unknown sampler; steps above the model's timesteps; an interval that ends before it begins, or that
            holds no step; a guide that the model does not have.
    """
    if sampler not in SAMPLERS:
        raise UsageError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
    T = model.ddpm.T
    if steps is None:
        steps = min(SAMPLERS[sampler].steps or T, T)
    check_steps(model, steps)
    early = guide_of(model, guide)
    if guidance is None:
        guidance = default_guidance(model, early)
    visited = sampling_timesteps(T, steps, SAMPLERS[sampler].spacing, model.ddpm.alpha_bars)
    return steps, guidance, interval_of(model, visited, guidance, guidance_interval, early), early


def check_steps(model, steps):
    """Raises UsageError if these are more steps than the model has timesteps."""
    if steps > model.ddpm.T:
        raise UsageError(f"--steps {steps} is more than the {model.ddpm.T} timesteps that the model was trained with")


def interval_of(model, visited, guidance, interval=None, early=None):
    """The noise levels (lowest, highest) to guide at: `interval`, or those by default; EVERYWHERE if they hold none of
    the timesteps `visited`.

    Raises:
        UsageError: `interval` ends before it begins, or holds none of them.
    """
    low, high = interval or (AUTOGUIDANCE_INTERVAL if early else GUIDANCE_INTERVAL)
    if guidance in (0, 1) or any(guided_steps(model, visited, low, high)):
        return low, high
    if interval:
        levels = [noise_level(model.ddpm.alpha_bars[t]) for t in visited]
        raise UsageError(f"--guidance-interval {low:g} {high:g} holds none of the {len(levels)} noise levels, from "
                         f"{min(levels):.3g} to {max(levels):.3g}; leave it out, or widen it")
    return EVERYWHERE


def guided_steps(model, timesteps, low, high):
    """For each of the timesteps whether its noise level is between these: the `acts` of diffusion_model.guided, so that
    guidance acts at medium noise only: Kynkaanniemi et al. 2024 (arXiv 2404.07724)."""
    return [low <= noise_level(model.ddpm.alpha_bars[t]) <= high for t in timesteps]


def guide_of(model, guide=None):
    """The early Model to be guided by, or None: by the label. `guide` is that of add_sampling_flags.

    Raises:
        UsageError: the model has none, or was not trained for guidance by the label.
    """
    if guide == "label" and not model.supports_guidance:
        raise UsageError("--guide label: the model was not trained both with labels and without; leave it out")
    if guide == "early" and not model.early:
        raise UsageError("--guide early: this model has no early weights; train.py keeps those that it has after "
                         f"{EARLY_IMAGES:,} images")
    if model.early and (guide == "early" or guide is None and images_seen(model) >= ENOUGH_IMAGES):
        return dataclasses.replace(model, network=model.early, early=None)
    return None


def images_seen(model):
    """On how many images a Model was trained, each counted as often as it came; infinite if it does not say so."""
    batch_size = model.settings.get("batch_size")
    return model.steps * batch_size if type(model.steps) is int and type(batch_size) is int else math.inf


def check_labels(model, digit, guidance, early=None):
    """Raises UsageError if the model does not know the digit (None: any), if guidance 0 would ignore it, or if the
    model was not trained for guidance by the label. (By `early` every model can be guided.)"""
    classes = model.num_classes
    if digit is not None and not 0 <= digit < classes:
        raise UsageError(f"--digit {digit}: the model knows 0 to {classes - 1}" if classes else
                         "the model knows no classes; leave --digit or --classes out")
    if digit is not None and guidance == 0:
        raise UsageError("--guidance 0 ignores labels; leave it out, or --digit or --classes")
    if guidance != 1 and not model.supports_guidance and (guidance == 0 or not early):
        how = "with labels only" if classes else "without labels"
        raise UsageError(f"--guidance {guidance:g}: the model was trained {how}; leave it out")


def default_guidance(model, early=None):
    """AUTOGUIDANCE if it is guided by its early self; else GUIDANCE, or more for a model that says it was trained on
    few images; 1 for one that was not trained both with labels and without."""
    if early:
        return AUTOGUIDANCE
    if not model.supports_guidance:
        return 1.0
    seen = images_seen(model)
    return next((guidance for images, guidance in SHORT_RUN_GUIDANCE.items() if seen < images), GUIDANCE)


def noise_level(alpha_bar):
    """sigma = sqrt((1 - alpha_bar) / alpha_bar): the ratio of noise to image in x_t."""
    return math.sqrt((1 - alpha_bar) / alpha_bar)
