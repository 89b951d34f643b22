"""A folder of pictures: what becomes of each, what is decoded again and what is not, what is held out, and runs."""
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

import edit
import evaluate
import sample
import train
from helpers import FLAGS, ROOT, assert_one_line, call, few_digits, same
from utils import images, settings
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.data import load_dataset
from utils.images import load_images, place
from utils.metrics import Validation

SIZE = 8
LANCZOS = Image.Resampling.LANCZOS


@pytest.fixture(scope="module", autouse=True)
def quick():
    with few_digits():
        yield


def colours(i, height=12, width=12):
    """A picture of random colours, the i-th."""
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8))


def folder_of(path, *names, **size):
    """A folder with a picture for each name, all different."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        colours(int(1e9 * place(name)), **size).save(path / name)
    return path


@pytest.fixture
def pets(tmp_path):
    """40 pictures in two sub-folders."""
    return folder_of(tmp_path / "Pets", *[f"{kind}/{i:02}.png" for kind in ("cats", "dogs") for i in range(20)])


def load(folder, train=True, size=SIZE, grey=False, skip_broken=False):
    return load_images({"images": str(folder), "image_size": size, "grey": grey, "skip_broken": skip_broken},
                       folder.parent / "data", train)[:2]


def everything(folder, **settings):
    """The pixels of all images, each with its label, whichever part it is in: a set."""
    return {(image.numpy().tobytes(), label.item()) for train in (True, False)
            for image, label in zip(*load(folder, train, **settings))}


def by_pillow(picture, grey=False, size=SIZE):
    return np.asarray(ImageOps.fit(picture.convert("L" if grey else "RGB"), (size, size), LANCZOS))


def of_pets(folder, grey=False):
    """What `everything` should be."""
    return {(by_pillow(Image.open(path), grey).reshape(SIZE, SIZE, -1).transpose(2, 0, 1).tobytes(), label)
            for label, kind in enumerate(("cats", "dogs")) for path in (folder / kind).glob("[!.]*.png")
            if path.is_file()}


def note(folder):
    path, = (folder.parent / "data").glob(".images/*/made.json")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# What becomes of a picture

@pytest.mark.parametrize("grey", [False, True])
def test_pixels_are_pillows_and_labels_are_the_sub_folders(pets, grey, capsys):
    (pets / ".cache").mkdir()
    for ignored in "cats/.hidden.png", "cats/notes.txt", ".cache/x.png", ".top.png":
        (pets / ignored).write_bytes(b"no picture")
    os.mkfifo(pets / "cats" / "pipe.png")
    assert everything(pets, grey=grey) == of_pets(pets, grey) and len(of_pets(pets, grey)) == 40
    loaded, labels = load(pets, grey=grey)
    assert loaded.shape == (36, 1 if grey else 3, SIZE, SIZE) and loaded.dtype == torch.uint8 and loaded.is_contiguous()
    assert labels.shape == (36,) and labels.dtype == torch.int64 and len(load(pets, False, grey=grey)[0]) == 4
    assert capsys.readouterr().err == ""


def test_digits_come_back_as_they_were(tmp_path):
    """From sub-folders, in which there may be others, and without labels from a folder that has none."""
    digits, labels = (x[:60] for x in load_dataset("MNIST"))
    for i, (digit, label) in enumerate(zip(digits, labels.tolist())):
        for path in tmp_path / "sorted" / str(label) / "below" / f"{i}.png", tmp_path / "flat" / f"{i}.PNG":
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(digit[0].numpy()).save(path)
    expected = {(digit.numpy().tobytes(), label) for digit, label in zip(digits, labels.tolist())}
    assert everything(tmp_path / "sorted", size=28, grey=True) == expected
    assert everything(tmp_path / "flat", size=28, grey=True) == {(digit, 0) for digit, _ in expected}


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    folder_of(tmp_path / "elsewhere", "a.png", "below/b.png")
    folder_of(tmp_path / "Pets", *[f"cats/{i}.png" for i in range(10)], "dogs/d.png")
    for link, to in ("more", tmp_path / "elsewhere"), ("more2", "more"), ("up", tmp_path / "Pets"), ("here", "."):
        (tmp_path / "Pets" / "cats" / link).symlink_to(to)
    (tmp_path / "elsewhere" / "below" / "back").symlink_to(tmp_path / "Pets" / "cats")
    assert [name for name, _ in images.pictures(tmp_path / "Pets")] == [
        *[f"cats/{i}.png" for i in range(10)], "cats/more/a.png", "cats/more/below/b.png", "dogs/d.png"]


def test_pictures_may_lie_beside_what_is_made_of_them(pets):
    """As when --images is the folder of --data."""
    settings = {"images": str(pets), "image_size": SIZE, "grey": False, "skip_broken": False}
    for _ in range(2):
        assert load_images(settings, pets)[2] == 2


def test_a_class_whose_pictures_are_all_held_out_is_one(tmp_path):
    last = next(f"z/{i}.png" for i in range(1000) if place(f"z/{i}.png") < images.HELD_OUT)
    folder = folder_of(tmp_path / "Pets", *[f"a/{i}.png" for i in range(60)], last)
    settings = {"images": str(folder), "image_size": SIZE, "grey": False, "skip_broken": False}
    _, labels, classes = load_images(settings, tmp_path)
    assert labels.max() == 0 and classes == 2


def test_endings_are_torchvisions_and_others_of_pictures():
    assert images.ENDINGS == (*IMG_EXTENSIONS, ".gif", ".jfif", ".heic", ".heif", ".avif")


def test_pictures_of_other_endings_are_not_left_out_silently(pets):
    """A JPEG of Windows is one like others; what Pillow may not be able to read is refused, or left out by a flag."""
    (pets / "cats" / "00.png").unlink()
    colours(7).save(pets / "cats" / "00.jfif", "JPEG")
    assert len(everything(pets)) == 40
    (pets / "dogs" / "phone.heic").write_bytes(b"not for Pillow")
    with pytest.raises(ValueError, match="phone.heic.*--skip-broken"):
        load(pets)
    assert len(everything(pets, skip_broken=True)) == 40


def kinds():
    """name: a picture, what it is to Pillow once it is RGB or grey, and how to save it."""
    rgb, high = colours(0), colours(0, 30, 12)
    grey, palette, clear = rgb.convert("L"), rgb.quantize(8), rgb.copy()
    levels = np.asarray(grey).clip(1, 254)
    grey = Image.fromarray(levels)
    seen = np.random.default_rng(1).integers(0, 2, (12, 12), np.uint8)
    clear.putalpha(Image.fromarray(seen * 255))
    on_white = Image.fromarray(np.where(seen[..., None], rgb, 255).astype(np.uint8))
    holes = np.where(np.asarray(palette)[..., None] == 3, 255, palette.convert("RGB")).astype(np.uint8)
    words = Image.Exif()
    words[0x0112] = 6  # to be turned to the right
    return {
        "rgba.png": (clear, on_white, {}),
        "16 bits.png": (Image.fromarray(levels.astype(np.uint16) * 257 + 100), grey, {}),
        "la.png": (clear.convert("LA"), Image.fromarray(np.where(seen, levels, 255).astype(np.uint8)), {}),
        "palette.png": (palette, palette, {}), "holes.png": (palette, Image.fromarray(holes), {"transparency": 3}),
        "bits.png": (grey.convert("1"), grey.convert("1"), {}), "cmyk.tif": (rgb.convert("CMYK"), rgb, {}),
        "32 bits.tif": (Image.fromarray(levels.astype(np.int32) * 257 - 100), grey, {}), "high.png": (high, high, {}),
        "two.gif": (palette, palette, {"save_all": True, "append_images": [colours(5).quantize(8)]}),
        "turned.png": (rgb.transpose(Image.Transpose.ROTATE_90), rgb, {"exif": words}),
        "small.bmp": (rgb.crop((0, 0, 2, 2)), rgb.crop((0, 0, 2, 2)), {}),
    }


@pytest.mark.parametrize("name", kinds())
@pytest.mark.parametrize("grey", [False, True])
def test_kinds_of_pictures(name, grey, tmp_path):
    picture, expected, how = kinds()[name]
    picture.save(tmp_path / name, **how)
    pixels, square = images.decode(tmp_path / name, SIZE, grey)
    assert pixels.dtype == np.uint8 and square == (name != "high.png")
    assert np.array_equal(pixels.transpose(1, 2, 0).squeeze(), by_pillow(expected.convert("RGB"), grey))


def test_a_large_jpeg_is_not_decoded_in_full(tmp_path, monkeypatch):
    sizes, transpose = [], ImageOps.exif_transpose
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image: sizes.append(image.size) or transpose(image))
    colours(0, 9, 12).resize((1200, 900), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    pixels, square = images.decode(tmp_path / "a.jpg", SIZE, False)
    assert sizes == [(150, 113)] and not square
    assert np.abs(pixels.transpose(1, 2, 0) - by_pillow(Image.open(tmp_path / "a.jpg")).astype(int)).mean() < 2


# ----------------------------------------------------------------------------------------------------------------------
# What is decoded again

@pytest.fixture
def decoded(monkeypatch):
    """The names of the pictures that were decoded, as they are."""
    names, decode = [], images.decode
    monkeypatch.setattr(images, "decode", lambda path, *args, **kw: names.append(path) or decode(path, *args, **kw))
    return names


def test_a_folder_is_decoded_once_and_anew_when_it_has_changed(pets, decoded, capsys):
    before = everything(pets)
    assert len(decoded) == 40 and everything(pets) == before and len(decoded) == 40
    everything(pets, grey=True), everything(pets, size=4)  # which have places of their own
    assert len(decoded) == 120 and everything(pets) == before and len(decoded) == 120
    assert capsys.readouterr().err == ""
    for path in (pets.parent / "data").glob(".images/*-[4g]*"):
        shutil.rmtree(path)
    opened = load(pets)[0]
    kept, path, other = opened.clone(), pets / "cats" / "00.png", pets / "cats" / "02.png"
    for change in (lambda: os.utime(path, ns=(1, 1)), lambda: path.chmod(0o600), path.unlink,
                   lambda: other.rename(pets / "cats" / "02b.png"), lambda: colours(77, 5, 5).save(path),
                   lambda: shutil.copy(path, pets / "dogs" / "new.png")):
        change()
        decoded.clear()
        assert everything(pets) == of_pets(pets) and len(decoded) == len([*pets.rglob("*.png")])
        assert capsys.readouterr().err == f"{pets} has changed since it was decoded, and is decoded anew\n"
    assert torch.equal(opened, kept)  # whoever has the older one open keeps it


@pytest.mark.parametrize("lost", ["images.npy", "labels.npy", "made.json"])
@pytest.mark.parametrize("how", ["gone", "cut", "empty"])
def test_what_was_lost_is_made_again(pets, lost, how):
    before = everything(pets)
    path = note(pets).parent / lost
    path.unlink() if how == "gone" else os.truncate(path, path.stat().st_size // 2 if how == "cut" else 0)
    assert everything(pets) == before


@pytest.mark.parametrize("stop", [0, 1, 17, 39])
def test_a_decoding_that_was_interrupted_goes_on(pets, decoded, monkeypatch, stop):
    monkeypatch.setattr(images, "CHUNK", 7)
    monkeypatch.setattr(images, "THREADS", 1)
    decode = images.decode

    def interrupted(*args, **kwargs):
        if len(decoded) == stop:
            raise MemoryError  # which is not taken for a broken picture
        return decode(*args, **kwargs)

    monkeypatch.setattr(images, "decode", interrupted)
    with pytest.raises(MemoryError):
        load(pets, skip_broken=True)
    assert json.loads(note(pets).read_text())["done"] == stop // 7 * 7
    monkeypatch.setattr(images, "decode", decode)
    decoded.clear()
    assert everything(pets) == of_pets(pets) and len(decoded) == 40 - stop // 7 * 7


CHILD = """if True:
    import os, resource, signal, sys
    from utils import images
    images.CHUNK_BYTES, write_json, noted = 60 * 3 * 128**2, images.write_json, []
    def load(folder, size):
        settings = {"images": folder, "image_size": size, "grey": False, "skip_broken": False}
        images.load_images(settings, os.path.dirname(folder) + "/data")
    for folder in sys.argv[1:3]:
        load(folder, 128)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
    def killed(path, state):
        noted.append(state)
        os.kill(os.getpid(), signal.SIGKILL) if len(noted) == 5 else write_json(path, state)
    images.CHUNK, images.write_json = 7, killed
    load(sys.argv[3], 8)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="kilobytes, and SIGKILL")
