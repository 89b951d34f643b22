"""Files in and out: nothing half written, nothing executed, nothing believed that the file only claims."""
import contextlib
import io
import os
import pickle
import random
import stat
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
from checkpoint import (atomic_write, build_network, check_target, export, load_checkpoint, load_model, lock_folder,
                        save_checkpoint)
from cli import generate
from tiny import DEVICE, ROOT, trained

SETTINGS = {"schedule": "linear", "timesteps": 20, "image_size": 28, "image_channels": 1, "classes": 10,
            "class_shares": [0.1] * 10, "width": 3, "depth": 1}


def weights(seed=0, **settings):
    """Random weights for a network with these settings."""
    generator = torch.Generator().manual_seed(seed)
    network = build_network(SETTINGS | settings)
    return {name: torch.randn(value.shape, generator=generator) for name, value in network.state_dict().items()}


def write(path, settings=None, ema=None, **more):
    """Writes a checkpoint that is sound but for what is given."""
    save_checkpoint(path, {"settings": SETTINGS | (settings or {}), "ema": ema or weights(), **more})
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "checkpoint.pt")


def refused(path, words=None):
    """Loading it raises ValueError, of one line of a sane length that names the file."""
    with pytest.raises(ValueError, match=words) as error:
        load_model(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 1000


# ----------------------------------------------------------------------------------------------------------------------
# Atomic writes

def files(folder):
    return sorted(item.name for item in folder.iterdir())


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "new" / "folder" / "x"
    with atomic_write(target) as file:
        file.write(b"12")
        file.flush()
        assert not target.exists()
        file.write(b"34")
    assert target.read_bytes() == b"1234" and files(target.parent) == ["x"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_exception_leaves_the_old_file_and_no_other(tmp_path, error):
    (tmp_path / "x").write_bytes(b"old")
    with contextlib.suppress(error), atomic_write(tmp_path / "x") as file:
        file.write(b"new")
        raise error
    assert (tmp_path / "x").read_bytes() == b"old" and files(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(28, "No space left on device")

    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(checkpoint.os, call, full)
    with pytest.raises(OSError, match="No space"), atomic_write(tmp_path / "x") as file:
        file.write(b"new")
    assert (tmp_path / "x").read_bytes() == b"old" and files(tmp_path) == ["x"]


def test_the_bytes_are_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        events.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def noted_replace(source, target):
        events.append(("replace", os.path.dirname(source) == os.path.dirname(target)))
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "fsync", noted_fsync)
    monkeypatch.setattr(checkpoint.os, "replace", noted_replace)
    with atomic_write(tmp_path / "x") as file:
        file.write(b"1234")
    assert events == [("fsync", 4), ("replace", True)]


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for pid in dead.stdout.strip(), os.getppid(), "no-number", "9" * 30:
        (tmp_path / f".x.{pid}.tmp").touch()
    (tmp_path / f".y.{dead.stdout.strip()}.tmp").touch()
    with atomic_write(tmp_path / "x") as file:
        file.write(b"new")
    assert files(tmp_path) == sorted(["x", f".x.{os.getppid()}.tmp", f".y.{dead.stdout.strip()}.tmp"])


def test_a_name_is_no_pattern(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    leftover = f".a[1].{dead.stdout.strip()}.tmp"
    others = f".x.{dead.stdout.strip()}.tmp"
    (tmp_path / leftover).touch()
    (tmp_path / others).touch()
    for name in "a[1]", "*", "a**b":
        with atomic_write(tmp_path / name) as file:
            file.write(b"new")
    assert files(tmp_path) == sorted(["a[1]", "*", "a**b", others])


def test_a_target_is_tried_and_nothing_is_left(tmp_path):
    check_target(tmp_path / "folder" / "x")
    (tmp_path / "y").write_bytes(b"old")
    check_target(tmp_path / "y")
    assert files(tmp_path) == ["folder", "y"] and files(tmp_path / "folder") == []
    assert (tmp_path / "y").read_bytes() == b"old"
    with pytest.raises(OSError, match="too long"):
        check_target(tmp_path / ("x" * 250))  # a name that has room itself, but not with what the temporary one adds


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "x")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "x").read_bytes() == b"new"


def make_fifo(folder):
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


@pytest.mark.parametrize("target", [lambda folder: DEVICE, make_fifo, lambda folder: folder])
def test_what_is_no_file_is_not_replaced(tmp_path, target):
    target = target(tmp_path)
    mode = os.stat(target).st_mode
    with pytest.raises(ValueError, match="not a regular file"), atomic_write(target) as file:
        file.write(b"new")
    assert stat.S_IFMT(os.stat(target).st_mode) == stat.S_IFMT(mode)


def test_a_locked_folder_is_locked_for_others_until_the_end(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from checkpoint import lock_folder\n" \
           f"with lock_folder({str(tmp_path)!r}): print('got it')"
    with lock_folder(tmp_path):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        with pytest.raises(RuntimeError, match="another run is writing to"), lock_folder(tmp_path):
            pass
    assert "another run is writing to" in second.stderr and second.stdout == ""
    with lock_folder(tmp_path):
        pass


# ----------------------------------------------------------------------------------------------------------------------
# What is sound loads

def test_round_trip(tmp_path):
    saved = {"settings": SETTINGS, "history": [{"step": 1, "loss": 0.1}], "none": None, "ema": weights(1)}
    save_checkpoint(tmp_path / "c.pt", saved)
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert {name: loaded[name] for name in ("settings", "history", "none")} == {
        name: saved[name] for name in ("settings", "history", "none")}
    assert loaded["ema"].keys() == saved["ema"].keys()
    assert all(torch.equal(loaded["ema"][name], value) for name, value in saved["ema"].items())


def test_a_save_that_fails_leaves_the_old_checkpoint(path):
    content = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_checkpoint(path, {"settings": SETTINGS, "ema": lambda: "cannot be pickled"})
    assert path.read_bytes() == content and files(path.parent) == [path.name]


@pytest.mark.parametrize("settings", [{}, {"classes": 0, "class_shares": []}, {"schedule": "cosine", "timesteps": 7},
                                      {"image_size": 32, "image_channels": 3, "width": 9, "depth": 2}])
def test_a_model_is_what_the_file_says(tmp_path, settings):
    saved = weights(1, **settings)
    model = load_model(write(tmp_path / "c.pt", settings, saved))
    assert not model.network.training
    assert all(torch.equal(value, saved[name]) for name, value in model.network.state_dict().items())
    assert model.settings == SETTINGS | settings and model.ddpm.T == model.settings["timesteps"]
    expected = checkpoint.make_betas(model.settings["schedule"], model.settings["timesteps"])
    assert torch.equal(model.ddpm.betas, expected)


def test_ema_weights_by_default_and_raw_ones_on_request(tmp_path):
    raw, average = weights(1), weights(2)
    path = write(tmp_path / "c.pt", ema=average, model=raw)
    assert torch.equal(load_model(path).network.stem.weight, average["stem.weight"])
    assert torch.equal(load_model(path, ema=False).network.stem.weight, raw["stem.weight"])


def test_a_file_without_raw_weights_says_so(path):
    with pytest.raises(ValueError, match="no raw weights.*--no-ema"):
        load_model(path, ema=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load_as_float32(tmp_path, dtype):
    saved = {name: value.to(dtype) for name, value in weights().items()}
    network = load_model(write(tmp_path / "c.pt", ema=saved)).network
    assert network.stem.weight.dtype == torch.float32
    assert torch.equal(network.stem.weight, saved["stem.weight"].float())


def test_export_keeps_what_sampling_needs_in_half_the_bytes(tmp_path):
    source = write(tmp_path / "c.pt", model=weights(3), optimizer={"state": {}}, step=7)
    export(source, tmp_path / "e.pt")
    exported = load_checkpoint(tmp_path / "e.pt")
    assert exported.keys() == {"format", "version", "settings", "ema", "step"} and exported["settings"] == SETTINGS
    for name, value in weights().items():
        assert torch.equal(exported["ema"][name], value.half())
    assert load_model(tmp_path / "e.pt").steps == 7 and load_model(write(tmp_path / "d.pt")).steps is None


@pytest.mark.parametrize("step", [-1, 1.5, "7", True, [7], torch.tensor(7), float("nan")], ids=str)
def test_a_step_that_is_none_is_refused(tmp_path, step):
    refused(write(tmp_path / "c.pt", step=step), "no run is at step")


def test_the_denoiser_translates_the_networks_v(path):
    model = load_model(path)
    x_t, t, labels = torch.randn(4, 1, 28, 28), torch.tensor([0, 7, 15, 19]), torch.tensor([0, 3, 9, 10])
    expected = model.ddpm.clipped_noise_from_v(x_t, t, model.network(x_t, t, labels))
    assert torch.equal(model.denoiser(x_t, t, labels), expected)
    assert not torch.equal(model.denoiser(x_t, t, labels), model.denoiser(x_t, t))


def test_in_bf16_the_products_are_bf16_and_the_noise_is_not(path):
    for precision, dtype in ("fp32", torch.float32), ("bf16", torch.bfloat16):
        model, seen = load_model(path, precision=precision), []
        model.network.stem.register_forward_hook(lambda layer, x, out: seen.append(out.dtype))
        noise = model.denoiser(torch.zeros(2, 1, 28, 28), torch.tensor([0, 1]))
        assert seen == [dtype] and noise.dtype == torch.float32


def test_a_model_goes_where_it_is_told(path):
    assert {p.device.type for p in load_model(path, "meta").network.parameters()} == {"meta"}


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_sampling_on_a_fake_gpu(path, sampler, guidance):
    """FakeTensorMode raises where tensors of two devices meet, on a machine without a GPU."""
    model = load_model(path)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.network.to("cuda")
        for _, process in generate(model, 5, batch_size=3, sampler=sampler, guidance=guidance, steps=4,
                                   guidance_interval=(0, 1e9)):  # else a look at t, which has no numbers here
            for _, x, x0_hat in process:
                assert x.device.type == x0_hat.device.type == "cuda" and x.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# What is not sound is refused

def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere.pt.*python train.py"):
        load_model(tmp_path / "nowhere.pt")


def test_a_folder_is_no_checkpoint(tmp_path):
    refused(tmp_path, "not a file")


def test_a_pipe_is_not_waited_for(tmp_path):
    refused(make_fifo(tmp_path), "not a file")


@pytest.mark.parametrize("share", [0, 0.0001, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_file_is_refused(path, share):
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * share)])
    refused(path, "not a checkpoint, or only a part of one")


@pytest.mark.parametrize("content", [
    b"hello\n" * 1000, b"PK\x03\x04" + b"\0" * 500, pickle.dumps({"format": "ddpm-mnist"}),
])
def test_another_file_is_refused(path, content):
    path.write_bytes(content)
    refused(path, "not a checkpoint")


def test_a_flipped_bit_is_noticed(path):
    """Wherever it changes anything: alignment and time stamps of the archive do not."""
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = [(archive.open(entry)._orig_compress_start, entry.file_size) for entry in archive.infolist()]
    generator = random.Random(0)
    for place in [start + generator.randrange(size) for start, size in entries for _ in range(3)]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1:])
        refused(path)
    for place in [generator.randrange(len(content)) for _ in range(40)] + list(range(len(content) - 40, len(content))):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1:])
        with contextlib.suppress(ValueError):
            assert torch.equal(load_model(path).network.stem.weight, weights()["stem.weight"])


