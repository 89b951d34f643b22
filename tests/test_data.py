"""Images in and out: grey levels both ways, the shipped digits in any state of their files, grids and GIFs."""
import hashlib
import lzma
import shutil
import urllib.error

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageSequence

import checkpoint
import data
from data import enlarge, load_dataset, make_grid, save_gif, save_png, to_float, to_uint8

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


def test_the_shipped_archives_hold_the_published_files():
    for name, md5 in data.MNIST_MD5.items():
        content = lzma.decompress((data.SHIPPED_MNIST / f"{name}.xz").read_bytes())
        assert hashlib.md5(content, usedforsecurity=False).hexdigest() == md5


def test_a_root_that_cannot_be_written_does_no_harm(tmp_path):
    (tmp_path / "file").write_text("a file, so that nothing can be made below it, not even by root")
    images, labels = load_dataset("MNIST", tmp_path / "file" / "data", train=False)
    assert len(images) == 10_000 and torch.bincount(labels).tolist() == TEST_COUNTS
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_half_unpacked_file_is_left(root_copy, monkeypatch):
    """The disk is full at the end of a file: nothing of it stays, and a temporary folder serves instead."""
    name, replace = "t10k-images-idx3-ubyte", checkpoint.os.replace
    (root_copy / "MNIST" / "raw" / name).unlink()

    def full(source, target):
        if str(target).startswith(str(root_copy)):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", full)
    images, _ = load_dataset("MNIST", root_copy, train=False)
    assert len(images) == 10_000
    assert not [path for path in (root_copy / "MNIST" / "raw").iterdir() if name in path.name]


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
    images = torch.arange(2 * 28 * 28).remainder(251).to(torch.uint8).view(2, 28, 28)
    made = fake_dataset(monkeypatch, name, images, torch.tensor([3, 1], dtype=torch.uint8))
    loaded, labels = load_dataset(name, "somewhere", train=train)
    assert made == [("somewhere", {"train": train, "download": True})]
    assert torch.equal(loaded[:, 0], images) and loaded.shape == (2, 1, 28, 28)
    assert labels.tolist() == [3, 1] and labels.dtype == torch.int64


def test_emnist_is_turned_upright(monkeypatch):
    images = torch.arange(28 * 28).remainder(251).to(torch.uint8).view(1, 28, 28)
    made = fake_dataset(monkeypatch, "EMNIST", images, torch.tensor([46]))
    loaded, _ = load_dataset("EMNIST", "somewhere")
    assert torch.equal(loaded[0, 0], images[0].T) and loaded.is_contiguous()
    assert made == [("somewhere", {"train": True, "download": True, "split": "balanced"})]


def test_qmnist_labels_are_the_first_column(monkeypatch):
    fake_dataset(monkeypatch, "QMNIST", torch.zeros(2, 28, 28, dtype=torch.uint8),
                 torch.tensor([[5, 0, 3607, 5, 97, 300, 0, 0], [2, 1, 2400, 2, 11, 4, 0, 0]]))
    _, labels = load_dataset("QMNIST", "somewhere")
    assert labels.tolist() == [5, 2]


FINE = torch.zeros(3, 28, 28, dtype=torch.uint8)