def test_more_pictures_take_no_more_memory_and_kill_9_loses_none(tmp_path):
    """50 KB each, first 60 and then 600 of them; then some that are killed as they are written."""
    colours(0, 4, 4).save(tmp_path / "a.png")
    for n in 60, 600:
        (tmp_path / str(n)).mkdir()
        for i in range(n):
            os.link(tmp_path / "a.png", tmp_path / str(n) / f"{i}.png")
    pets = folder_of(tmp_path / "one" / "pets", *[f"{i}.png" for i in range(60)])
    result = subprocess.run([sys.executable, "-c", CHILD, tmp_path / "60", tmp_path / "600", pets], cwd=ROOT,
                            text=True, capture_output=True)
    few, many = map(int, result.stdout.split())
    assert many < few + 10_000, (few, many)
    assert result.returncode == -signal.SIGKILL and json.loads(note(pets).read_text())["done"] == 21
    load(pets)
    made = [{path.name: path.read_bytes() for path in note(pets).parent.iterdir()}]
    shutil.rmtree(pets.parent / "data")
    load(pets)
    assert made == [{path.name: path.read_bytes() for path in note(pets).parent.iterdir()}] and len(made[0]) == 4


def test_two_runs_do_not_decode_at_once(pets):
    load(pets)
    note(pets).write_text(json.dumps(json.loads(note(pets).read_text()) | {"done": 7}))
    with images.lock_folder(note(pets).parent), pytest.raises(RuntimeError, match="another run .* another --data"):
        load(pets)