class Canary:
    """A payload: unpickling it writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.parametrize("wrap", [lambda canary: canary, lambda canary: {"format": "ddpm-mnist", "version": 1,
                                  "settings": SETTINGS, "ema": weights(), "x": canary}])
@pytest.mark.parametrize("as_torch", [True, False])
def test_nothing_is_executed(tmp_path, wrap, as_torch):
    payload, path = wrap(Canary(tmp_path / "executed")), tmp_path / "c.pt"
    if as_torch:
        torch.save(payload, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    refused(path, "was not executed" if as_torch else "not a checkpoint")
    assert not (tmp_path / "executed").exists()
    if as_torch:  # the control: this canary sings
        torch.load(path, weights_only=False)
        assert (tmp_path / "executed").exists()


def repacked(source, target, change=lambda name, content: content, **kwargs):
    """Copies the zip archive that a checkpoint is, with changed entries and right checksums."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **kwargs) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return target


def test_repacking_alone_changes_nothing(path, tmp_path):
    old, new = load_model(path), load_model(repacked(path, tmp_path / "r.pt"))
    assert new.settings == old.settings
    assert all(torch.equal(value, new.network.state_dict()[name]) for name, value in old.network.state_dict().items())


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_checkpoint_is_refused_whatever_its_size(path, tmp_path, compression):
    refused(repacked(path, tmp_path / "packed.pt", compression=compression), "compressed")


