"""What the commands share: flags with clear messages, the device, images by number, failures in one line."""
import argparse
import atexit
import contextlib
import ctypes
import itertools
import math
import os
import signal
import sys

import torch

from checkpoint import SHIPPED
from ddpm import SAMPLERS, SPACING, ImageNoise
from diffusion_model import guided
from diffusion_schedules import spaced_timesteps


# Guidance by default, and of models that were trained on fewer images than this: they draw more clear digits for it,
# while after a long run less is better. Frechet distance and share of digits read with confidence, 1,000 to 2,000
# samples each by 10 steps of "dpm++", guided in GUIDANCE_INTERVAL, but for the last two rows, guided everywhere:
#     guidance                 1.25            1.5             1.75            2               2.5
#     724 steps of 32          -               -               0.581, 92 %     -               0.359, 97 %
#     596 steps of 64          -               -               0.170, 98 %     0.156, 98 %     0.194, 99 %
#     3,308 steps of 32        -               0.131, 97 %     0.117, 98 %     0.144, 99 %     -
#     18,887 steps of 32       0.066, 97 % *   0.068, 99 %     0.097, 99 %     -               -
#     1,875 steps of 64        0.120, 96 %     0.076, 99 %     0.124, 99 %     -               -
#     42,188 steps of 64       0.040, 99 %     0.074, 99 %     -               -               -      (* 1.3)
GUIDANCE, BRIEF_GUIDANCE = 1.3, {32_000: 2.5, 192_000: 1.75, 1_000_000: 1.5}

# The noise levels between which guidance acts: where it is decided which digit it will be. In the noisier part it costs
# variety, in the clearer one it changes nothing any more; and where it does not act, one call of the network does.
# With 10 steps of "dpm++" and the shipped model, 2,000 samples: Frechet distance, and the share of digits read with
# confidence and as asked for.
#     guidance 1.25 in all of them            20 calls    0.040    98.9 %    99.6 %
#     1.25 in steps 3 to 6                    14 calls    0.040    98.8 %    99.6 %
#     1.3 in steps 3 to 5                     13 calls    0.043    98.8 %    99.6 %
#     1.25 in steps 4 to 6                    13 calls    0.039    98.3 %    99.4 %
#     1.5 in steps 2 to 4, 3 to 5, 4 to 6     13 calls    0.048, 0.066, 0.060
#     1.4 in steps 3 and 4                    12 calls    0.041    98.5 %    99.5 %
#     1.7 in step 4                           11 calls    0.051    98.7 %    99.6 %
#     none                                    10 calls    0.079    95.8 %    97.9 %
GUIDANCE_INTERVAL = 1.3, 35.0  # of 10 steps 3 to 5
EVERYWHERE = 0.0, 1e9


class UsageError(ValueError):
    """A flag that makes no sense for the model at hand: exit code 2, like those that never do."""


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # "(default: None)" and "(default: False)" tell nobody anything
        return action.help if action.default is None or action.nargs == 0 else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose usage errors are one line on stderr, exit code 2, and whose --help shows the defaults."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message):
        """Ends the program with one line on stderr and exit code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see --help)\n")


def integer(low, high):
    """An argparse type: a whole number from `low` to `high`, both included."""
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return value
    return parse


def number(low, high):
    """An argparse type: a finite number from `low` to `high`, both included."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # nan fails too
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
        return value
    return parse