@pytest.mark.parametrize("here, there", [("dogs/05.png", "aside.png"), ("aside.png", "dogs/05b.png")],
                         ids=["fewer", "more"])
def test_a_folder_that_changes_while_it_is_decoded(pets, monkeypatch, here, there):
    """Nothing that was decoded is taken for what the folder holds, even if that is in the end what it was."""
    colours(1).save(pets.parent / "aside.png")
    here, there = ((pets.parent if name == "aside.png" else pets) / name for name in (here, there))
    expected = everything(Path(shutil.copytree(pets, pets.parent / "other" / "Pets")))

    def changing(*args, decode=images.decode, **kwargs):
        with contextlib.suppress(FileNotFoundError):  # it has been moved
            here.rename(there)
        return decode(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(images, "CHUNK", 7)
        patch.setattr(images, "decode", changing)
        with pytest.raises(ValueError, match="changed while it was decoded; start again"):
            load(pets)
    there.rename(here)
    assert everything(pets) == expected


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be read

def test_a_disk_that_is_full_while_pictures_are_decoded(pets, monkeypatch):
    def full(descriptor, fsync=os.fsync):
        if os.fstat(descriptor).st_size > 5000:  # the pictures, not the note beside them
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(images.os, "fsync", full)
    with pytest.raises(OSError, match="No space") as error:
        load(pets)
    assert error.value.filename.startswith(str(pets.parent / "data"))
    monkeypatch.undo()
    assert everything(pets) == of_pets(pets)  # nothing that was half made is taken for whole


def test_a_disk_that_is_too_small_is_found_out_before_pictures_are_decoded(pets, monkeypatch):
    needed = 40 * (3 * SIZE * SIZE + 8)
    monkeypatch.setattr(images, "decode", lambda *args, **settings: pytest.fail("one is decoded"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=needed - 1))
    with pytest.raises(ValueError, match=f"GB, and {pets.parent / 'data'}.*--image-size"):
        load(pets)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=needed))
    assert everything(pets) == of_pets(pets)