def test_a_zip_bomb_is_not_unpacked(path, tmp_path):
    def blow_up(name, content):
        return content + bytes(50_000_000 * name.endswith("data/0"))

    bomb = repacked(path, tmp_path / "bomb.pt", blow_up, compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 1_000_000
    refused(bomb, "unpacks to 5.* bytes")


def archive(content, entry="data.pkl"):
    """The bytes of a checkpoint with this pickle in it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        for name, value in (entry, content), ("byteorder", b"little"), ("version", b"3\n"):
            file.writestr(f"archive/{name}", value)
    return packed.getvalue()


# Hand-made pickles: a dict of 300 entries, of which 300 copies are made; and tuples of two, each of the one before,
# that a dict has to go through 2 ** 20 times to the bottom.
COPIES = (b"\x80\x02}q\x00(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(300)) + b"u0"
          b"](" + b"ccollections\nOrderedDict\nh\x00\x85R" * 300 + b"e.")
TOWER = b"\x80\x02K\x01K\x01\x86q\x000" + b"h\x00h\x00\x86q\x000" * 20 + b"}(h\x00Nu."


@pytest.mark.parametrize("content", [COPIES, TOWER, b"\x80\x02}2\x86.", b"\x80\x02}\x94."],
                         ids=["copies", "tower", "DUP", "MEMOIZE"])
def test_no_value_is_in_two_places(tmp_path, content):
    """A few bytes could stand for gigabytes, or for hours of work."""
    for entry in "data.pkl", "DATA.PKL":  # torch reads either
        (tmp_path / "c.pt").write_bytes(archive(content, entry))
        with pytest.raises(ValueError, match="was not executed") as error:
            load_checkpoint(tmp_path / "c.pt")
        assert "in two places" in str(error.value.__cause__)


@pytest.mark.parametrize("name", ["builtins bytearray", "__builtin__ bytearray", "_codecs encode", "torch Size",
                                  "torch._utils _rebuild_parameter", "collections Counter"])
def test_names_that_no_checkpoint_has_are_refused(tmp_path, name):
    """torch would call these, with any arguments."""
    (tmp_path / "c.pt").write_bytes(archive(b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\nK\x0a\x85R."))
    with pytest.raises(ValueError, match="was not executed") as error:
        load_checkpoint(tmp_path / "c.pt")
    assert f"it names {name}" in str(error.value.__cause__)


def test_two_archives_in_one_file_are_the_one_that_was_checked(tmp_path):
    """Python's zipfile goes by where the directory ends and torch by where it is said to begin. Between them lies the
    comment, which can be a directory too."""
    def parts(content):
        end = content.rindex(b"PK\5\6")
        size, start = struct.unpack("<II", content[end + 12:end + 20])
        return content[:start], bytearray(content[start:start + size]), bytearray(content[end:])

    def moved(directory, distance):
        place = 0
        while place < len(directory):
            offset, = struct.unpack("<I", directory[place + 42:place + 46])
            directory[place + 42:place + 46] = struct.pack("<I", offset + distance)
            place += 46 + sum(struct.unpack("<HHH", directory[place + 28:place + 34]))
        return directory

    checked, other = (archive(pickle.dumps({"format": "ddpm-mnist", "version": 1, "seen by": who}, protocol=2))
                      for who in ("zipfile", "torch"))
    (files_a, directory_a, end), (files_b, directory_b, _) = parts(checked), parts(other)
    end[16:20] = struct.pack("<I", len(files_a + files_b + directory_a + end))  # where it is said to begin
    end[20:22] = struct.pack("<H", len(directory_b))  # the length of the comment
    (tmp_path / "c.pt").write_bytes(files_a + files_b + moved(directory_a, len(directory_a) + 22) + end
                                    + moved(directory_b, len(files_a)))
    assert torch.load(tmp_path / "c.pt", weights_only=True)["seen by"] == "torch"  # the control
    assert load_checkpoint(tmp_path / "c.pt")["seen by"] == "zipfile"


def test_a_bomb_of_one_record_that_is_many_is_not_unpacked(tmp_path):
    """The directory names it a hundred times."""
    content = archive(b"\x80\x02}." + bytes(100_000))
    end = content.rindex(b"PK\5\6")
    size, start = struct.unpack("<II", content[end + 12:end + 20])
    directory = content[start:start + size] * 100
    (tmp_path / "c.pt").write_bytes(content[:start] + directory + struct.pack(
        "<4sHHHHIIH", b"PK\5\6", 0, 0, 300, 300, len(directory), start, 0))
    refused(tmp_path / "c.pt", "unpacks to 100.* bytes")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(3), {"format": "another", "version": 1}, None])
def test_a_torch_file_of_another_kind_is_refused(path, content):
    torch.save(content, path)
    refused(path, "not a checkpoint of this project")


@pytest.mark.parametrize("version", [0, 2, None, "1", [1], 10**30])
def test_another_version_is_refused(tmp_path, version):
    refused(write(tmp_path / "c.pt", version=version), "format version .*this code reads version 1")


@pytest.mark.parametrize("name, value", [
    ("schedule", "quadratic"), ("schedule", None), ("schedule", 3), ("schedule", ["linear"]),
    ("timesteps", 0), ("timesteps", -5), ("timesteps", 10**9), ("timesteps", 20.0), ("timesteps", "20"),
    ("timesteps", True),
    ("image_size", 10**9), ("image_size", 0), ("image_channels", 0), ("image_channels", 2),
    ("image_channels", 10**9),
    ("classes", -1), ("classes", 10**9), ("width", 10**9), ("width", 2), ("width", None), ("width", [8]),
    ("width", torch.tensor(8)), ("depth", 0), ("depth", 10**9), ("depth", float("nan")),
    ("class_shares", None), ("class_shares", [0.1] * 9), ("class_shares", [0.1] * 9 + [float("nan")]),
    ("class_shares", [0.1] * 9 + [-0.1]), ("class_shares", ["0.1"] * 10), ("class_shares", [1e300] * 10),
])
def test_settings_that_no_model_has_are_refused(tmp_path, name, value):
    refused(write(tmp_path / "c.pt", {name: value}), name)


def test_a_size_that_no_network_has_is_refused(tmp_path):
    refused(write(tmp_path / "c.pt", {"image_size": 30}), "multiple of 4")


@pytest.mark.parametrize("name", checkpoint.MODEL_SETTINGS)
def test_missing_settings_are_refused(tmp_path, name):
    settings = {key: value for key, value in SETTINGS.items() if key != name}
    save_checkpoint(tmp_path / "c.pt", {"settings": settings, "ema": weights()})
    refused(tmp_path / "c.pt", f"{name} is None")


@pytest.mark.parametrize("settings", [None, [], "linear", 5])
def test_settings_that_are_no_settings_are_refused(tmp_path, settings):
    save_checkpoint(tmp_path / "c.pt", {"settings": settings, "ema": weights()})
    refused(tmp_path / "c.pt", "no settings")


def test_the_message_does_not_quote_a_book(tmp_path):
    refused(write(tmp_path / "c.pt", {"schedule": "x" * 100_000}), "schedule")


class Allocated(TorchDispatchMode):
    """Counts the numbers in all tensors that are made outside the meta device."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if isinstance(out, torch.Tensor) and out.device.type != "meta":
            self.numbers += out.numel()
        return out


@pytest.mark.parametrize("claimed", [{"width": 400}, {"depth": 3}])
def test_weights_that_are_only_claimed_are_refused(tmp_path, claimed):
    """Each a tensor of the right shape that repeats one number."""
    with torch.device("meta"):
        network = build_network(SETTINGS | claimed)
    hollow = {name: torch.zeros(1).expand(value.shape) for name, value in network.state_dict().items()}
    path = write(tmp_path / "c.pt", claimed, hollow)
    assert path.stat().st_size < 2 * sum(value.numel() for value in hollow.values())
    refused(path, "another network")


def test_weights_that_share_their_memory_are_parted(tmp_path):
    shared = weights()
    shared["down.conv2.bias"] = shared["stem.bias"][:]
    network = load_model(write(tmp_path / "c.pt", ema=shared)).network
    with torch.no_grad():
        network.stem.bias.add_(1)
    assert torch.equal(network.down.conv2.bias, shared["stem.bias"])


def test_a_small_file_that_claims_a_large_network_costs_little(tmp_path):
    path = write(tmp_path / "c.pt", {"width": 400, "depth": 1})
    with Allocated() as allocated:
        refused(path, "not a tensor of shape|another network")
    assert allocated.numbers < 1_000_000


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    bad = weights()
    bad["up.conv1.weight"][0, 0, 0, 0] = value
    refused(write(tmp_path / "c.pt", ema=bad), "up.conv1.weight holds NaN or infinite")


@pytest.mark.parametrize("change", [
    lambda good: good | {"stem.bias": good["stem.bias"][1:]}, lambda good: good | {"stem.bias": [0.0]},
    lambda good: good | {"stem.bias": None}, lambda good: good | {"stem.bias": good["stem.bias"].long()},
    lambda good: good | {"stem.bias": good["stem.bias"].cfloat()}, lambda good: good | {"more": torch.zeros(1)},
    lambda good: {name: value for name, value in good.items() if name != "stem.bias"}, lambda good: list(good),
    lambda good: {5: torch.zeros(1)}, lambda good: weights(width=8), lambda good: weights(classes=3),
])
def test_weights_of_another_network_are_refused(tmp_path, change):
    refused(write(tmp_path / "c.pt", ema=change(weights())))


@pytest.mark.parametrize("change", [
    lambda value: value.to_sparse(), lambda value: value.to(torch.float8_e4m3fn), lambda value: value.to("meta"),
    lambda value: value.double() + 1e300,
], ids=["sparse", "float8", "meta", "infinite as float32"])
# torch's own, as it pickles such tensors.
@pytest.mark.filterwarnings("ignore:Validating sparse:UserWarning", "ignore:TypedStorage is deprecated:UserWarning")
def test_weights_of_unusual_kinds_are_refused(tmp_path, change):
    good = weights()
    refused(write(tmp_path / "c.pt", ema=good | {"label.weight": change(good["label.weight"])}))


def test_a_version_that_is_a_tensor_is_refused(tmp_path):
    refused(write(tmp_path / "c.pt", version=torch.tensor([1, 2])), "format version")


def test_the_tiny_trained_model_loads():
    model = load_model(trained())
    assert model.settings["dataset"] == "MNIST" and sum(model.settings["class_shares"]) == pytest.approx(1)
    assert io.BytesIO(trained().read_bytes()).getbuffer().nbytes < 2_000_000


@pytest.mark.skipif(not checkpoint.SHIPPED.exists(), reason="the shipped model is not there yet")
def test_the_shipped_model_loads():
    model = load_model()
    assert model.settings["image_size"] == 28 and model.settings["classes"] == 10
    assert checkpoint.SHIPPED.stat().st_size < 12_000_000
