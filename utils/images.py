"""The folder of --images: any pictures, decoded once into one array in a file, from which training reads batches."""
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch

from utils.cli import Bar, UsageError, one_line, say
from utils.data import FEWEST_IMAGES, load_dataset
from utils.files import lock_folder, write_json
from utils.ranks import first_alone

HELD_OUT = 1 / 20  # share of the pictures that is for the validation
# Torchvision's, and more: what FORMATS lacks is refused, rather than silently left out.
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp",
           ".gif", ".jfif", ".heic", ".heif", ".avif")
FORMATS = "JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF"  # Pillow knows others, and runs programs for some
CHUNK, CHUNK_BYTES = 1000, 1 << 24  # pictures, or bytes of them, at most, that are decoded before they are written
THREADS = os.cpu_count()


@first_alone()
def load_images(settings, root="data", train=True, device="cpu"):
    """The images that a run learns from: those of its data set, or the pictures in its folder, settings["images"]; of
    either only settings["images_used"], if that is a number.

    Args:
        root: the folder of the data sets.
        train: the training images, else those for the validation.
    Returns:
        images uint8 [N, C, H, W] and labels int64 [N], on the device, and the number of classes, of which some may be
        without an image. But pictures stay on the CPU: see load_folder.
    Raises:
        ValueError, RuntimeError, OSError: as load_dataset or load_folder; there are fewer than are to be used.
    """
    if settings.get("images"):
        images, labels = load_folder(settings, root, train)
        classes = len(classes_of(settings["images"]))
    else:
        images, labels = (x.to(device) for x in load_dataset(settings["dataset"], root, train))
        classes = labels.max().item() + 1
    if train and (n := settings.get("images_used")):
        if n > len(images):
            raise ValueError(f"--images-used {n}: there are {len(images)} images to train on")
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings["seed"]))[:n]
        images, labels = images[chosen], labels[chosen]
    return images, labels.to(device), classes