def path(text):
    """An argparse type: the path of a file or folder. An empty one is a mistake: "$OUT", say, where OUT is not set."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def pick_device(name):
    """The torch.device for --device: auto takes CUDA, else MPS, else the CPU.

    Raises:
        RuntimeError: a GPU was asked for by name and there is none.
    """
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if name == "auto":
        name = next(kind for kind in available if available[kind]())
    elif not available[name]():
        raise RuntimeError(f"--device {name} was asked for, but torch finds no such device here; use --device cpu")
    return torch.device(name)


def has_bf16(device):
    """Whether the device multiplies bfloat16 numbers natively, and so about twice as fast as float32."""
    if device.type == "cpu":
        able = getattr(torch.cpu, "get_capabilities", dict)()  # of torch 2.10 and later
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def add_sampling_flags(parser):
    """The flags by which sample.py and evaluate.py choose a model and how it samples."""
    parser.add_argument("--checkpoint", type=path, default=os.path.relpath(SHIPPED), metavar="FILE",
                        help="the trained model")
    parser.add_argument("--sampler", choices=SAMPLERS, default="dpm++", help="how to walk from noise to image")
    parser.add_argument("--steps", type=integer(1, 100_000), metavar="N",
                        help="timesteps to visit; default: 10, or 20 for ddim, or every timestep for ddpm")
    parser.add_argument("--guidance", type=number(0, 100), metavar="G",
                        help="classifier-free guidance: 0 ignores the label, 1 follows it, more exaggerates it, by two "
                        f"calls of the network in the steps that are guided; default: {GUIDANCE}; "
                        + ", ".join(f"{guidance} after fewer than {images:,} images of training"
                                    for images, guidance in BRIEF_GUIDANCE.items())
                        + "; 1 for a model that was not trained both with labels and without")
    parser.add_argument("--guidance-interval", type=number(*EVERYWHERE), nargs=2, metavar=("LOW", "HIGH"),
                        help="noise levels sqrt((1 - alpha_bar) / alpha_bar) between which to guide; at others the "
                        "label is just followed, by one call. No effect at guidance 0 and 1. 0 1e9: everywhere; "
                        "default: {:g} {:g}, or everywhere if no step lies there".format(*GUIDANCE_INTERVAL))
    parser.add_argument("--seed", type=integer(0, 2**32 - 1), default=0, metavar="N",
                        help="image i depends on the seed, on i and on these settings alone")
    parser.add_argument("--batch-size", type=integer(1, 1_000_000), default=64, metavar="N",
                        help="images in the network at a time; changes the memory needed, and the images by rounding "
                        "only")
    parser.add_argument("--no-clip", dest="clip", action="store_false",
                        help="do not clip the guided x0_hat to [-1, 1]; that of the network alone is clipped always, "
                        "so that it changes nothing at guidance up to 1")
    parser.add_argument("--no-ema", dest="ema", action="store_false",
                        help="the raw weights instead of their moving average")
    # Not by the processor, as in training: the same command should draw the same digits on any of them.
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                        help="bf16 is nearly twice as fast where the processor has it, and makes slightly other images")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto",
                        help="where to compute; auto: CUDA, else MPS, else the CPU")


def keep_memory():
    """Tells glibc to keep the memory that is freed until the program ends, where there is a glibc. It would give large
    buffers back to the system and fault them in again page by page, every training step: a twentieth of the time."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: take buffers up to 1 GiB from the heap
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD: and leave them there
        atexit.register(libc.malloc_trim, 0)  # at the end torch takes 0.1 GB more, only to take itself down


def known_classes(settings):
    """How many labels a model knows by its settings: none either, if every image was trained without its own."""
    return 0 if settings.get("label_dropout") == 1 else settings["classes"]


def knows_both(settings):
    """Whether a model was trained both with labels and without, as guidance needs it."""
    return known_classes(settings) > 0 and settings.get("label_dropout") != 0


def default_guidance(model):
    """1 for a model that was not trained both with labels and without, GUIDANCE for one that was; more if it says that
    it was trained on few images, each counted as often as it came."""
    if not knows_both(model.settings):
        return 1.0
    batch_size = model.settings.get("batch_size")
    if type(model.steps) is int and type(batch_size) is int:
        for images, guidance in BRIEF_GUIDANCE.items():
            if model.steps * batch_size < images:
                return guidance
    return GUIDANCE


def sampling_defaults(model, sampler, steps=None, guidance=None, guidance_interval=None):
    """(steps, guidance, guidance_interval) for a model and a sampler, where they are not given.

    Measured on the shipped model by "dpm++", 2,000 samples with seed 1 and 4,000 with seed 2. Frechet distance, shares
    read with confidence and as asked for (of real digits 98.5 % and 99.8 %):

        10 steps, guidance 1.25 in all          20 calls    0.040 98.9 % 99.6 %    0.035 98.8 % 99.5 %
        10 steps, 1.3 in GUIDANCE_INTERVAL      13 calls    0.043 98.8 % 99.6 %    0.038 98.9 % 99.5 %
         9 steps, 1.3 in steps 3 and 4          11 calls    0.046 98.6 % 99.5 %
         8 steps, 1.25 in GUIDANCE_INTERVAL     10 calls    0.044 98.6 % 99.8 %    0.041 98.5 % 99.4 %

    Eight steps look as good by these figures, but less so pixel by pixel: of 3,000 samples a network told 77 in 100
    from real digits, of those by ten steps 65. "ddim" takes twice as many for about the same (the README's sweep: 0.072
    by 10 steps, 0.048 by 20). Models that were trained briefly want more guidance: BRIEF_GUIDANCE.

    Raises:
        UsageError: steps above the model's timesteps; an interval that ends before it begins, or that holds no step.
    """
    T = model.ddpm.T
    if steps is None:
        steps = T if sampler == "ddpm" else min(20 if sampler == "ddim" else 10, T)
    if steps > T:
        raise UsageError(f"--steps {steps} is more than the {T} timesteps that the model was trained with")
    if guidance is None:
        guidance = default_guidance(model)
    alpha_bars = model.ddpm.alpha_bars.tolist()
    low, high = guidance_interval or GUIDANCE_INTERVAL
    visited = [sigma(alpha_bars[t]) for t in spaced_timesteps(T, steps, SPACING[sampler], alpha_bars)]
    if guidance not in (0, 1) and not any(low <= level <= high for level in visited):
        if guidance_interval:
            raise UsageError(f"--guidance-interval {low:g} {high:g} holds none of the {steps} noise levels, from "
                             f"{min(visited):.3g} to {max(visited):.3g}; leave it out, or widen it")
        low, high = EVERYWHERE
    return steps, guidance, (low, high)


