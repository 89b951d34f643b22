"""Images in: data sets, each as one uint8 tensor, and the way between grey levels and [-1, 1].

`to_float` and `to_uint8` alone convert between grey levels (uint8, 0..255) and what the network sees (float, [-1, 1]).
"""
import bisect
import contextlib
import functools
import hashlib
import itertools
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from utils.cli import say
from utils.files import atomic_write, read_array

# MNIST ships with the repo and needs no download. The sums are those published for the unpacked files.
SHIPPED_MNIST = Path(__file__).resolve().parent.parent / "assets" / "mnist"
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
LARGEST = 50_000_000  # bytes; no file of MNIST is as large
FEWEST_IMAGES, MOST_CLASSES = 4, 10_000  # of a data set; the validation has four quarters


def to_float(images):
    """Grey levels uint8 0..255 -> float32 in [-1, 1], the range the diffusion works in. Any shape."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x):
    """Float in [-1, 1] -> grey levels uint8 0..255, rounded to the nearest; what lies outside is clipped. Any shape.

    The exact inverse of `to_float` on all 256 grey levels.
    """
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def finished(x):
    """The samples x, float [B, C, H, W], as images: uint8, on the CPU. Raises RuntimeError if they are not finite."""
    if not torch.isfinite(x).all():
        raise RuntimeError("the samples have NaN or infinite pixels; leave --no-clip out, or train longer")
    return to_uint8(x).cpu()


def load_dataset(name="MNIST", root="data", train=True):
    """A whole data set as two tensors on the CPU.

    Args:
        name: one of DATASETS. EMNIST is its "balanced" split: 47 classes of digits and letters.
        root: the folder torchvision keeps its files in. MNIST is unpacked there, the others are downloaded there.
        train: the training images, else the test images.
    Returns:
        images uint8 [N, C, H, W] and labels int64 [N], 0..K-1.
    Raises:
        ValueError: unknown name, or what its function returns is not as above.
        RuntimeError: a file is damaged, or a download failed; the message says what to do.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    returned = DATASETS[name](root, train)
    try:
        images, labels = (torch.as_tensor(x.copy() if isinstance(x, np.ndarray) else x) for x in returned)
    except Exception as error:
        raise ValueError(f"{name} is not a tensor or array of images and one of labels ({error})") from error
    if str(labels.dtype).startswith("torch.uint"):  # most of which torch cannot compare
        labels = labels.long()
    if images.dtype != torch.uint8:
        raise ValueError(f"the images of {name} are {images.dtype}, and must be uint8, grey levels 0 to 255; if they "
                         "are floats from 0 to 1, as ToTensor makes them, return (x * 255).round().to(torch.uint8)")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3]:
        raise ValueError(f"the images of {name} have shape {list(images.shape)}, and must be [N, C, H, W], with C = 1 "
                         "or 3 and H = W")
    if len(images) < FEWEST_IMAGES or labels.shape != images.shape[:1]:
        raise ValueError(f"{name} has {len(images)} images and labels of shape {list(labels.shape)}; it must have "
                         f"{FEWEST_IMAGES} images or more, and a label for each")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool \
            or not 0 <= labels.min() <= labels.max() < MOST_CLASSES:
        raise ValueError(f"the labels of {name} are {labels.dtype}, such as {labels[0].item()}, and must be whole "
                         f"numbers from 0 to K-1, with K at most {MOST_CLASSES:,}")
    return images.contiguous(), labels.long()


def _mnist(root, train):
    with _unpacked_mnist(root) as folder:
        # Not by torchvision, which would prefer whatever it finds in MNIST/processed.
        start = str(Path(folder) / "MNIST" / "raw" / ("train" if train else "t10k"))
        images, labels = (Path(start + end).read_bytes() for end in ("-images-idx3-ubyte", "-labels-idx1-ubyte"))
    images = torch.frombuffer(bytearray(images), dtype=torch.uint8, offset=16).view(-1, 1, 28, 28)
    return images, torch.frombuffer(bytearray(labels), dtype=torch.uint8, offset=8).long()


def _from_torchvision(name, classes, root, train, shape=(28, 28), **kwargs):
    from torchvision import datasets  # here and not above: it takes longer to import than 64 digits take to draw

    try:
        dataset = getattr(datasets, name)(root, train=train, download=True, **kwargs)
        images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
        if name == "QMNIST":
            labels = labels[:, 0]  # the other columns tell the writer and the position in NIST
        if name == "EMNIST":
            images = images.transpose(1, 2)  # its files are stored column by column
        if images.dtype != torch.uint8 or images.shape[1:] != shape or not 0 < len(images) == len(labels):
            raise ValueError(f"its images are {images.dtype} {list(images.shape)}, its labels {list(labels.shape)}")
        if not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(f"its labels run from {labels.min()} to {labels.max()}")
    except Exception as error:  # URLError, RuntimeError, EOFError, ...: torchvision raises whatever came up
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise RuntimeError(f"could not download or read {name} in {root}: {reason}. Check the network, delete "
                           "what is there of it and try again; MNIST needs no download") from error
    return images.permute(0, 3, 1, 2) if images.ndim == 4 else images.unsqueeze(1), labels