def load_folder(settings, root="data", train=True):
    """The pictures in a run's folder, settings["images"].

    Args:
        root: the folder of the data sets. In .images/ below it is what was decoded.
        train: the training images, else those for the validation: a twentieth, by a hash of the name, so that pictures
            that are added move no others; four at least, those with the lowest hash.
    Returns:
        images uint8 [N, C, H, W], in their file: a tensor that is mapped into the memory, and must not be written to;
        and labels int64 [N].
    Raises:
        ValueError, OSError: a picture is broken; there are too few of them, or none.
    """
    folder, size, channels = settings["images"], settings["image_size"], 1 if settings["grey"] else 3

    # What there is: with the same names, sizes and times it is not decoded again.
    listing, lowest, below, n = hashlib.sha256(), [], 0, 0
    for name, _ in pictures(folder):
        stat, hashed, n = os.stat(os.path.join(folder, name)), place(name), n + 1
        listing.update(f"{stat.st_size} {stat.st_mtime_ns} {stat.st_mode} ".encode() + os.fsencode(name) + b"\0")
        lowest, below = sorted([*lowest, hashed])[:FEWEST_IMAGES], below + (hashed <= HELD_OUT)
    shape, cut = (n, channels, size, size), max(HELD_OUT, lowest[-1])
    # In the array pictures to train on come first, those held out after them; broken ones leave a gap after either.
    starts = {"train": 0, "held_out": n - max(below, len(lowest))}

    path = Path(folder).resolve()
    name = os.fsencode(path.name)[:100].decode(errors="ignore")  # with the rest it must not be longer than 255 bytes
    made = Path(root) / ".images" / "-".join([name, str(size), "grey" if channels == 1 else "rgb",
                                             hashlib.sha256(os.fsencode(path)).hexdigest()[:8]])
    made_of = {"version": 1, "folder": str(path), "listing": listing.hexdigest(), "shape": list(shape)}
    state, arrays = _kept(made)
    if state and state["made_of"] != made_of:
        say(f"{folder} has changed since it was decoded, and is decoded anew", sys.stderr)
    if not state or state["made_of"] != made_of:
        state = {"made_of": made_of, "done": 0, "train": 0, "held_out": 0, "not_square": 0, "left_out": 0, "first": ""}
    if state["left_out"] and not settings["skip_broken"]:
        raise ValueError(_broken(state["first"]))
    if state["done"] < n:
        arrays = None  # Windows removes no file that is open
        with lock_folder(made, "--data"):
            try:
                _decode_all(folder, made, state, shape, cut, starts, settings["skip_broken"])
            except OSError as error:
                error.filename = error.filename or str(made)  # of a failed write: a full disk, say
                raise
        _, arrays = _kept(made)
    if min(state["train"], state["held_out"]) < FEWEST_IMAGES:
        raise ValueError(f"{folder} has {state['train']} pictures to train on and {state['held_out']} for the "
                         f"validation; there must be {FEWEST_IMAGES} of each, or more")
    part = "train" if train else "held_out"
    images, labels = (array[starts[part]:starts[part] + state[part]] for array in arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that it must not be written to
        return torch.from_numpy(images), torch.from_numpy(labels.copy())


def check_outside(folder, places):
    """Raises UsageError if a flag of `places` (flag -> path) would put files into the folder of images (None: there is
    none), where they would be taken for images or classes."""
    for flag, place in places.items():
        if folder is not None and Path(place).resolve().is_relative_to(Path(folder).resolve()):
            raise UsageError(f"{flag} {place} lies in the folder of --images; choose one outside of it")


def classes_of(folder):
    """The names of a folder's sub-folders, sorted: those of the labels. [""] if there is none: one nameless class."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")) or [""]


def labels_in_words(settings):
    """What the folder of images in a run's settings was taken for, to be told; "" of a data set."""
    if settings["images"] is None:
        return ""
    if settings["label_dropout"] == 1:
        return ", without labels"
    names = classes_of(settings["images"])
    return f", labelled {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def pictures(folder):
    """Yields (name relative to the folder, label) of each picture, in a fixed order, with the labels of torchvision's
    ImageFolder, or 0 in a folder without sub-folders. The ending tells what is a picture; hidden files are skipped.

    Raises:
        ValueError: there is none in it, or in one of its sub-folders, or some are in it and some in sub-folders.
    """
    def fail(error):
        raise error

    def chosen(at, names):
        return sorted(name for name in names if not name.startswith(".") and name.lower().endswith(ENDINGS)
                      and os.path.isfile(os.path.join(at, name)))  # to open a pipe would block

    classes = classes_of(folder)
    if classes != [""] and (beside := chosen(folder, os.listdir(folder))):
        raise ValueError(f"{folder} has pictures, such as {beside[0]}, and sub-folders, such as {classes[0]}; put each "
                         "picture into the sub-folder of its class, or all into a folder without any")
    for label, name in enumerate(classes):
        found, seen = False, set(Path(folder, name).resolve().parents)
        for at, folders, files in os.walk(os.path.join(folder, name), onerror=fail, followlinks=True):
            if (real := Path(at).resolve()) in seen:  # a link to where we are or were: no going round in circles
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            inside = "" if Path(at) == Path(folder) else Path(at).relative_to(folder).as_posix() + "/"
            for file in chosen(at, files):
                found = True
                yield inside + file, label
        if not found:
            raise ValueError(f"{Path(folder, name)} has no picture in it, no file that ends in {', '.join(ENDINGS)}")


def place(name):
    """The hash of a name, as a number from 0 to 1."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:6], "big") / 2**48


def decode(path, size, grey):
    """A picture as uint8 [C, size, size], and whether it was square: the square in the middle of what `upright` makes
    of it. Of an animation it is the first frame.

    Raises:
        Exception: whatever Pillow raises for what is no picture, or only a part of one.
    """
    from PIL import Image, ImageOps

    with Image.open(path, formats=FORMATS) as image:
        if min(image.size) < 2:
            raise ValueError(f"it has {image.width}x{image.height} pixels")
        square = image.width == image.height
        image.draft(None, (3 * size, 3 * size))  # a large JPEG is decoded at half its size, or less, in less time
        image = upright(image).convert("L" if grey else "RGB")
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, -1).transpose(2, 0, 1), square


def upright(image):
    """A Pillow image in 8 bits, turned as its EXIF says, and on white where it is transparent."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are floats, and what is white is not known")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _attempt(path, size, grey):
    """What `decode` returns, or None and what is wrong with which picture."""
    try:
        return decode(path, size, grey)
    except MemoryError:
        raise
    except Exception as error:  # of which Pillow has many
        reason = "not a picture" if type(error).__name__ == "UnidentifiedImageError" else one_line(error)[:200]
        return None, f"{path} ({reason})"


