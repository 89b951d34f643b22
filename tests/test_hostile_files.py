"""Hostile files: checkpoints, arrays and digits that are damaged, that lie, or that would execute something.

Most are read in this process (hostile.py says how); the worst by real processes too, under a limit that is measured on
a run of a sound one. All that is random is seeded, so that a failure, which names its case, comes back.
"""
import bz2
import contextlib
import io
import json
import lzma
import math
import os
import pickle
import random
import shutil
import signal
import struct
import sys
import tracemalloc
import warnings
import zipfile
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import evaluate
import train
from diffusion_model import build_network
from helpers import ROOT, assert_one_line, start
from hostile import (GIB, SECONDS, Hung, address_space, digits, draws, guarded, idx, model, pickled, repacked,
                     run_checkpoint, tried, world)
from utils import data
from utils.checkpoint import load_checkpoint, load_model
from utils.data import load_dataset, read_npz
from utils.settings import OF_A_MODEL, SETTINGS

pytest.importorskip("resource", reason="limits to memory, alarm clocks and pipes with names are Unix's")


def test_the_guards_work(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    with pytest.raises(Hung):
        open(tmp_path / "fifo")
    if address_space():
        with pytest.raises(MemoryError):
            bytearray(2 * GIB)
        with pytest.raises(RuntimeError, match="memory"):
            torch.empty(2 * GIB, dtype=torch.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# Damage to the bytes

def flip(content, generator):
    """One to eight bits."""
    content = bytearray(content)
    for _ in range(generator.randint(1, 8)):
        content[somewhere(content, generator)] ^= 1 << generator.randrange(8)
    return bytes(content)


def cut(content, generator):
    """The end, or a part of the middle, is missing."""
    begin = somewhere(content, generator)
    return content[:begin] + content[begin + generator.randint(1, 300) if generator.random() < 0.5 else len(content):]


def splice(content, generator):
    """A part stands where another was."""
    begin, other, length = somewhere(content, generator), somewhere(content, generator), generator.randint(1, 600)
    part = content[other:other + length]
    return content[:begin] + part + content[begin + len(part):]


def wipe(content, generator):
    """A part is 0, or 255."""
    begin, length = somewhere(content, generator), generator.randint(1, 600)
    length = min(length, len(content) - begin)
    return content[:begin] + generator.choice((b"\0", b"\xff")) * length + content[begin + length:]


def junk(content, generator):
    """Noise comes before, after or in between."""
    begin = generator.choice((0, len(content), somewhere(content, generator)))
    return content[:begin] + generator.randbytes(generator.randint(1, 600)) + content[begin:]


def lie(content, generator):
    """A field of a header, of the archive or else of the file, says something extreme."""
    content = bytearray(content)
    headers = [i for i in range(len(content) - 4) if content[i:i + 2] == b"PK" and content[i + 2] < 9] or [-4]
    for _ in range(generator.randint(1, 3)):
        begin = generator.choice(headers) + 4 + generator.randrange(0, 44)
        content[begin:begin + 4] = generator.choice((
            bytes(4), b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\1\0\0\0", b"\0\0\0\1",
            generator.randbytes(4)))
    return bytes(content)


def somewhere(content, generator):
    """A place in the bytes; every other one is near an end, where the headers are."""
    place = generator.randrange(len(content))
    return place if generator.random() < 0.5 else generator.choice((place % 3000, -1 - place % 3000)) % len(content)


DAMAGE = flip, cut, splice, wipe, junk, lie
TIMES = 15  # that each is done to a checkpoint, an .npz, and the IDX and xz files


def damaged(content, damage, times=TIMES):
    """(name, bytes) of each case."""
    for seed in range(times):
        yield f"{damage.__name__} {seed}", damage(content, random.Random(f"{damage.__name__} {seed}"))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints(damage, model, tmp_path):
    """What is accepted is what was there before: the damage hit nothing that counts."""
    sound, path, accepted = load_model(model), tmp_path / "c.pt", 0
    for case, content in damaged(model.read_bytes(), damage):
        path.write_bytes(content)
        loaded = tried(case, path, lambda: load_model(path))
        if loaded:
            accepted += 1
            assert loaded.settings == sound.settings, case
            for name, value in loaded.network.state_dict().items():
                assert torch.equal(value, sound.network.state_dict()[name]), case
    assert accepted < TIMES / 2


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_pickles_with_right_checksums(damage, model, tmp_path):
    """Here other weights may come out, but only finite ones that fit."""
    path, accepted = tmp_path / "c.pt", 0
    with zipfile.ZipFile(model) as archive:
        name, = (name for name in archive.namelist() if name.endswith("data.pkl"))
        content = archive.read(name)
    for case, pickled in damaged(content, damage):
        repacked(model, path, lambda entry, old: pickled if entry == name else old)
        loaded = tried(case, path, lambda: load_model(path))
        if loaded:
            accepted += 1
            draws(case, loaded)
    assert accepted < TIMES / 2


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_arrays(damage, tmp_path):
    images, path, accepted = np.arange(9 * 784).astype(np.uint8).reshape(9, 28, 28), tmp_path / "a.npz", 0
    for write in np.savez, np.savez_compressed:
        write(path, images=images, labels=np.arange(9))
        for case, content in damaged(path.read_bytes(), damage, TIMES // 2):
            path.write_bytes(content)
            loaded = tried(case, path, lambda: read_npz(path))
            if loaded:
                accepted += 1
                assert (loaded[0][:, 0].numpy() == images).all(), case
                assert loaded[1] is None or loaded[1].tolist() == [*range(9)], case  # None: the name has changed
    assert accepted < TIMES * 3 / 4


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_digits_are_mended(damage, world, tmp_path):
    """The unpacked files are compared with their MD5 sums, and unpacked again."""
    load_dataset("MNIST", tmp_path)
    names = [*world.contents]
    for i, (case, content) in enumerate(damaged(world.contents[names[0]], damage, TIMES // 4)):
        for name in names[i % 2], names[2 + i % 2]:
            (tmp_path / "MNIST" / "raw" / name).write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read = [*load_dataset("MNIST", tmp_path), *load_dataset("MNIST", tmp_path, train=False)]
        assert [idx(x.squeeze().to(torch.uint8).numpy()) for x in read] == [*world.contents.values()], case


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_archives_of_digits(damage, world, tmp_path, monkeypatch):
    """Refused, unless what they unpack to is right all the same."""
    name, shipped, refused = [*world.contents][2], tmp_path / "shipped", 0
    shutil.copytree(world.shipped, shipped)
    monkeypatch.setattr(data, "SHIPPED_MNIST", shipped)
    archive, unpacked = shipped / f"{name}.xz", tmp_path / "MNIST" / "raw" / name
    for case, content in damaged(archive.read_bytes(), damage, TIMES // 4):
        unpacked.unlink(missing_ok=True)
        archive.write_bytes(content)
        read = tried(case, archive, lambda: load_dataset("MNIST", tmp_path, train=False))
        refused += read is None
        assert read is None and not unpacked.exists() or unpacked.read_bytes() == world.contents[name], case
    assert refused > TIMES / 8


def downloaded(folder, images, labels, name="KMNIST"):
    """What a data set that torchvision would download leaves behind: four files."""
    raw = folder / name / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part in "train", "t10k":
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    return folder


def fits(case, loaded):
    """Images and labels that can be trained on."""
    images, labels = loaded
    assert images.dtype == torch.uint8 and images.shape[1:] == (1, 28, 28) and len(images) == len(labels) > 0, case
    assert labels.dtype == torch.int64 and 0 <= labels.min() <= labels.max() <= 9, case


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("which", ["images", "labels"])
def test_damaged_downloads(damage, which, tmp_path):
    """Nobody published the sums of these unpacked, so that damage to a pixel goes unseen; but what is read fits."""
    images, labels = digits(20, 0)
    for case, content in damaged(images if which == "images" else labels, damage, TIMES // 4):
        downloaded(tmp_path, *((content, labels) if which == "images" else (images, content)))
        loaded = tried(case, tmp_path, lambda: load_dataset("KMNIST", tmp_path))
        if loaded:
            fits(case, loaded)


@pytest.mark.parametrize("images, labels", [
    (b"", None), (b"\0\0\x08\x03", None), (None, b""), (None, idx(np.zeros(0, np.uint8))),
    (None, idx(np.zeros(21, np.uint8))),
    (idx(np.zeros((0, 28, 28), np.uint8)), idx(np.zeros(0, np.uint8))), (None, idx(np.full(20, 10, np.uint8))),
    (idx(np.zeros((20, 28, 27), np.uint8)), None), (idx(np.zeros((20, 32, 32), np.uint8)), None),
    (idx(np.zeros((20, 784), np.uint8)), None), (b"\0\0\x08\xff" + bytes(4 * 255), None),
    (bytes([0, 0, 0x0d, 3]) + idx(np.zeros((20, 28, 28), np.uint8))[4:], None),         # says it holds floats
    (b"\0\0\x08\x03" + struct.pack(">3I", 2**32 - 1, 28, 28) + bytes(784), None),        # says it holds 3 TB
    (b"\0\0\x08\x03" + struct.pack(">3I", 2**31, 2**31, 4), None),
    (None, b"\0\0\x08\x01" + struct.pack(">I", 2**32 - 1)),
], ids=range(15))
def test_downloads_that_say_what_is_not_so(images, labels, tmp_path):
    sound = digits(20, 0)
    downloaded(tmp_path, *sound)
    fits("control", load_dataset("KMNIST", tmp_path))
    downloaded(tmp_path, sound[0] if images is None else images, sound[1] if labels is None else labels)
    assert tried("", tmp_path, lambda: load_dataset("KMNIST", tmp_path)) is None


# ----------------------------------------------------------------------------------------------------------------------
# Well-formed files with something else in them

NESTED = [0]
for _ in range(60):  # a kilobyte in a file, and in memory; but printed or compared it would fill any
    NESTED = [NESTED, NESTED]
GONE = object()  # in the place of a value: there is none
VALUES = {
    "gone": GONE, "nested": NESTED, "NaN": math.nan, "None": None, "''": "", "a word": "word", "-1": -1, "0": 0, "1": 1,
    "1.5": 1.5, "infinity": math.inf, "10**9": 10**9, "10**300": 10**300, "True": True, "list": [], "dict": {},
    "tuple": (1, 2), "book": "x" * 100_000, "two lines": "one\ntwo", "half a character": "\ud800",
    "number": torch.tensor(8), "tensor": torch.tensor([1.0, math.nan]), "empty tensor": torch.zeros(0),
    "bytes": b"bytes", "set": {1, 2}, "1j": 1j, "a tensor of 4 TB": torch.zeros(1).expand(10**6, 10**6),
}


def replaced(state, path, value):
    """A copy of nested dicts and lists with another value at the path, a tuple of keys."""
    if not path:
        return value
    copy = state.copy()
    copy[path[0]] = replaced(state[path[0]], path[1:], value)
    if copy[path[0]] is GONE:
        del copy[path[0]]
    return copy


PLACES = [("format",), ("version",), ("settings",), ("ema",), ("settings", "dataset"), ("settings", "class_shares"),
          ("settings", "class_shares", 3), ("ema", "unet.stem.weight"), ("ema", "unet.label.weight"),
          ("ema", "out.bias"), ("early",), ("early", "unet.stem.weight"),
          *[("settings", name) for name in (*OF_A_MODEL, "batch_size", "label_dropout")]]


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_checkpoints_with_something_else_in_them(place, model, tmp_path):
    state, path = load_checkpoint(model), tmp_path / "c.pt"
    state["early"] = state["ema"]
    for name, value in VALUES.items():
        torch.save(replaced(state, place, value), path)
        loaded = tried(name, path, lambda: evaluate.load_digit_model(SimpleNamespace(
            checkpoint=path, device="cpu", ema=True, precision="fp32")))
        if loaded:
            assert (place[-1], name) in HARMLESS, name
            draws(name, loaded)


HARMLESS = {("version", "1"), ("timesteps", "1"), ("image_channels", "1"), ("depth", "1"), ("dataset", "gone"),
            ("batch_size", "gone"), ("batch_size", "1"),
            ("early", "gone"), ("early", "None"), *(("label_dropout", name) for name in ("gone", "0", "1"))}


@pytest.mark.parametrize("change", [
    {"image_size": 30}, {"image_size": 10}, {"image_size": 511}, {"width": 1024, "depth": 64}, {"depth": 2},
    {"classes": 11, "class_shares": [0.1] * 11}, {"classes": 10_000, "class_shares": [0.0] * 10_000},
    {"image_channels": 2}, {"timesteps": 10},
], ids=str)
def test_settings_of_another_network(change, model, tmp_path):
    """In range, each of them; but the weights are not of that network, or there is no such network or schedule."""
    state = load_checkpoint(model)
    torch.save(state | {"settings": state["settings"] | change}, tmp_path / "c.pt")
    assert tried(change, tmp_path / "c.pt", lambda: load_model(tmp_path / "c.pt")) is None


KINDS_OF_WEIGHTS = {
    "sparse": lambda x: x.to_sparse(), "float8": lambda x: x.to(torch.float8_e4m3fn), "meta": lambda x: x.to("meta"),
    "integers": lambda x: x.long(), "bool": lambda x: x.bool(), "complex": lambda x: x.cfloat(),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "nested": lambda x: torch.nested.nested_tensor([x]), "too large for float32": lambda x: x.double() + 1e300,
    "transposed": lambda x: x.T, "NaN": lambda x: x * math.nan,
    "one more dimension": lambda x: x[None], "as an array": lambda x: x.numpy(), "as a list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("kind", KINDS_OF_WEIGHTS)
# torch's own, as the tensors are made and read: sparse and nested ones are prototypes, quantised ones deprecated.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_weights_of_unusual_kinds(kind, model, tmp_path):
    state = load_checkpoint(model)
    weight = KINDS_OF_WEIGHTS[kind](state["ema"]["unet.label.weight"])
    torch.save(replaced(state, ("ema", "unet.label.weight"), weight), tmp_path / "c.pt")
    assert tried(kind, tmp_path / "c.pt", lambda: load_model(tmp_path / "c.pt")) is None


def hollow(path, model, **settings):
    """A small checkpoint of a large network: each weight is one number, which it claims to have many times."""
    state = load_checkpoint(model)
    settings = state["settings"] | settings
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_network(settings).state_dict().items()}
    torch.save(state | {"settings": settings, "ema": {name: torch.zeros(1).expand(shape)
                                                      for name, shape in shapes.items()}}, path)
    return path


def test_weights_that_are_only_claimed(model, tmp_path):
    """1.2 billion of them, in half a megabyte."""
    path = hollow(tmp_path / "c.pt", model, width=1024, depth=64)
    assert path.stat().st_size < 1_000_000
    assert tried("hollow", path, lambda: load_model(path)) is None


def test_weights_that_share_their_memory_are_parted(model, tmp_path):
    """Else a step of training would change both, or fail for the one number that is many."""
    state = load_checkpoint(model)
    bias = state["ema"]["unet.down.conv2.bias"]
    state["ema"] |= {"unet.up.conv2.bias": bias[:], "unet.stem.bias": bias[:1].expand(bias.shape)}
    torch.save(state, tmp_path / "c.pt")
    weights = load_model(tmp_path / "c.pt").network.state_dict()
    weights["unet.up.conv2.bias"] += 1
    weights["unet.stem.bias"][0] += 1
    assert torch.equal(weights["unet.down.conv2.bias"], bias) and (weights["unet.stem.bias"][1:] == bias[0]).all()


# A run to go on with: where something else is put.
OF_A_RUN = [
    *[(name,) for name in ("settings", "step", "seconds", "lr", "history", "since_report", "optimizer", "model",
                             "ema", "early")],
    *[("settings", name) for name in (*SETTINGS, "classes", "unknown")],
    *[("since_report", name) for name in ("steps", "seconds", "sums")], ("since_report", "sums", 0),
    ("curve",), ("curve", 0), ("curve", 0, 0), ("curve", 0, 1),
    ("history", 0), *[("history", 0, name) for name in ("step", "train_loss", "lr")],
    ("optimizer", 0), ("optimizer", 1), ("optimizer", 0, "state"),
    ("optimizer", 1, "state", 0, "momentum"),
    ("optimizer", 0, "state", 0), *[("optimizer", 0, "state", 0, name) for name in ("step", "exp_avg", "exp_avg_sq")],
    ("model", "unet.stem.weight"), ("ema", "unet.stem.weight"), ("early", "unet.stem.weight"),
]
EACH_TIME = 2  # values of the first so many, which have broken most, are put everywhere; of the others, FURTHER
FURTHER = 1


def go_on(path, steps=5):
    """What resumes the run of a checkpoint, to its 5th step or another, and returns the new checkpoint."""
    def resume():
        argv = ["train.py", "--resume", "--max-steps", str(steps), "--out", str(path.parent)]
        with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(io.StringIO()), \
                contextlib.redirect_stderr(io.StringIO()) as err:
            train.main()
        assert err.getvalue() == "", err.getvalue()
        return load_checkpoint(path)
    return resume


@pytest.mark.parametrize("place", OF_A_RUN, ids=str)
def test_runs_with_something_else_in_them(place, run_checkpoint, tmp_path):
    """They are refused, and their files left alone, or go on soundly."""
    state, path = load_checkpoint(run_checkpoint), tmp_path / "checkpoint.pt"
    state["settings"]["unknown"], state["early"] = None, state["ema"]
    names = [*VALUES]
    for name in names[:EACH_TIME] + random.Random(str(place)).sample(names[EACH_TIME:], FURTHER):
        torch.save(replaced(state, place, VALUES[name]), path)
        before = path.read_bytes()
        after = tried(name, path, go_on(path))
        if after is None:
            assert path.read_bytes() == before, name
        else:
            sane_run(name, path, after)
            assert {place[:2], place[:3]} & UNREAD or name in PLAUSIBLE or (place[-1], name) in WITHOUT, (place, name)


UNREAD = {("settings", "unknown")}
PLAUSIBLE = {"0", "1", "1.5", "10**9"}  # as a number of seconds, or as a learning rate
WITHOUT = {("minutes", "None"), ("curve", "list"), (0, "gone"),  # a curve of fewer points, or of none; and a weight
           (0, "dict"), ("momentum", "gone"),                      # that had no gradient yet
           ("images", "None"), ("images_used", "None"), ("early", "None"), ("early", "gone"),
           *((name, "gone") for name in ("images", "images_used", "grey", "skip_broken"))}  # of a run before them


def sane_run(case, path, state):
    """The run went on to its end, with finite weights and moments."""
    assert state["step"] == 5, case
    of_the_images = {"image_size", "image_channels", "classes", "class_shares", "levels"}
    assert state["settings"].keys() == SETTINGS.keys() | of_the_images, case
    for entry in (entry for optimizer in state["optimizer"] for entry in optimizer["state"].values()):
        assert all(torch.isfinite(value).all() for value in entry.values()), case
    draws(case, load_model(path))


def test_a_sound_run_goes_on(run_checkpoint, tmp_path):
    """The control of all that are refused."""
    shutil.copy(run_checkpoint, tmp_path)
    sane_run("control", tmp_path / "checkpoint.pt", tried("control", tmp_path, go_on(tmp_path / "checkpoint.pt")))


def moments(change):
    return lambda state: replaced(state, ("optimizer", 0, "state"), change(state["optimizer"][0]["state"]))


RUNS = {
    "a step backwards": lambda state: state | {"step": -3}, "a step too far": lambda state: state | {"step": 10**13},
    "reports from the future": lambda state: state | {"step": 1},
    "time without a step": lambda state: state | {
        "step": 0, "seconds": 1e9, "history": [], "since_report": state["since_report"] | {"steps": 0},
        "settings": state["settings"] | {"minutes": 1.0}},
    "steps in no time": lambda state: replaced(state, ("since_report", "seconds"), 0.0),
    "no moments": moments(lambda entries: {}),
    "one missing": moments(lambda entries: {i: entries[i] for i in list(entries)[:-1]}),
    "one too many": moments(lambda entries: entries | {len(entries): entries[0]}),
    "by other names": moments(lambda entries: {str(i): entry for i, entry in entries.items()}),
    "keyed by tensors": moments(lambda entries: {torch.tensor(i): entry for i, entry in entries.items()}),
    "in another order": moments(lambda entries: dict(enumerate(reversed(entries.values())))),
    "negative squares": moments(lambda entries: replaced(entries, (0, "exp_avg_sq"), -1 - entries[0]["exp_avg_sq"])),
    "before the first": moments(lambda entries: replaced(entries, (0, "step"), torch.tensor(-1.0))),
    "of SGD": moments(lambda entries: {i: {"momentum_buffer": entry["exp_avg"]} for i, entry in entries.items()}),
    "rows of a table that differ": lambda state: state | {"history": [{"step": 1}, *state["history"]]},
    "another network": lambda state: replaced(state, ("settings", "width"), 16),
    "no room for its images": lambda state: replaced(state, ("settings", "image_size"), 511),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_that_no_run_can_be(name, run_checkpoint, tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(RUNS[name](load_checkpoint(run_checkpoint)), path)
    before = path.read_bytes()
    after = tried(name, path, go_on(path, steps=4))  # one step: what it broke would be saved before a second noticed
    assert after is None and path.read_bytes() == before


def test_moments_that_share_their_memory_are_parted(run_checkpoint, tmp_path):
    path = tmp_path / "checkpoint.pt"
    state, place = load_checkpoint(run_checkpoint), ("optimizer", 0, "state", 0, "exp_avg")
    torch.save(replaced(state, place, torch.zeros(1).expand(state["optimizer"][0]["state"][0]["exp_avg"].shape)), path)
    sane_run("", path, tried("", path, go_on(path)))


# ----------------------------------------------------------------------------------------------------------------------
# Arrays

SHAPES = [(3, 28, 28), (3, 1, 28, 28), (28, 28), (0, 28, 28), (3, 28, 27), (3, 0, 28), (), (1,) * 30, (3, 3, 28, 28)]
TYPES = ["u1", "?", "i1", "u2", "i8", "f2", "f8", "c16", "M8[s]", "S3", "U3", "O", "u1,u1", "V0", "S0"]


@pytest.mark.parametrize("dtype", TYPES)
def test_arrays_of_other_types_and_shapes(dtype, tmp_path):
    path = tmp_path / "a.npz"
    for shape in SHAPES:
        np.savez(path, images=np.zeros(shape, dtype))
        loaded = tried(shape, path, lambda: read_npz(path))
        assert (loaded is not None) == (dtype == "u1" and shape in SHAPES[:2]), shape
        np.savez(path, images=np.zeros((3, 28, 28), np.uint8), labels=np.zeros(shape, dtype))
        assert tried(shape, path, lambda: read_npz(path)) is None, shape


def npy(text, length=None, version=(1, 0), content=bytes(784)):
    """An .npy file with this text for a header; it may say another length than it has."""
    text = text.encode("latin1") + b"\n"
    return (b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(text) if length is None
                                                         else length) + text + content)


def header(shape="(1, 28, 28)", descr="'|u1'", order="False", more=""):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, {more}}}"


HEADERS = {
    "a terabyte": header("(10**9, 28, 28)"), "a terabyte of images": header("(1000000000, 28, 28)"),
    "784 MB": header("(1000000, 28, 28)"), "all there is": header(f"({2**63}, 28, 28)"),
    "more": header(f"({10**400}, 28, 28)"),
    "less than none": header("(-1, 28, 28)"), "less than none twice": header("(-1, -28, 28)"),
    "none of very many": header(f"({10**30}, 0, 28)"), "none of many": header(f"(0, {2**62}, 28)"),
    "true": header("(True, 28, 28)"), "a float": header("(1.0, 28, 28)"), "a list": header("[1, 28, 28]"),
    "a word": header("'(1, 28, 28)'"), "flat": header("784"), "nothing": header("None"), "a set": header("{1, 28}"),
    "many dimensions": header("(" + "1," * 3000 + ")"), "many zeros": header("(" + "0," * 3000 + ")"),
    "python 2": header("(1L, 28L, 28L)"), "python 2 in part": header("(1L, 28, 28"), "tab": "\t" + header(),
    "indented": "  " + header(),
    "a call": header("__import__('os')"), "brackets": "(" * 5000, "minus": header("(" + "-" * 5000 + "1, 28, 28)"),
    "braces": "{" * 5000 + "}" * 5000, "open text": "{'descr': '", "empty": "", "NUL": "\0" * 100,
    "latin": "{'\xe9\xff': 1}",
    "escapes": header(descr=r"'\d'"), "other keys": "{'a': 1}", "more keys": header(more="'x': 1"),
    "pickles": header(descr="'|O'"), "records": header(descr="[('a', '|u1')]"), "records in records": header(
        descr="[('a', [('b', [('c', '|u1', (2, 2))])])]"), "records of nothing": header(f"({10**15}, 1)", "'|V0'"),
    "large words": header("(1, 1, 1)", "'<U100000000'"), "huge words": header("(1, 1, 1)", f"'<U{2**61}'"),
    "unknown": header(descr="'|q9'"), "a number": header(descr="1"), "order": header(order="7"),
    "order of none": header(order="None"),
    "big-endian": header(descr="'>u2'"), "a book": header(descr="'" + "x" * 9000 + "'"),
    "a name of two lines": header(descr="[('a\\nb', '|u1')]"),
}


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("array", ["images", "labels"])
def test_headers_of_arrays(name, array, tmp_path):
    path = tmp_path / "a.npz"
    for version in (1, 0), (2, 0), (3, 0), (9, 9):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", npy(HEADERS[name], version=version) if array == "images" else npy(header()))
            if array == "labels":
                archive.writestr("labels.npy", npy(HEADERS[name], version=version))
        loaded = tried(version, path, lambda: read_npz(path))
        sound = array == "images" and name in SOUND_HEADERS
        assert (loaded is not None) == sound if version == (1, 0) else loaded is None or sound, version


SOUND_HEADERS = {"python 2", "indented", "tab"}


@pytest.mark.parametrize("content", [
    b"", b"\x93NUMPY", b"\x93NUMPY\1\0", npy(header(), 0), npy(header(), 20), npy(header(), 65535),
    npy(header(), 2**32 - 1, (2, 0)), npy(header(), content=b""), npy(header(), content=bytes(783)), pickle.dumps({}),
    b"GIF89a", npy(header()).replace(b"NUM", b"mun"),
], ids=range(12))
def test_arrays_that_are_none(content, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", content)
    assert tried("", tmp_path / "a.npz", lambda: read_npz(tmp_path / "a.npz")) is None


# ----------------------------------------------------------------------------------------------------------------------
# A payload

def statement(target):
    return f"open({str(target)!r}, 'w').close()"


class Canary:
    """Unpickling it writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return exec, (statement(self.target),)


# Ways for a pickle to call something: by each protocol, and by opcodes that Python's own pickler no longer writes.
PAYLOADS = {
    **{f"protocol {p}": lambda target, p=p: pickle.dumps(Canary(target), p) for p in range(6)},
    "in a state": lambda target: pickle.dumps({"format": "ddpm-mnist", "version": 2, "settings": Canary(target)}, 2),
    "INST": lambda target: f"(V{statement(target)}\nibuiltins\nexec\n.".encode(),
    "OBJ": lambda target: f"(cbuiltins\nexec\nV{statement(target)}\no.".encode(),
    "by getattr": lambda target: (b"\x80\x02cbuiltins\ngetattr\n"
                                  b"cbuiltins\n__import__\nX\x08\0\0\0builtins\x85RX\4\0\0\0exec\x86R"
                                  + pickle.dumps((statement(target),), 2)[2:-1] + b"R."),
    "by Python 2's name": lambda target: f"c__builtin__\neval\n(V{statement(target)}\ntR.".encode(),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_nothing_is_executed(name, model, tmp_path, world):
    target = tmp_path / "executed"
    payload = PAYLOADS[name](target)
    with contextlib.suppress(Exception):
        pickle.loads(payload)
    assert target.exists(), "the control: this canary does not sing"
    target.unlink()

    files = {
        "alone": payload, "before a checkpoint": payload + model.read_bytes(),
        "in place of the pickle": pickled(model, tmp_path / "a", payload).read_bytes(),
        "beside the pickle": with_entry(model, "archive/constants.pkl", payload),
        "by another name": with_entry(model, "archive/DATA.PKL", payload),
        "in another archive": with_entry(model, "other/data.pkl", payload),
    }
    for case, content in files.items():
        path = tmp_path / "c.pt"
        path.write_bytes(content)
        loaded = tried(case, path, lambda: load_model(path))
        assert not target.exists(), case
        assert loaded is None or case in ("beside the pickle", "by another name"), case  # which torch does not read

    np.savez(tmp_path / "a.npz", images=np.array([Canary(target)], dtype=object))
    assert tried("objects", tmp_path / "a.npz", lambda: read_npz(tmp_path / "a.npz")) is None
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", npy(header("(1,)", "'|O'"), content=payload))
    assert tried("objects", tmp_path / "a.npz", lambda: read_npz(tmp_path / "a.npz")) is None

    # Where torchvision once kept its data sets, and reads them from to this day.
    for name in "MNIST", "KMNIST":
        (tmp_path / name / "processed").mkdir(parents=True)
        for file in "training.pt", "test.pt":
            (tmp_path / name / "processed" / file).write_bytes(payload)
    assert tried("processed", tmp_path, lambda: load_dataset("KMNIST", tmp_path)) is None
    assert len(load_dataset("MNIST", tmp_path)[0]) == 60
    assert not target.exists()


def with_entry(source, name, content):
    """The bytes of a copy of an archive with one more entry, the first of all."""
    out = io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(out, "w") as new:
        new.writestr(name, content)
        for entry in old.infolist():
            new.writestr(entry, old.read(entry))
    return out.getvalue()


def test_other_digits_do_not_pass_for_mnist(world, tmp_path):
    """torchvision would prefer what it finds in MNIST/processed to the files that were checked."""
    (tmp_path / "MNIST" / "processed").mkdir(parents=True)
    for file in "training.pt", "test.pt":
        others = torch.full((60, 28, 28), 7, dtype=torch.uint8), torch.arange(60) % 10
        torch.save(others, tmp_path / "MNIST" / "processed" / file)
    images, labels = load_dataset("MNIST", tmp_path)
    assert [idx(images[:, 0].numpy()), idx(labels.to(torch.uint8).numpy())] == [*world.contents.values()][:2]


# ----------------------------------------------------------------------------------------------------------------------
# Bombs: small files that would unpack to much. Python's own memory is counted, in which all of these go off.

MB = 1_000_000
ENCODE = b"c_codecs\nencode\n"  # to hex, which doubles it



BOMBS = {
    "a pickle that asks for memory": (load_model, lambda model, path: pickled(
        model, path, b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", 300 * MB) + b"\x85R.")),
    "a pickle that grows": (load_model, lambda model, path: pickled(
        model, path, b"\x80\x02" + ENCODE * 27 + b"X\1\0\0\0xX\4\0\0\0utf8\x86R" + b"X\3\0\0\0hex\x86R" * 26 + b".")),
    "a checkpoint packed by deflate": (load_model, lambda model, path: repacked(
        model, path, lambda entry, old: old + bytes(30 * MB * entry.endswith("data/0")), zipfile.ZIP_DEFLATED)),
    "a checkpoint packed by bzip2": (load_model, lambda model, path: path.write_bytes(
        raw_zip("archive/data.pkl", bz2.compress(bytes(30 * MB)), zipfile.ZIP_BZIP2, 100))),
    "arrays packed by bzip2": (read_npz, lambda model, path: path.write_bytes(
        raw_zip("images.npy", bz2.compress(npy(header("(38000, 28, 28)"), content=bytes(30 * MB))), zipfile.ZIP_BZIP2,
                29_792_128))),
    "an array whose header is long": (read_npz, lambda model, path: zipped(
        path, "images.npy", npy("", 2**32 - 1, (2, 0), content=bytes(30 * MB)))),
    "an array that is not there": (read_npz, lambda model, path: zipped(
        path, "images.npy", npy(header("(999999, 28, 28)")))),
    "digits": (lambda path: load_dataset("MNIST", path.parent), lambda model, path: path.write_bytes(
        lzma.compress(bytes(30 * MB), preset=0))),
}


def raw_zip(name, packed, method, size):
    """An archive of one entry, packed already, which is said to unpack to `size` bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, packed)
    content = bytearray(out.getvalue())
    central = content.rindex(b"PK\1\2")
    for place, begin in (0, 8), (central, 10):
        content[place + begin:place + begin + 2] = struct.pack("<H", method)
        content[place + begin + 14:place + begin + 18] = struct.pack("<I", size)
    return bytes(content)


def zipped(path, name, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_do_not_go_off(name, world, model, tmp_path, monkeypatch):
    load, make = BOMBS[name]
    path = tmp_path / ("train-images-idx3-ubyte.xz" if name == "digits" else "bomb")
    monkeypatch.setattr(data, "SHIPPED_MNIST", tmp_path)
    monkeypatch.setattr(data, "LARGEST", MB)
    make(model, path)
    assert path.stat().st_size < MB
    tracemalloc.start()
    try:
        assert tried(name, path, lambda: load(path)) is None
        assert tracemalloc.get_traced_memory()[1] < 20 * MB
    finally:
        tracemalloc.stop()


def test_a_file_of_digits_may_be_larger_than_the_memory(world, tmp_path):
    """Its 4 TB are a hole, which takes no place on the disk; but who reads it all needs as much memory."""
    load_dataset("MNIST", tmp_path)
    with open(tmp_path / "MNIST" / "raw" / [*world.contents][0], "r+b") as file:
        file.truncate(1 << 42)
    assert len(load_dataset("MNIST", tmp_path)[0]) == 60


# ----------------------------------------------------------------------------------------------------------------------
# As processes of their own, under a limit to their address space

FORKED = """
import json, os, resource, runpy, signal, sys
from pathlib import Path
sys.path[:0] = {folders!r}
import evaluate, sample, train  # takes long, and is done once for all of them
import hostile

def run(name, script, *flags, limit=None):
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for stream, kind in (1, "out"), (2, "err"):
        os.dup2(os.open(f"{{name}}.{{kind}}", os.O_WRONLY | os.O_CREAT), stream)
    signal.alarm(hostile.SECONDS)  # which kills it
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.argv, code = [script, *flags], 70
    try:
        runpy.run_path(script, run_name="__main__")
        print(hostile.address_space("VmPeak"))
        code = 0
    except SystemExit as end:
        code = end.code
    finally:
        sys.stdout.flush()
        os._exit(code)

sound, *others = {commands!r}
assert run(*sound) == 0
# What drawing an image from a sound checkpoint takes (importing torch is gigabytes), and half a GiB.
limit = int(Path(f"{{sound[0]}}.out").read_text().split()[-1]) + hostile.GIB // 2
print(json.dumps([run(*command, limit=limit) for command in others]))
"""


@pytest.mark.skipif(address_space() is None, reason="there is no /proc to measure by")
def test_the_worst_of_them_as_processes(model, run_checkpoint, tmp_path):
    """Forked from one, since most of their time is torch's start."""
    state, target = load_checkpoint(model), tmp_path / "executed"
    pickled(model, tmp_path / "canary.pt", PAYLOADS["protocol 2"](target))
    torch.save(replaced(state, ("settings", "dataset"), NESTED), tmp_path / "nested.pt")
    zipped(tmp_path / "a.npz", "images.npy", npy(header("(1000000, 28, 28)")))
    (tmp_path / "run").mkdir()
    run = replaced(load_checkpoint(run_checkpoint), ("settings", "lr"), NESTED)
    torch.save(run, tmp_path / "run" / "checkpoint.pt")
    commands = {
        "sound": ["sample.py", "--checkpoint", model, "--n", 1, "--steps", 1, "--out", tmp_path],
        "canary.pt": ["sample.py", "--checkpoint", tmp_path / "canary.pt"],
        "hollow.pt": ["sample.py", "--checkpoint", hollow(tmp_path / "hollow.pt", model, width=1024, depth=64)],
        "nested.pt": ["evaluate.py", "--checkpoint", tmp_path / "nested.pt"],
        "a.npz": ["evaluate.py", "--npz", tmp_path / "a.npz"],
        "run": ["train.py", "--resume", "--out", tmp_path / "run"],
    }
    (tmp_path / "forked.py").write_text(FORKED.format(folders=[str(ROOT), str(ROOT / "tests")], commands=[
        [name, str(ROOT / script), *map(str, flags)] for name, (script, *flags) in commands.items()]))
    process = start(tmp_path / "forked.py", cwd=tmp_path)
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0 and err == "", err + (tmp_path / "sound.err").read_text()
    for name, code in zip([*commands][1:], json.loads(out), strict=True):
        out, err = ((tmp_path / f"{name}.{kind}").read_text() for kind in ("out", "err"))
        assert_one_line(SimpleNamespace(code=code, err=err), 1, tmp_path / name)
        assert out == "" and "of memory" not in err and "allocate" not in err, name
    assert not target.exists()


# ----------------------------------------------------------------------------------------------------------------------

CASES = {
    "checkpoints, bytes": 2 * len(DAMAGE) * TIMES,
    "checkpoints, contents": len(PLACES) * len(VALUES) + len(KINDS_OF_WEIGHTS),
    "runs": len(OF_A_RUN) * (EACH_TIME + FURTHER) + len(RUNS),
    "arrays, bytes": len(DAMAGE) * TIMES,
    "arrays, contents": 2 * len(TYPES) * len(SHAPES) + 2 * 4 * len(HEADERS),
    "digits": len(DAMAGE) * 4 * (TIMES // 4),
    "payloads": 10 * len(PAYLOADS),
}


def test_they_are_many():
    assert sum(CASES.values()) >= 500 and min(CASES.values()) >= 50, CASES