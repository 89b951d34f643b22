"""Images in: grey levels both ways, the shipped digits in any state of their files, other data sets, arrays."""
import hashlib
import lzma
import os
import shutil
import urllib.error
import zipfile

import numpy as np
import pytest
import torch
import torchvision

from helpers import DEVICE
from utils import data
from utils.data import DATASETS, class_of, load_dataset, pick, read_npz, to_float, to_uint8

# Published with the data set, or counted in it by many: images per digit, the first labels, and the grey levels' mean
# and standard deviation that every MNIST example normalises with.
TRAIN_COUNTS = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
TEST_COUNTS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


# ----------------------------------------------------------------------------------------------------------------------
# Grey levels

def test_all_grey_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    x = to_float(levels)
    assert x.dtype == torch.float32 and to_uint8(x).dtype == torch.uint8
    assert torch.equal(to_uint8(x), levels)
    assert (x[0], x[255]) == (-1, 1)
    torch.testing.assert_close(x.diff(), torch.full((255,), 2 / 255), rtol=0, atol=1e-6)


def test_the_shape_stays():
    assert to_float(torch.zeros(2, 3, 4, dtype=torch.uint8)).shape == to_uint8(torch.zeros(2, 3, 4)).shape == (2, 3, 4)


def test_what_lies_outside_is_clipped():
    assert to_uint8(torch.tensor([-torch.inf, -5, -1.003, 1.003, 5, torch.inf])).tolist() == [0, 0, 0, 255, 255, 255]