def cut(path):
    colours(0, 50, 50).save(path)
    os.truncate(path, path.stat().st_size // 2)


BROKEN = {
    "text.png": lambda path: path.write_text("no picture"), "empty.jpg": lambda path: path.touch(), "cut.png": cut,
    "cut.bmp": cut, "cut.jpg": cut, "cut.gif": cut, "cut.webp": cut,
    "thin.png": lambda path: colours(0, 9, 1).save(path),
    "float.tiff": lambda path: Image.fromarray(np.ones((9, 9), np.float32)).save(path),
    "other.png": lambda path: colours(0).save(path, "PCX"),  # Pillow reads more, some of it by running programs
    "large.png": lambda path: colours(0, 200, 60).save(path), "huge.png": lambda path: colours(0, 200, 120).save(path),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_picture_that_cannot_be_read(name, pets, monkeypatch, capsys):
    """The line names it, and --skip-broken, with which another line does. That the others are done does not hide it."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 11_000)
    sound = everything(pets)
    BROKEN[name](pets / "cats" / name)
    for skipped in False, True:
        with pytest.raises(ValueError, match=rf"{pets}/cats/{name} \(.*\)\. .* --skip-broken$") as error:
            load(pets)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
        capsys.readouterr()
        assert everything(pets, skip_broken=True) == sound
        said = capsys.readouterr().err
        assert skipped or re.fullmatch(rf"left out 1 of 41 pictures; the first is {pets}/cats/{name} \(.*\)\n", said)


def test_many_are_broken_and_not_square(tmp_path, capsys):
    folder = folder_of(tmp_path / "f", *[f"{i:02}.png" for i in range(40)], height=9)
    for i in [*range(5, 15)]:
        (folder / f"{i:02}.png").write_bytes(b"")
    lines = "30 of 40 pictures are not square; .*\nleft out 10 of 40 pictures; the first is .*05.png .*\n"
    with pytest.raises(ValueError, match="27 pictures to train on and 3 for the validation; there must be 4"):
        load(folder, skip_broken=True)
    assert re.fullmatch(lines, capsys.readouterr().err)
    folder_of(folder, *[f"{i:02}.png" for i in range(40, 200)])
    assert len(everything(folder, skip_broken=True)) == 190


def emptied(pets):
    for path in pets.rglob("*.png"):
        path.unlink()


@pytest.mark.parametrize("change, words", [
    (shutil.rmtree, "No such file"), (lambda pets: shutil.rmtree(pets) or pets.touch(), "Not a directory"),
    (lambda pets: colours(0).save(pets / "top.png"), "top.png, and sub-folders, such as cats; put"),
    (emptied, "cats has no picture"),
    (lambda pets: (pets / "birds").mkdir(), "birds has no picture in it, no file that ends in .jpg, .*.webp, .gif"),
    (lambda pets: shutil.rmtree(pets) or pets.mkdir(), "Pets has no picture in it"),
    (lambda pets: shutil.rmtree(pets) or folder_of(pets, *[f"{i}.png" for i in range(7)]), "has 3 pictures to train"),
])
def test_folders_that_are_none(pets, change, words):
    change(pets)
    result = call(train, *FLAGS, "--images", pets, "--data", pets.parent / "d", "--out", pets.parent / "run")
    assert_one_line(result, 1, pets)
    assert re.search(words, result.err), result.err


# ----------------------------------------------------------------------------------------------------------------------
# What is held out

def test_pictures_that_are_added_move_no_others(tmp_path):
    names = [f"{i}.png" for i in range(400)]
    folder = folder_of(tmp_path / "f", *names[::2], height=3, width=3)

    def parts():
        found = [{image.numpy().tobytes() for image in load(folder, train, size=4)[0]} for train in (True, False)]
        assert not found[0] & found[1]
        return found

    learned, held_out = parts()
    assert len(learned) + len(held_out) == 200 and 4 < len(held_out) < 20
    folder_of(folder, *names[1::2], height=3, width=3)
    more_learned, more_held_out = parts()
    assert learned < more_learned and held_out < more_held_out and len(more_learned) + len(more_held_out) == 400


# ----------------------------------------------------------------------------------------------------------------------
# Runs

TINY = [*FLAGS, "--batch-size", 4, "--image-size", SIZE]
CHECKPOINT = Path("runs/pets/checkpoint.pt")


def test_a_run_goes_on_with_its_levels_when_pictures_are_added(tmp_path):
    """Its weights are for them. A new run would have another one: white."""
    folder = folder_of(tmp_path / "f", *[f"{i}.png" for i in range(20)])
    flags = ["--images", folder, "--data", tmp_path / "data", "--out", tmp_path / "run"]
    assert call(train, *TINY, *flags, "--max-steps", 2).code == 0
    levels = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["settings"]["levels"]
    for i in range(10):
        iio.imwrite(folder / f"white{i}.png", np.full((12, 12, 3), 255, np.uint8))
    result = call(train, *flags, "--resume", "--max-steps", 4)
    assert result.code == 0, result.err
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["settings"]["levels"] == levels
    assert call(train, *TINY, *flags[:-1], tmp_path / "new", "--max-steps", 1).code == 0
    new = load_checkpoint(tmp_path / "new" / "checkpoint.pt")["settings"]["levels"]
    assert 255 in new and new != levels


@pytest.fixture
def trained(pets, monkeypatch):
    """The settings of a run of two steps on them, in the folder that we are in."""
    monkeypatch.chdir(pets.parent)
    result = call(train, *TINY, "--images", "Pets", "--max-steps", 2)
    assert (result.code, result.err) == (0, "") and "images      36 of Pets/, 4 per step" in result.out
    return load_checkpoint(CHECKPOINT)["settings"]


def test_a_run_says_what_the_folder_was_taken_for(pets, monkeypatch):
    """The classes, as a folder one level too high has others: here one, and so no labels."""
    monkeypatch.chdir(pets.parent)
    (pets.parent / "above").mkdir()
    pets.rename(pets.parent / "above" / "Pets")
    for folder, flags, words in [("above/Pets", [], "labelled cats, dogs"), ("above", [], "without labels"),
                                 ("above/Pets", ["--label-dropout", 1], "without labels")]:
        result = call(train, *TINY, "--images", folder, *flags, "--max-steps", 1, "--overwrite")
        assert f"/, 4 per step, {words}\n" in result.out, result
    folder_of(Path("many"), *[f"{i:02}/x.png" for i in range(11)])
    assert images.labels_in_words({"images": "many", "label_dropout": 0.1}).endswith(" 06, 07 and 3 more")


def test_a_run_on_pictures_goes_on_as_if_it_had_not_stopped(trained):
    assert trained.items() >= {"dataset": "Pets/", "images": str(Path("Pets").absolute()), "image_size": SIZE,
                               "image_channels": 3, "classes": 2, "grey": False, "skip_broken": False,
                               "label_dropout": 0.1}.items()
    assert call(train, *TINY, "--images", "Pets", "--max-steps", 4, "--out", "alone").code == 0
    for flags in ["--images", "Pets", "--max-steps", 3], ["--out", "runs/pets", "--max-steps", 4, "--skip-broken"]:
        assert call(train, "--device", "cpu", "--resume", *flags).code == 0
    held_out = Validation(trained, "data", torch.device("cpu")).images
    expected, _ = load(Path("Pets").resolve(), train=False)
    assert sorted(held_out.flatten(1).tolist()) == sorted(expected.flatten(1).tolist())
    ours, theirs = load_checkpoint(CHECKPOINT), load_checkpoint("alone/checkpoint.pt")
    assert ours["step"] == 4 and same(ours["model"], theirs["model"]) and same(ours["ema"], theirs["ema"])
    assert ours["settings"] == trained | {"skip_broken": True}


def test_what_a_resumed_run_on_pictures_may_not_change(trained):
    for flags, words in [(["--images", "Pets/cats"], "Pets of the run in"), (["--grey"], "differs from the F"),
                         (["--image-size", 12], "differs from the 8"), (["--dataset", "MNIST"], "from the Pets/ of")]:
        assert_one_line(call(train, "--resume", "--out", "runs/pets", *flags), 1, words)
    shutil.copytree("Pets/cats", "Pets/birds")
    result = call(train, "--device", "cpu", "--resume", "--out", "runs/pets", "--max-steps", 9)
    assert result.code == 1 and "was trained on 2 classes, and Pets/ has 3 now" in result.err


def test_a_resumed_run_does_not_take_one_class_for_another(trained):
    """As labels go by the order of the sub-folders. A run of before these were kept cannot tell."""
    resume = ["--device", "cpu", "--resume", "--out", "runs/pets", "--max-steps"]
    Path("Pets/cats").rename("Pets/zebras")
    result = call(train, *resume, 3)
    assert_one_line(result, 1, "Pets has the sub-folders dogs, zebras now", CHECKPOINT, "--out")
    Path("Pets/zebras").rename("Pets/cats")
    for steps in 3, 4:
        assert call(train, *resume, steps).code == 0
    state = load_checkpoint(CHECKPOINT)
    assert state["settings"].pop("class_names") == trained["class_names"] == ["cats", "dogs"]
    save_checkpoint(CHECKPOINT, state)
    Path("Pets/cats").rename("Pets/zebras")
    assert call(train, *resume, 5).code == 0


def test_a_resumed_run_knows_its_pictures_by_any_name(trained):
    """Spelled differently, or moved to another place."""
    resume = ["--device", "cpu", "--resume", "--out", "runs/pets", "--max-steps", 2]
    for name in "Pets/", Path("Pets").resolve():
        result = call(train, *resume, "--images", name)
        assert result.code == 0, result.err
    Path("Pets").rename("Animals")
    assert_one_line(call(train, *resume), 1, "Pets is not there any more", "--images")
    assert call(train, *resume, "--images", "Animals").code == 0
    assert load_checkpoint(CHECKPOINT)["settings"]["images"] == str(Path("Animals").absolute())


def test_a_run_is_resumed_on_its_own_pictures_from_any_folder(trained, tmp_path, monkeypatch):
    """Also where there is another folder of that name."""
    run, elsewhere = Path("runs/pets").absolute(), tmp_path / "elsewhere"
    shutil.copytree("Pets/cats", elsewhere / "Pets")
    monkeypatch.chdir(elsewhere)
    result = call(train, "--device", "cpu", "--resume", "--out", run, "--max-steps", 3)
    assert result.code == 0, result.err  # Pets here has one class, and not two
    assert load_checkpoint(run / "checkpoint.pt")["settings"]["images"] == trained["images"]


def test_a_run_does_not_go_into_the_folder_of_its_pictures(tmp_path, monkeypatch):
    """Where its files would be taken for pictures. Nothing is made, so that it can be started elsewhere."""
    folder_of(tmp_path / "Pets", *[f"{i}.png" for i in range(12)])
    monkeypatch.chdir(tmp_path / "Pets")
    before = sorted(Path().iterdir())
    for flags, words in [([], "--out runs"), (["--out", "../run"], "--data data"),
                         (["--out", ".", "--data", ".."], "--out .")]:
        assert_one_line(call(train, *FLAGS, "--images", ".", *flags), 2, words, "choose one outside")
    assert sorted(Path().iterdir()) == before
    assert call(train, *FLAGS, "--images", ".", "--max-steps", 1, "--out", "../run", "--data", "../data").code == 0


def test_what_was_learned_from_pictures_is_drawn_in_colour_and_not_measured(trained):
    flags = ["--checkpoint", CHECKPOINT, "--device", "cpu", "--steps", 2]
    assert call(sample, *flags, "--n", 4, "--npz", "x.npz").code == 0
    grid = iio.imread("samples/grid.png")
    assert grid.ndim == 3 and (grid[..., 0] != grid[..., 1]).any() and np.load("x.npz")["images"].shape == (4, 3, 8, 8)
    assert_one_line(call(evaluate, *flags, "--n", 4), 1, "other images", "only models of MNIST digits")
    assert_one_line(call(edit, "vary", "--image", "test:3", *flags), 2, "images of its own")


def test_pictures_without_sub_folders_have_no_labels(trained):
    """And with the name of a data set, and its size and colour, they are not taken for it."""
    folder_of(Path("MNIST"), *[f"{i}.png" for i in range(12)])
    result = call(train, *FLAGS, "--images", "MNIST", "--grey", "--image-size", 28, "--max-steps", 1)
    assert result.code == 0, result.err
    settings = load_checkpoint("runs/mnist/checkpoint.pt")["settings"]
    assert settings["classes"] == 1 and settings["label_dropout"] == 1 and settings["image_channels"] == 1
    flags = ["--checkpoint", "runs/mnist/checkpoint.pt", "--n", 2, "--steps", 2, "--device", "cpu"]
    assert call(sample, *flags, "--npz", "x.npz").code == 0 and (np.load("x.npz")["labels"] == -1).all()
    assert_one_line(call(sample, *flags, "--digit", 0), 2, "no classes")
    assert_one_line(call(evaluate, *flags), 1, "other images")


@pytest.mark.parametrize("flags, words", [
    (["--images", "Pets", "--dataset", "MNIST"], "--images takes the place of --dataset"),
    (["--image-size", 32], "--image-size needs --images"), (["--grey"], "--grey needs"), (["--skip-broken"], "--skip-"),
    (["--images", "Pets", "--image-size", 30], "--image-size 30: .*multiple of 4"), (["--images", ""], "--images"),
    (["--images", "Pets", "--image-size", 3], "--image-size"), (["--images", "Pets", "--grey=1"], "--grey"),
    (["--images", "Pets/cats", "--label-dropout", 0.1], "--label-dropout 0.1: .*cats has no sub-folders"),
])
def test_flags_that_make_no_sense(flags, words, pets, monkeypatch):
    monkeypatch.chdir(pets.parent)
    result = call(train, *flags)
    assert_one_line(result, 2)
    assert re.search(words, result.err) and not Path("data").exists()


def test_more_classes_than_there_can_be_are_refused_before_all_is_decoded(pets, monkeypatch):
    monkeypatch.setattr(settings, "MOST_CLASSES", 1)
    monkeypatch.setattr(images, "decode", lambda *args, **settings: pytest.fail("one is decoded"))
    monkeypatch.chdir(pets.parent)
    assert_one_line(call(train, *TINY, "--images", "Pets"), 2, "Pets has 2 sub-folders", "can be 1;")


def test_a_run_that_is_older_than_pictures_goes_on(tmp_path):
    assert call(train, *FLAGS, "--max-steps", 1, "--out", tmp_path).code == 0
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    for name in "images", "grey", "skip_broken":
        del state["settings"][name]
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    assert call(train, "--device", "cpu", "--max-steps", 2, "--out", tmp_path, "--resume").code == 0


class Held(torch.Tensor):
    """Images that are not to be moved, other than by the batch."""

    def to(self, *args, **kwargs):
        assert len(self) < 9
        return super().to(*args, **kwargs)


def test_a_batch_is_made_of_images_that_stay_where_they_are(pets):
    settings, p = {"seed": 0, "batch_size": 4, "label_dropout": 0.1, "classes": 2}, torch.ones(10) / 10
    held = torch.arange(9 * 48).remainder(251).to(torch.uint8).view(9, 3, 4, 4)
    labels = torch.zeros(9, dtype=torch.long)
    drawn, expected = (train.draw_batch(0, x, labels, settings, p)[0] for x in (held.as_subclass(Held), held))
    assert torch.equal(drawn.as_subclass(torch.Tensor), expected)
    # load_images says the same: on another device there are the labels alone.
    settings = {"images": str(pets), "image_size": SIZE, "grey": False, "skip_broken": False}
    x, y, classes = load_images(settings, pets.parent / "data", device="meta")
    assert (x.device.type, y.device.type, classes) == ("cpu", "meta", 2)


@pytest.mark.skipif(sys.platform == "win32", reason="paths are short there")
def test_a_folder_may_have_as_long_a_name_as_the_system_allows(tmp_path):
    folder = folder_of(tmp_path / ("\u732b" * 84), *[f"{i}.png" for i in range(12)])  # 252 bytes
    assert len(everything(folder)) == 12
