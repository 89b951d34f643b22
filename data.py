"""Images in, images out: data sets as one uint8 tensor, and grids and GIFs as files.

`to_float` and `to_uint8` are the only two functions of this project that go between grey levels (uint8, 0..255)
and what the network sees (float, [-1, 1]).
"""
import contextlib
import hashlib
import lzma
import math
import tempfile
from pathlib import Path

import numpy as np
import torch

from checkpoint import atomic_write

DATASETS = ("MNIST", "FashionMNIST", "KMNIST", "EMNIST", "QMNIST")
CLASSES = {"EMNIST": 47}  # the others have 10

# MNIST ships with the repo, so nothing here needs a network. The sums are those published for the unpacked files.
SHIPPED_MNIST = Path(__file__).resolve().parent / "assets" / "mnist"
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
LARGEST = 50_000_000  # bytes; no file of MNIST is as large


def to_float(images):
    """Grey levels uint8 0..255 -> float32 in [-1, 1], the range the diffusion works in. Any shape."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x):
    """Float in [-1, 1] -> grey levels uint8 0..255, rounded to the nearest; what lies outside is clipped. Any shape.

    The exact inverse of `to_float` on all 256 grey levels.
    """
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def load_dataset(name="MNIST", root="data", train=True):
    """A whole data set as two tensors on the CPU.

    Args:
        name: one of DATASETS. EMNIST is its "balanced" split: 47 classes of digits and letters.
        root: the folder torchvision keeps its files in; MNIST is unpacked there, the others are downloaded there.
        train: the training images, else the test images.
    Returns:
        images uint8 [N, 1, 28, 28] and labels int64 [N], 0..K-1.
    Raises:
        ValueError: unknown name.
        RuntimeError: a file is damaged, or a download failed; the message says what to do.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    if name == "MNIST":
        with _unpacked_mnist(root) as folder:
            # Not by torchvision, which would prefer whatever it finds in MNIST/processed.
            start = str(Path(folder) / "MNIST" / "raw" / ("train" if train else "t10k"))
            images, labels = (Path(start + end).read_bytes() for end in ("-images-idx3-ubyte", "-labels-idx1-ubyte"))
        images = torch.frombuffer(bytearray(images), dtype=torch.uint8, offset=16).view(-1, 1, 28, 28)
        return images, torch.frombuffer(bytearray(labels), dtype=torch.uint8, offset=8).long()

    try:
        images, labels = _downloaded(name, root, train)
        if images.dtype != torch.uint8 or images.shape[1:] != (28, 28) or not 0 < len(images) == len(labels):
            raise ValueError(f"its images are {images.dtype} {list(images.shape)}, its labels {list(labels.shape)}")
        if not 0 <= labels.min() <= labels.max() < CLASSES.get(name, 10):
            raise ValueError(f"its labels run from {labels.min()} to {labels.max()}")
    except Exception as error:  # URLError, RuntimeError, EOFError, ...: torchvision raises whatever came up
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(f"could not download or read {name} in {root}: {reason}. Check the network, delete "
                           f"{Path(root) / name} and try again; MNIST needs no download") from error
    return images.unsqueeze(1).contiguous(), labels.long()


def _downloaded(name, root, train):
    """One of torchvision's data sets, as images [N, 28, 28] and labels [N]."""
    from torchvision import datasets  # here and not above: it takes longer to import than 64 digits take to draw

    kwargs = {"split": "balanced"} if name == "EMNIST" else {}
    dataset = getattr(datasets, name)(root, train=train, download=True, **kwargs)
    images, labels = dataset.data, dataset.targets
    if name == "QMNIST":
        labels = labels[:, 0]  # the other columns tell the writer and the position in NIST
    if name == "EMNIST":
        images = images.transpose(1, 2)  # its files are stored column by column
    return images, labels


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


def make_grid(images, columns=None, padding=2):
    """Lays images out as one picture, row by row, on as near a square as there is.

    Written out because torchvision.utils.make_grid would double the start-up time of sample.py.

    Args:
        images: uint8 tensor [N, C, H, W], C = 1 or 3, N >= 1.
        columns: images per row; the default is ceil(sqrt(N)).
    Returns:
        uint8 array [rows * (H + padding) + padding, columns * (W + padding) + padding] (with a last axis of 3 if
        C = 3). The lines between images are dark grey, so that the edge of a black image shows.
    """
    n, c, h, w = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    canvas = np.full((c, rows * (h + padding) + padding, columns * (w + padding) + padding), 48, dtype=np.uint8)
    for i, image in enumerate(images.cpu().numpy()):
        top, left = padding + i // columns * (h + padding), padding + i % columns * (w + padding)
        canvas[:, top:top + h, left:left + w] = image
    return canvas[0] if c == 1 else canvas.transpose(1, 2, 0)


def enlarge(picture, factor):
    """Repeats every pixel factor x factor times: [H, W, ...] -> [H * factor, W * factor, ...]. Small digits stay sharp
    in a viewer that would blur them."""
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def save_png(path, picture):
    """Writes a uint8 array [H, W] or [H, W, 3] as a PNG, atomically."""
    import imageio.v3 as iio

    with atomic_write(path) as file:
        iio.imwrite(file, picture, extension=".png")


def save_gif(path, frames, frame_ms=60, rest_ms=2000):
    """Writes uint8 arrays [H, W] as a GIF that loops for ever, atomically.

    Args:
        frames: a sequence of at least one picture; the last one stays for `rest_ms`, the others for `frame_ms`
            milliseconds each (imageio 3 counts in milliseconds, imageio 2 counted in seconds).
    """
    import imageio.v3 as iio

    durations = [frame_ms] * (len(frames) - 1) + [rest_ms] if len(frames) > 1 else rest_ms
    with atomic_write(path) as file:
        # optimize=False: where a frame has all 256 grey levels Pillow's optimiser writes some pixels wrong.
        iio.imwrite(file, np.stack(frames), extension=".gif", duration=durations, loop=0, optimize=False)