@pytest.mark.parametrize("offset", [-0.49, -0.1, 0.1, 0.49])
def test_levels_are_rounded_to_the_nearest(offset):
    levels = torch.arange(256)
    assert torch.equal(to_uint8((levels + offset) / 127.5 - 1).long(), levels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_float_types_are_rounded_in_float32(dtype):
    x = torch.linspace(-1, 1, 500).to(dtype)
    assert torch.equal(to_uint8(x), to_uint8(x.float()))


# ----------------------------------------------------------------------------------------------------------------------
# The shipped MNIST

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder in which all of MNIST is unpacked and intact."""
    root = tmp_path_factory.mktemp("data")
    load_dataset("MNIST", root, train=False)
    return root


@pytest.fixture
def root_copy(root, tmp_path):
    """The same, to be damaged."""
    shutil.copytree(root, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def no_training_digits(monkeypatch):
    """MNIST has its test digits only, which are unpacked in no time."""
    sums = {name: md5 for name, md5 in data.MNIST_MD5.items() if name.startswith("t10k")}
    monkeypatch.setattr(data, "MNIST_MD5", sums)


@pytest.mark.parametrize("train, counts, first, mean, std", [
    (True, TRAIN_COUNTS, [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], 0.1307, 0.3081),
    (False, TEST_COUNTS, [7, 2, 1, 0, 4, 1, 4, 9, 5, 9], 0.1325, 0.3105),
])
def test_mnist_is_mnist(root, train, counts, first, mean, std):
    images, labels = load_dataset("MNIST", root, train=train)
    assert images.shape == (sum(counts), 1, 28, 28) and images.dtype == torch.uint8 and images.is_contiguous()
    assert labels.shape == (sum(counts),) and labels.dtype == torch.int64
    assert torch.bincount(labels).tolist() == counts
    assert labels[:10].tolist() == first
    histogram = torch.bincount(images.flatten(), minlength=256) / images.numel()
    levels = torch.arange(256) / 255
    assert abs((histogram * levels).sum() - mean) < 5e-5
    assert abs((histogram * (levels - mean) ** 2).sum().sqrt() - std) < 5e-5


def test_the_test_set_is_not_the_training_set(root):
    train, _ = load_dataset("MNIST", root)
    test, _ = load_dataset("MNIST", root, train=False)
    assert not torch.equal(train[:100], test[:100])


def test_digits_stand_upright(root):
    """What no flip or transposition leaves as it is."""
    images, labels = load_dataset("MNIST", root, train=False)
    one, seven = (images[labels == digit].float().mean(dim=(0, 1)) for digit in (1, 7))
    wide = (seven > 60).sum(dim=1)
    assert wide[8:11].sum() > 1.5 * wide[18:21].sum()                      # a 7 has its bar at the top
    lit = one > 60
    assert lit.any(dim=1).sum() > 1.5 * lit.any(dim=0).sum()               # a 1 is tall
    middle = (one * torch.arange(28)).sum(dim=1) / one.sum(dim=1)
    assert middle[6] > middle[20] + 1                                      # and leans to the right


def damage_cut(content):
    return content[:len(content) // 2]


def damage_bit(content):
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


def damage_all(content):
    return b""


@pytest.mark.parametrize("damage", [damage_cut, damage_bit, damage_all])
@pytest.mark.parametrize("name", ["t10k-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
def test_a_damaged_unpacked_file_is_mended(root_copy, damage, name):
    path = root_copy / "MNIST" / "raw" / name
    good = path.read_bytes()
    path.write_bytes(damage(good))
    _, labels = load_dataset("MNIST", root_copy, train=False)
    assert torch.bincount(labels).tolist() == TEST_COUNTS
    assert path.read_bytes() == good


def test_intact_files_are_left_alone(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*ubyte")}
    load_dataset("MNIST", root, train=False)
    assert len(before) == 4 and {path: path.stat().st_mtime_ns for path in root.rglob("*ubyte")} == before


@pytest.mark.parametrize("damage", [damage_cut, damage_bit, damage_all, lambda content: b"no archive",
                                    lambda content: lzma.compress(b"another file")])
def test_a_damaged_archive_is_one_clear_line(root_copy, tmp_path, monkeypatch, damage):
    name = "t10k-labels-idx1-ubyte"
    (root_copy / "MNIST" / "raw" / name).unlink()
    (tmp_path / f"{name}.xz").write_bytes(damage(lzma.compress(b"label" * 5000, preset=0) + b"\0" * 6000))
    monkeypatch.setattr(data, "SHIPPED_MNIST", tmp_path)
    with pytest.raises(RuntimeError, match=rf"{name}\.xz is damaged.*restore it") as error:
        load_dataset("MNIST", root_copy)
    assert "\n" not in str(error.value)
    assert not (root_copy / "MNIST" / "raw" / name).exists()


def test_a_missing_archive_is_one_clear_line(root_copy, tmp_path, monkeypatch):
    (root_copy / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    monkeypatch.setattr(data, "SHIPPED_MNIST", tmp_path)
    with pytest.raises(RuntimeError, match="t10k-labels-idx1-ubyte.xz is missing"):
        load_dataset("MNIST", root_copy)


def test_the_shipped_archives_hold_the_published_files(root):
    """They are unpacked there."""
    for name, md5 in data.MNIST_MD5.items():
        content = (root / "MNIST" / "raw" / name).read_bytes()
        assert hashlib.md5(content, usedforsecurity=False).hexdigest() == md5


def test_a_root_that_cannot_be_written_does_no_harm(tmp_path, no_training_digits):
    (tmp_path / "file").write_text("a file, so that nothing can be made below it, not even by root")
    images, labels = load_dataset("MNIST", tmp_path / "file" / "data", train=False)
    assert len(images) == 10_000 and torch.bincount(labels).tolist() == TEST_COUNTS
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_half_unpacked_file_is_left(root_copy, no_training_digits, monkeypatch):
    """The disk is full at the end of a file: nothing of it stays, and a temporary folder serves instead."""
    name, replace = "t10k-images-idx3-ubyte", os.replace
    (root_copy / "MNIST" / "raw" / name).unlink()

    def full(source, target):
        if str(target).startswith(str(root_copy)):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    images, _ = load_dataset("MNIST", root_copy, train=False)
    assert len(images) == 10_000
    assert not [path for path in (root_copy / "MNIST" / "raw").iterdir() if name in path.name]


def test_a_gigantic_file_in_the_place_of_one_of_mnists_is_not_read(root_copy):
    """A terabyte, of holes. It is put right, as any other damaged file is."""
    expected = load_dataset("MNIST", root_copy, train=False)
    path, = root_copy.rglob("t10k-labels-idx1-ubyte")
    size = path.stat().st_size
    os.truncate(path, 10**12)
    read = load_dataset("MNIST", root_copy, train=False)
    assert all(map(torch.equal, read, expected)) and path.stat().st_size == size


# ----------------------------------------------------------------------------------------------------------------------
# The other data sets, without a network

def fake_dataset(monkeypatch, name, images, targets):
    """Puts a class in place of torchvision's, and returns the list of the arguments that it was made with."""
    made = []

    class Fake:
        def __init__(self, root, **kwargs):
            made.append((root, kwargs))
            self.data, self.targets = images, targets

    monkeypatch.setattr(torchvision.datasets, name, Fake)
    return made


@pytest.mark.parametrize("name", ["FashionMNIST", "KMNIST"])
@pytest.mark.parametrize("train", [True, False])
def test_other_sets_come_as_they_are(monkeypatch, name, train):
    images = torch.arange(4 * 28 * 28).remainder(251).to(torch.uint8).view(4, 28, 28)
    made = fake_dataset(monkeypatch, name, images, torch.tensor([3, 1, 0, 9], dtype=torch.uint8))
    loaded, labels = load_dataset(name, "somewhere", train=train)
    assert made == [("somewhere", {"train": train, "download": True})]
    assert torch.equal(loaded[:, 0], images) and loaded.shape == (4, 1, 28, 28)
    assert labels.tolist() == [3, 1, 0, 9] and labels.dtype == torch.int64


def test_emnist_is_turned_upright(monkeypatch):
    images = torch.arange(4 * 28 * 28).remainder(251).to(torch.uint8).view(4, 28, 28)
    made = fake_dataset(monkeypatch, "EMNIST", images, torch.tensor([46, 0, 1, 2]))
    loaded, _ = load_dataset("EMNIST", "somewhere")
    assert torch.equal(loaded[0, 0], images[0].T) and loaded.is_contiguous()
    assert made == [("somewhere", {"train": True, "download": True, "split": "balanced"})]


def test_qmnist_labels_are_the_first_column(monkeypatch):
    fake_dataset(monkeypatch, "QMNIST", torch.zeros(4, 28, 28, dtype=torch.uint8),
                 torch.tensor([[5, 0, 3607, 5, 97, 300, 0, 0], [2, 1, 2400, 2, 11, 4, 0, 0]] * 2))
    _, labels = load_dataset("QMNIST", "somewhere")
    assert labels.tolist() == [5, 2] * 2


def test_cifar10_is_in_colour(monkeypatch):
    """torchvision has an array [N, H, W, C], and a list."""
    pixels = np.arange(4 * 32 * 32 * 3).astype(np.uint8).reshape(4, 32, 32, 3)
    made = fake_dataset(monkeypatch, "CIFAR10", pixels, [6, 9, 0, 4])
    images, labels = load_dataset("CIFAR10", "somewhere", train=False)
    assert made == [("somewhere", {"train": False, "download": True})]
    assert images.shape == (4, 3, 32, 32) and images.is_contiguous() and images[2, 1, 5, 7] == pixels[2, 5, 7, 1]
    assert labels.tolist() == [6, 9, 0, 4] and labels.dtype == torch.int64


FINE = torch.zeros(3, 28, 28, dtype=torch.uint8)


@pytest.mark.parametrize("name, images, labels, reason", [
    ("KMNIST", FINE.float(), [0, 1, 2], "its images are torch.float32"),
    ("KMNIST", FINE[:, 2:], [0, 1, 2], r"its images are torch.uint8 \[3, 26, 28\]"),
    ("KMNIST", FINE[:0], [], r"its images are torch.uint8 \[0, 28, 28\]"),
    ("KMNIST", FINE, [0, 1], r"its images .* its labels \[2\]"),
    ("KMNIST", FINE[:2], [0, 1, 2], r"its images .* its labels \[3\]"),
    ("KMNIST", FINE, [0, -1, 2], "its labels run from -1 to 2"),
    ("KMNIST", FINE, [0, 1, 10], "its labels run from 0 to 10"),
    ("CIFAR10", FINE, [0, 1, 2], r"its images are torch.uint8 \[3, 28, 28\]"),
    ("EMNIST", FINE, [0, 1, 47], "its labels run from 0 to 47"),
    ("FashionMNIST", FINE, [0, 1, 10], "its labels run from 0 to 10"),
    ("QMNIST", FINE, [[0, 1], [1, 1], [10, 1]], "its labels run from 0 to 10"),
])
def test_files_with_something_else_in_them_say_what(monkeypatch, name, images, labels, reason):
    fake_dataset(monkeypatch, name, images, torch.tensor(labels, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=f"could not download or read {name} in somewhere: {reason}.*try again"):
        load_dataset(name, "somewhere")


@pytest.mark.parametrize("error, reason", [
    (urllib.error.URLError("no route to host"), "no route to host"),
    (RuntimeError("Error downloading x:\nTried y:\nz"), "Error downloading x: Tried y: z"),
    (EOFError(), "EOFError"),
])
def test_a_failed_download_says_what_to_do(monkeypatch, error, reason):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torchvision.datasets, "KMNIST", fail)
    words = f"could not download or read KMNIST in somewhere.*{reason}.*try again"
    with pytest.raises(RuntimeError, match=words) as caught:
        load_dataset("KMNIST", "somewhere")
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown data set 'SVHN'.*MNIST, FashionMNIST, .*QMNIST, CIFAR10"):
        load_dataset("SVHN")


@pytest.mark.parametrize("images, labels", [
    (np.full((5, 3, 8, 8), 7, np.uint8), np.arange(5, dtype=np.int32)),
    (torch.zeros(4, 8, 1, 8, dtype=torch.uint8).transpose(1, 2), [2, 0, 1, 1]),
])
@pytest.mark.parametrize("train", [True, False])
def test_a_data_set_that_was_added_is_loaded(monkeypatch, images, labels, train):
    asked = []
    monkeypatch.setitem(DATASETS, "mine", lambda root, train: asked.append((root, train)) or (images, labels))
    loaded, their_labels = load_dataset("mine", "somewhere", train)
    assert asked == [("somewhere", train)]
    assert torch.equal(loaded, torch.as_tensor(images)) and loaded.dtype == torch.uint8 and loaded.is_contiguous()
    assert their_labels.tolist() == list(labels) and their_labels.dtype == torch.int64


BLACK = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize("images, labels, words", [
    (BLACK / 255, [0, 1, 2, 3], "float32.*uint8, grey levels 0 to 255.*x \\* 255"),
    (BLACK[:, 0, :3], [0, 1, 2, 3], r"\[4, 3, 8\].*\[N, C, H, W\]"),
    (BLACK.expand(4, 2, 8, 8), [0, 1, 2, 3], r"\[4, 2, 8, 8\].*C = 1 or 3"),
    (BLACK[..., :4], [0, 1, 2, 3], r"\[4, 1, 8, 4\].*H = W"),
    (BLACK[:3], [0, 1, 2], "3 images.*4 images or more"), (BLACK, [0, 1, 2], r"4 images and labels of shape \[3\]"),
    (BLACK, [[1, 0]] * 4, r"labels of shape \[4, 2\]"),
    (BLACK, [0.0, 1, 2, 3], "labels.*float32.*whole numbers"), (BLACK, [True] * 4, "labels.*bool.*whole numbers"),
    (BLACK, [0, -1, 2, 3], "labels.*from 0 to K-1"), (BLACK, [0, 1, 2, 10_000], "labels.*at most 10,000"),
])
def test_a_data_set_that_is_none_says_what_is_wrong(monkeypatch, images, labels, words):
    monkeypatch.setitem(DATASETS, "mine", lambda root, train: (images, labels))
    with pytest.raises(ValueError, match=words) as caught:
        load_dataset("mine")
    assert "mine" in str(caught.value) and "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------------------------
# Arrays of any generator

def save_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def header(shape):
    """The first bytes of an .npy file of uint8 with this shape."""
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def refused(path, words=""):
    """It is refused in one line, with these words and the path."""
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        read_npz(path)
    return str(path) in str(caught.value) and "\n" not in str(caught.value)


GOOD = np.zeros((3, 28, 28), np.uint8)
BAD = {
    "no images": ({"pictures": GOOD}, "no array"),
    "floats": ({"images": GOOD.astype(np.float32)}, "float32"),
    "nan": ({"images": np.full((3, 28, 28), np.nan)}, "NaN"),
    "int64": ({"images": GOOD.astype(np.int64)}, "int64"),
    "objects": ({"images": np.array([{}, None], dtype=object)}, "damaged"),
    "another size": ({"images": np.zeros((3, 32, 32), np.uint8)}, "shape"),
    "three channels": ({"images": np.zeros((3, 3, 28, 28), np.uint8)}, "shape"),
    "one flat image": ({"images": GOOD[0]}, "shape"),
    "empty": ({"images": GOOD[:0]}, "no image"),
    "too few labels": ({"images": GOOD, "labels": np.zeros(2, np.int64)}, "labels"),
    "labels of floats": ({"images": GOOD, "labels": np.zeros(3)}, "labels"),
    "one-hot labels": ({"images": GOOD, "labels": np.zeros((3, 10), np.int64)}, "labels"),
    "labels out of range": ({"images": GOOD, "labels": np.array([0, 1, 10])}, "0 to 9"),
}


@pytest.mark.parametrize("arrays, words", BAD.values(), ids=BAD)
def test_unsound_arrays_are_refused(arrays, words, tmp_path):
    assert refused(save_npz(tmp_path / "bad.npz", **arrays), words)


def test_unsound_files_are_refused(tmp_path, monkeypatch):
    sound = save_npz(tmp_path / "sound.npz", images=np.random.default_rng(0).integers(0, 256, (9, 28, 28), np.uint8))
    content = bytearray(sound.read_bytes())
    (tmp_path / "truncated.npz").write_bytes(content[:len(content) // 2])
    content[3000] ^= 255                                                           # a pixel: the checksum fails
    (tmp_path / "flipped.npz").write_bytes(content)
    (tmp_path / "text.npz").write_text("not an archive")
    np.save(tmp_path / "array.npy", GOOD)
    # 784 GB by its header, 1 GB, and 392 MB, of which 1 KB is there
    for name, n in ("liar.npz", 10**9), ("less of a liar.npz", 1_300_000), ("small liar.npz", 500_000):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("images.npy", header((n, 28, 28)) + bytes(1000))
    for name, words in {"truncated.npz": "damaged", "flipped.npz": "damaged", "text.npz": "damaged",
                        "array.npy": "damaged", "liar.npz": "at most", "less of a liar.npz": "at most",
                        "small liar.npz": "shorter than the shape", "missing.npz": "no file",
                        ".": "not a file"}.items():
        assert refused(tmp_path / name, words), name
    # 1,300 digits that are there, where 1,000 may be, packed into 1 KB
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header((1300, 28, 28)) + bytes(1300 * 784))
    assert len(read_npz(tmp_path / "bomb.npz")[0]) == 1300
    monkeypatch.setattr(data, "LARGEST_ARRAY", 1000 * 784)
    assert refused(tmp_path / "bomb.npz", "at most")


def test_what_is_no_file_is_not_read():
    assert refused(DEVICE, "is not a file")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_numpy_does_not_use_are_refused(compression, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("images.npy", header(GOOD.shape) + GOOD.tobytes())
    assert refused(tmp_path / "a.npz", "compression")


def test_both_shapes_and_absent_labels_are_read(tmp_path, root):
    images, labels = (x[:5] for x in load_dataset("MNIST", root, train=False))
    for stored in images, images.squeeze(1):
        file = save_npz(tmp_path / "a.npz", images=stored, labels=labels.to(torch.uint8))
        read, read_labels = read_npz(file)
        assert torch.equal(read, images) and torch.equal(read_labels, labels)
    for extra in {}, {"labels": np.full(5, -1)}:                                   # -1: of a model without classes
        read, read_labels = read_npz(save_npz(tmp_path / "a.npz", images=images, **extra))
        assert torch.equal(read, images) and read_labels is None


@pytest.mark.parametrize("channels", [1, 3])
def test_improved_diffusions_arrays_are_read_and_a_line_says_so(tmp_path, root, capsys, channels):
    """arr_0 [N, H, W, C] and, of a model with classes, arr_1."""
    images, labels = (x[:5] for x in load_dataset("MNIST", root, train=False))
    stored = images.permute(0, 2, 3, 1).expand(-1, -1, -1, channels).numpy()
    read, read_labels = read_npz(save_npz(tmp_path / "a.npz", arr_0=stored, arr_1=labels))
    assert torch.equal(read, images) and torch.equal(read_labels, labels)
    assert "arr_0" in capsys.readouterr().err
    read, read_labels = read_npz(save_npz(tmp_path / "a.npz", arr_0=stored))
    assert torch.equal(read, images) and read_labels is None
    read, _ = read_npz(save_npz(tmp_path / "a.npz", arr_0=np.zeros((5, 28, 28), dtype=np.uint8)))
    assert read.shape == (5, 1, 28, 28)


def test_improved_diffusions_arrays_in_colour_are_refused(tmp_path, root):
    images = load_dataset("MNIST", root, train=False)[0][:5].permute(0, 2, 3, 1).repeat(1, 1, 1, 3).numpy()
    images[3, 14, 14, 1] ^= 1
    assert refused(save_npz(tmp_path / "a.npz", arr_0=images), "no array `images`|shape")


def test_pick_takes_the_same_images_in_whatever_order_they_come(root):
    images, labels = (x[:50] for x in load_dataset("MNIST", root))
    shuffled = torch.randperm(50, generator=torch.Generator().manual_seed(5))
    one, other = pick(images, labels, 20, 3), pick(images[shuffled], labels[shuffled], 20, 3)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert len(one[0].flatten(1).unique(dim=0)) == 20
    assert not torch.equal(one[0], pick(images, labels, 20, 4)[0])
    assert pick(images, None, 60, 3)[1] is None and len(pick(images, None, 60, 3)[0]) == 50


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4", ">u2"])
def test_labels_may_be_of_any_type_of_whole_numbers(kind, tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((10, 28, 28), np.uint8), labels=np.arange(10).astype(kind))
    _, labels = read_npz(tmp_path / "x.npz")
    assert labels.dtype == torch.int64 and labels.tolist() == list(range(10))


# ----------------------------------------------------------------------------------------------------------------------
# The class of image i

UNIFORM = [0.1] * 10
MNIST = [0.0987, 0.1124, 0.0993, 0.1022, 0.0974, 0.0904, 0.0986, 0.1044, 0.0975, 0.0991]
SHARES = {"uniform": UNIFORM, "MNIST": MNIST, "uneven": [0.7, 0.0, 0.2, 0.05, 0.03, 0.01, 0.01], "rare": [0.998, 0.002],
          "letters": [1 / 47] * 47}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_the_first_images_have_their_shares_however_many_they_are(shares):
    labels = np.array([class_of(i, shares) for i in range(3000)])
    counts = (labels[:, None] == np.arange(len(shares))).cumsum(axis=0)
    n = np.arange(1, 3001)[:, None]
    assert np.abs(counts - n * np.array(shares)).max() <= 4.5
    assert (counts[-1] > 0).tolist() == [share > 0 for share in shares]


@pytest.mark.parametrize("columns", range(5, 22))
@pytest.mark.parametrize("shares", [UNIFORM, MNIST], ids=["uniform", "MNIST"])
def test_grids_look_shuffled(shares, columns):
    """Of vertical neighbours in random order 28 % differ by at most one, and 10 % are equal."""
    labels = np.array([class_of(i, shares) for i in range(400)])
    apart = np.abs(labels[columns:] - labels[:-columns])
    assert 0.18 < (apart <= 1).mean() < 0.36 and (apart == 0).mean() < 0.16