def _broken(what):
    return f"a picture cannot be read: {what}. Fix it, remove it, or skip all such with --skip-broken"


def _kept(made):
    """The note in the folder, a dict, and the images and labels, mapped into the memory; None if one is lost."""
    try:
        state = json.loads((made / "made.json").read_bytes())
        return state, [np.load(made / f"{name}.npy", mmap_mode="r") for name in ("images", "labels")]
    except (OSError, ValueError, EOFError):
        return None, None


def _decode_all(folder, made, state, shape, cut, starts, skip_broken):
    """Goes on from where `state` says that it stands, and notes there, and on the disk, how far it has come."""
    from PIL import Image

    n, chunk = shape[0], max(1, min(CHUNK, CHUNK_BYTES // (shape[1] * shape[2] ** 2)))
    if not state["done"]:
        write_json(made / "made.json", state)  # before the older arrays go: nobody takes the new ones for whole
        for name in "images", "labels":
            (made / f"{name}.npy").unlink(missing_ok=True)  # a run that has it open keeps it
        needed, free = math.prod(shape) + 8 * n, shutil.disk_usage(made).free
        if needed > free:  # now, and not after an hour
            raise ValueError(f"the decoded pictures take {needed / 1e9:,.1f} GB, and {made} has {free / 1e9:,.1f}; "
                             "choose a smaller --image-size, or another --data")
        for name, dtype, array_shape in ("images", np.uint8, shape), ("labels", np.int64, shape[:1]):
            np.lib.format.open_memmap(made / f"{name}.npy", "w+", dtype, array_shape)
    names = itertools.islice(pictures(folder), state["done"], None)
    attempt = partial(_attempt, size=shape[2], grey=shape[1] == 1)
    # Not written through a map: a full disk would be a crash, and all of it would count as memory.
    with (open(made / "images.npy", "r+b") as images, open(made / "labels.npy", "r+b") as labels,
          Bar(desc="decoding", total=n, initial=state["done"], unit="picture", leave=False) as bar,
          warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool):
        warnings.simplefilter("ignore")  # Pillow's, about what it puts right
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        while some := list(itertools.islice(names, min(chunk, n - state["done"]))):
            rows = {"train": [], "held_out": []}
            decoded = pool.map(attempt, [os.path.join(folder, name) for name, _ in some])
            for (name, label), (pixels, what) in zip(some, decoded):
                if pixels is not None:
                    rows["held_out" if place(name) <= cut else "train"].append((pixels, np.int64(label)))
                    state["not_square"] += not what
                elif skip_broken:
                    state |= {"left_out": state["left_out"] + 1, "first": state["first"] or what}
                else:
                    raise ValueError(_broken(what))
            for part, start in starts.items():
                for file, values in zip((images, labels), zip(*rows[part])):
                    # From the end: at the beginning is numpy's header.
                    file.seek(values[0].nbytes * (start + state[part] - n), os.SEEK_END)
                    file.write(np.stack(values).tobytes())
                state[part] += len(rows[part])
            for file in images, labels:
                file.flush()
                os.fsync(file.fileno())
            state["done"] += len(some)
            write_json(made / "made.json", state)
            bar.advance(len(some), f"decoded {state['done']:,} of {n:,} pictures")
    if state["done"] < n or next(names, None):
        (made / "made.json").unlink()  # the folder may become again what it was, but these are not its pictures
        raise ValueError(f"{folder} has changed while it was decoded; start again")
    if state["not_square"]:
        say(f"{state['not_square']:,} of {n:,} pictures are not square; the middle of each is used", sys.stderr)
    if state["left_out"]:
        say(f"left out {state['left_out']:,} of {n:,} pictures; the first is {state['first']}", sys.stderr)