@pytest.mark.parametrize("name, images, labels, reason", [
    ("KMNIST", FINE.float(), [0, 1, 2], "its images are torch.float32"),
    ("KMNIST", FINE[:, 2:], [0, 1, 2], r"its images are torch.uint8 \[3, 26, 28\]"),
    ("KMNIST", FINE[:0], [], r"its images are torch.uint8 \[0, 28, 28\]"),
    ("KMNIST", FINE, [0, 1], r"its images .* its labels \[2\]"),
    ("KMNIST", FINE[:2], [0, 1, 2], r"its images .* its labels \[3\]"),
    ("KMNIST", FINE, [0, -1, 2], "its labels run from -1 to 2"),
    ("KMNIST", FINE, [0, 1, 10], "its labels run from 0 to 10"),
    ("EMNIST", FINE, [0, 1, 47], "its labels run from 0 to 47"),
])
def test_files_with_something_else_in_them_say_what(monkeypatch, name, images, labels, reason):
    fake_dataset(monkeypatch, name, images, torch.tensor(labels, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=f"could not download or read {name} in somewhere: {reason}.*try again"):
        load_dataset(name, "somewhere")


@pytest.mark.parametrize("error, reason", [
    (urllib.error.URLError("no route to host"), "no route to host"),
    (RuntimeError("Error downloading x:\nTried y:\nz"), "Error downloading x:"),
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
    with pytest.raises(ValueError, match="unknown data set 'CIFAR10'.*MNIST, FashionMNIST, KMNIST, EMNIST, QMNIST"):
        load_dataset("CIFAR10")


# ----------------------------------------------------------------------------------------------------------------------
# Grids and GIFs

@pytest.mark.parametrize("n, columns, rows_columns", [
    (1, None, (1, 1)), (2, None, (1, 2)), (7, None, (3, 3)), (64, None, (8, 8)), (65, None, (8, 9)), (7, 7, (1, 7)),
    (7, 2, (4, 2)),
])
@pytest.mark.parametrize("channels", [1, 3])
def test_grid_layout(n, columns, rows_columns, channels):
    rows, columns_made = rows_columns
    images = torch.randint(100, 256, (n, channels, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid = make_grid(images, columns)
    assert grid.dtype == np.uint8
    assert grid.shape == (rows * 7 + 2, columns_made * 6 + 2) + ((3,) if channels == 3 else ())
    canvas = grid if channels == 3 else grid[..., None]
    for i in range(n):
        top, left = 2 + i // columns_made * 7, 2 + i % columns_made * 6
        tile = canvas[top:top + 5, left:left + 4].copy()
        assert (tile.transpose(2, 0, 1) == images[i].numpy()).all()
        canvas[top:top + 5, left:left + 4] = 48
    assert (canvas == 48).all()  # nothing but the lines, and the places that are left over


def test_padding_may_be_none():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
    assert make_grid(images, columns=3, padding=0).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_enlarge_repeats_pixels():
    assert enlarge(np.array([[1, 2], [3, 4]]), 2).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert enlarge(np.zeros((2, 5, 3)), 3).shape == (6, 15, 3)


def test_a_digit_comes_back_from_a_png_pixel_by_pixel(root, tmp_path):
    images, _ = load_dataset("MNIST", root, train=False)
    images = to_uint8(to_float(images[:7]))
    save_png(tmp_path / "grid.png", enlarge(make_grid(images), 2))
    picture = iio.imread(tmp_path / "grid.png")
    assert picture.shape == (2 * 92, 2 * 92) and picture.dtype == np.uint8
    for i in range(7):
        top, left = 2 + i // 3 * 30, 2 + i % 3 * 30
        for offset in (0, 1):
            tile = picture[offset::2, offset::2][top:top + 28, left:left + 28]
            assert (tile == load_dataset("MNIST", root, train=False)[0][i, 0].numpy()).all()


def test_a_colour_png_keeps_its_colours(tmp_path):
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    save_png(tmp_path / "colour.png", picture)
    assert (iio.imread(tmp_path / "colour.png") == picture).all()


def gif_frames(path):
    """The frames [H, W, 3] and durations in milliseconds of a GIF, and how often it loops (0: for ever)."""
    with Image.open(path) as film:
        frames = [(np.array(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(film)]
        return [picture for picture, _ in frames], [duration for _, duration in frames], film.info["loop"]


def test_a_gif_has_its_frames_and_rests_on_the_last(tmp_path):
    generator = np.random.default_rng(0)  # of a size that has all grey levels in it
    frames = [generator.integers(0, 256, (64, 48), dtype=np.uint8) for _ in range(5)]
    save_gif(tmp_path / "x.gif", frames, frame_ms=40, rest_ms=1500)
    read, times, loop = gif_frames(tmp_path / "x.gif")
    assert times == [40, 40, 40, 40, 1500] and loop == 0
    for frame, expected in zip(read, frames, strict=True):
        assert (frame == expected[..., None]).all()


def test_gif_durations_are_milliseconds_by_default(tmp_path):
    save_gif(tmp_path / "x.gif", [np.full((6, 8), 80 * i, dtype=np.uint8) for i in range(3)])
    _, times, _ = gif_frames(tmp_path / "x.gif")
    assert times == [60, 60, 2000]


def test_a_gif_in_which_nothing_moves_takes_its_time(tmp_path):
    """Equal frames may become one, as long as the time stays."""
    still, moved = np.zeros((6, 8), dtype=np.uint8), np.full((6, 8), 9, dtype=np.uint8)
    save_gif(tmp_path / "x.gif", [still, still, still, moved, moved], frame_ms=50, rest_ms=1000)
    _, times, _ = gif_frames(tmp_path / "x.gif")
    assert sum(times) == 4 * 50 + 1000


def test_a_gif_of_one_frame(tmp_path):
    save_gif(tmp_path / "x.gif", [np.full((6, 8), 7, dtype=np.uint8)])
    with Image.open(tmp_path / "x.gif") as film:
        assert film.info["duration"] == 2000
    assert iio.imread(tmp_path / "x.gif", index=0).reshape(-1)[0] == 7