# To add a data set: write a function (root, train) -> images uint8 [N, C, H, W], labels int64 [N], and give it a name.
DATASETS = {
    "MNIST": _mnist,
    "FashionMNIST": functools.partial(_from_torchvision, "FashionMNIST", 10),
    "KMNIST": functools.partial(_from_torchvision, "KMNIST", 10),
    "EMNIST": functools.partial(_from_torchvision, "EMNIST", 47, split="balanced"),
    "QMNIST": functools.partial(_from_torchvision, "QMNIST", 10),
    "CIFAR10": functools.partial(_from_torchvision, "CIFAR10", 10, shape=(32, 32, 3)),
}


@contextlib.contextmanager
def _unpacked_mnist(root):
    """Context: a folder with the four files of MNIST where torchvision has them, unpacked and checked.

    That folder is `root`, or, where it cannot be written (a read-only clone), a temporary one.
    """
    try:
        _unpack_mnist(Path(root))
    except OSError:
        with tempfile.TemporaryDirectory() as temporary:
            _unpack_mnist(Path(temporary))
            yield temporary
    else:
        yield root


def _unpack_mnist(root):
    import lzma  # which a Python that was built without it lacks

    for name in MNIST_MD5:
        path = root / "MNIST" / "raw" / name
        if path.is_file() and path.stat().st_size < LARGEST and _is_intact(path.read_bytes(), name):
            continue
        archive = SHIPPED_MNIST / f"{name}.xz"
        try:
            # No more memory than a sound archive needs, whatever this one claims: xz -9 takes 65 MiB, and the content.
            content = lzma.LZMADecompressor(memlimit=2**27).decompress(archive.read_bytes(), max_length=LARGEST)
        except FileNotFoundError:
            raise RuntimeError(f"{archive} is missing; restore it with git checkout") from None
        except lzma.LZMAError:
            content = b""
        if not _is_intact(content, name):
            raise RuntimeError(f"{archive} is damaged: its MD5 sum is wrong; restore it with git checkout")
        with atomic_write(path) as file:
            file.write(content)


def _is_intact(content, name):
    return hashlib.md5(content, usedforsecurity=False).hexdigest() == MNIST_MD5[name]


def class_of(i, shares):
    """The class of image i, such that the first n images have the classes in these shares, for any n, give or take a
    few, and look shuffled in a grid: multiples of the golden ratio modulo 1 fill the interval evenly, and are shuffled
    ten at a time."""
    i = i // 10 * 10 + shuffled_ten(i // 10)[i % 10]
    u = i * (math.sqrt(5) - 1) / 2 % 1 * sum(shares)
    return min(bisect.bisect(list(itertools.accumulate(shares)), u), len(shares) - 1)


@functools.lru_cache(maxsize=2)
def shuffled_ten(k):
    """The k-th order of the numbers 0 to 9, a list."""
    return torch.randperm(10, generator=torch.Generator().manual_seed(k)).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# Images of any generator

LARGEST_ARRAY = 1_000_000 * 28 * 28  # bytes of an array that is read


def read_npz(path):
    """Reads `images` uint8 [N, 28, 28] or [N, 1, 28, 28] and, where there, `labels` int [N] of 0..9 from an .npz file.
    Without them, arr_0 [N, 28, 28, C] and arr_1, as improved-diffusion writes them: C is 1, or 3 and all are alike.

    Returns:
        images uint8 [N, 1, 28, 28], labels int64 [N] or None, also if all are -1, as sample.py writes them for a model
        without classes.
    Raises:
        FileNotFoundError, ValueError: with one line that says what is wrong.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file at {path}; python sample.py --n 10000 --npz FILE writes one")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; --npz wants an .npz file")
    images, labels = (read_array(path, name, LARGEST_ARRAY) for name in ("images", "labels"))
    if images is None:
        images, labels = (read_array(path, name, 3 * LARGEST_ARRAY) for name in ("arr_0", "arr_1"))
        if images is not None and images.ndim == 4 and (images == images[..., :1]).all():
            channels, images = images.shape[-1], images[..., 0]
            say(f"{path}: using arr_0 as the images" + (", one of its three equal channels" if channels == 3 else ""),
                sys.stderr)
    if images is None:
        raise ValueError(f"{path} has no array `images`; it must be uint8 [N, 28, 28]")
    if images.dtype != np.uint8:
        broken = " and hold NaN or infinity" if images.dtype.kind == "f" and not np.isfinite(images).all() else ""
        raise ValueError(f"{path}: images are {images.dtype}{broken}; they must be uint8, grey levels 0 to 255 "
                         "(utils.data.to_uint8 makes them from [-1, 1])")
    if images.ndim == 4 and images.shape[1] == 1:
        images = images[:, 0]
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(f"{path}: images have shape {list(images.shape)}; they must be [N, 28, 28] or [N, 1, 28, 28]")
    if not len(images):
        raise ValueError(f"{path} holds no image")
    images = torch.from_numpy(images).unsqueeze(1)
    if labels is None:
        return images, None
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise ValueError(f"{path}: labels are {labels.dtype} {list(labels.shape)}; they must be whole numbers "
                         f"[{len(images)}], one for each image")
    if (labels == -1).all():
        return images, None
    if not ((labels >= 0) & (labels <= 9)).all():
        raise ValueError(f"{path}: labels run from {labels.min()} to {labels.max()}; digits go from 0 to 9")
    return images, torch.from_numpy(labels.astype(np.int64))


def pick(images, labels, n, seed):
    """At most n images [N, 1, 28, 28], with their labels, drawn by the seed: the same in whatever order they came."""
    order = sorted(range(len(images)), key=lambda i: images[i].numpy().tobytes())
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]
    chosen = torch.tensor(order)[shuffled]
    return images[chosen], None if labels is None else labels[chosen]