def sigma(alpha_bar):
    """The noise level: the noise's share of x_t over the image's, sqrt((1 - alpha_bar) / alpha_bar)."""
    return math.sqrt((1 - alpha_bar) / alpha_bar)


def generate(model, n, *, sampler="dpm++", steps=None, guidance=None, guidance_interval=None, seed=0, batch_size=64,
             clip=True, digit=None):
    """Samples n images, a batch at a time. Image i depends on (seed, i) and the settings, not on n or batch_size.

    Args:
        model: a checkpoint.Model.
        steps, guidance: None: what sampling_defaults takes.
        guidance_interval: lowest and highest noise level at which to guide. None: likewise.
        digit: the class of all images; None: the classes in the shares they have in the training data.
    Returns:
        an iterator of (labels, process), one per batch: labels int64 [B] (None if the model knows no classes), process
        the iterator of (t, x [B, C, H, W], x0_hat) that ddpm.sample returns.
    Raises:
        UsageError: as sampling_defaults; a digit that the model does not know, or that guidance 0 would ignore;
            guidance that it was not trained for.
    """
    settings, device = model.settings, next(model.network.parameters()).device
    classes = known_classes(settings)
    steps, guidance, (low, high) = sampling_defaults(model, sampler, steps, guidance, guidance_interval)
    if digit is not None and digit >= classes:
        raise UsageError(f"--digit {digit}: the model knows " + (f"0 to {classes - 1}" if classes else "no classes"))
    if digit is not None and guidance == 0:
        raise UsageError(f"--guidance 0 ignores --digit {digit}; leave one of them out")
    if guidance != 1 and not knows_both(settings):
        how = "with labels only" if classes else "without labels"
        raise UsageError(f"--guidance {guidance:g}: the model was trained {how}; leave it at 1")
    where = [low <= sigma(alpha_bar) <= high for alpha_bar in model.ddpm.alpha_bars.tolist()]
    where = None if all(where) else torch.tensor(where, device=device)
    shape = settings["image_channels"], settings["image_size"], settings["image_size"]

    def batches():
        for start in range(0, n, batch_size):
            indices = range(start, min(start + batch_size, n))
            labels, denoiser = None, model.denoiser
            if classes:
                labels = torch.tensor([label(i, settings["class_shares"]) if digit is None else digit for i in indices])
                denoiser = guided(model.denoiser, labels.to(device), guidance, where)
            noise_fn = ImageNoise(seed, indices)
            x_T = noise_fn(torch.empty(len(indices), *shape, device=device))
            yield labels, model.ddpm.sample(denoiser, x_T, sampler=sampler, steps=steps, noise_fn=noise_fn, clip=clip)

    return batches()  # only these wait for whoever iterates: the checks above are made now


def label(i, shares):
    """The class of image i, such that the first n images have the classes in these shares, for any n, as nearly as can
    be, and in no order that the eye finds: multiples of the golden ratio modulo 1 fill the interval evenly."""
    u = i * (math.sqrt(5) - 1) / 2 % 1 * sum(shares)
    return next((k for k, end in enumerate(itertools.accumulate(shares)) if u < end), len(shares) - 1)


def run(main):
    """Runs a command's `main()` and exits: 0 on success, 2 on bad usage, 1 on any other failure, 130 on Ctrl-C, the
    last three with one line on stderr (none if it is the reader of our output that has gone).

    The traceback of a failure is shown only if the environment variable TRACEBACK is set.
    """
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):  # work that is done must not fail for a name that cannot be printed
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        _fail("interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of our output, `head` perhaps, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if os.environ.get("TRACEBACK"):
            raise
        if isinstance(error, OSError) and error.strerror:
            where = f"{error.filename}: " if error.filename else ""
            text = f"{where}{error.strerror}; check the path, its permissions and the space that is left there"
        elif isinstance(error, (ValueError, RuntimeError, OSError)):  # ours, or torch's, which read well
            text = str(error)
        else:
            text = f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError) or any(
                words in text for words in ("out of memory", "not enough memory", "allocate memory")):
            text = "out of memory; try a smaller --batch-size"
        _fail(" ".join(text.split()), 2 if isinstance(error, UsageError) else 1)


def _fail(text, code):
    print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)
    sys.exit(code)
