"""A model to a file and back: what is sound loads as it was, and nothing is believed that the file only claims."""
import errno
import math
import os
import zipfile

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_model import NETWORKS, build_network
from diffusion_schedules import make_betas
from helpers import trained
from utils import checkpoint
from utils.checkpoint import Progress, load_checkpoint, load_model, load_run, save_checkpoint
from utils.export import for_sampling
from utils.settings import OF_A_MODEL, SHIPPED

SETTINGS = {"schedule": "linear", "timesteps": 20, "network": "unet", "image_size": 28, "image_channels": 1,
            "classes": 10, "class_shares": [0.1] * 10, "width": 3, "depth": 1}


def weights(seed=0, **settings):
    """Random weights for a network with these settings."""
    generator = torch.Generator().manual_seed(seed)
    network = build_network(SETTINGS | settings)
    return {name: torch.randn(value.shape, generator=generator) for name, value in network.state_dict().items()}


def write(path, settings=None, ema=None, **more):
    """Writes a checkpoint that is sound but for what is given: by torch, since save_checkpoint writes no others."""
    torch.save({"format": "ddpm-mnist", "version": 2, "settings": SETTINGS | (settings or {}), "ema": ema or weights(),
                **more}, path)
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
# What is sound loads

def test_a_drive_that_cannot_be_read_is_not_taken_for_a_damaged_file(path, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(zipfile.ZipExtFile, "read", fail)
    with pytest.raises(OSError, match="Input/output error") as error:
        load_model(path)
    assert error.value.filename == str(path)


def test_round_trip(tmp_path):
    saved = {"settings": SETTINGS, "history": [{"step": 1, "loss": 0.1}], "none": None, "ema": weights(1)}
    save_checkpoint(tmp_path / "c.pt", saved)
    loaded = load_checkpoint(tmp_path / "c.pt")
    assert {name: loaded[name] for name in ("settings", "history", "none")} == {
        name: saved[name] for name in ("settings", "history", "none")}
    assert loaded["ema"].keys() == saved["ema"].keys()
    assert all(torch.equal(loaded["ema"][name], value) for name, value in saved["ema"].items())


@pytest.mark.parametrize("settings", [{}, {"classes": 0, "class_shares": []}, {"schedule": "cosine", "timesteps": 7},
                                      {"image_size": 32, "image_channels": 3, "width": 9, "depth": 2}])
def test_a_model_is_what_the_file_says(tmp_path, settings):
    saved = weights(1, **settings)
    model = load_model(write(tmp_path / "c.pt", settings, saved))
    assert not model.network.training
    assert all(torch.equal(value, saved[name]) for name, value in model.network.state_dict().items())
    assert model.settings == SETTINGS | settings and model.ddpm.T == model.settings["timesteps"]
    expected = make_betas(model.settings["schedule"], model.settings["timesteps"])
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
    for_sampling(source, tmp_path / "e.pt")
    exported = load_checkpoint(tmp_path / "e.pt")
    assert exported.keys() == {"format", "version", "settings", "ema", "early", "step"}
    assert exported["settings"] == SETTINGS and exported["early"] is None
    for name, value in weights().items():
        assert torch.equal(exported["ema"][name], value.half())
    assert load_model(tmp_path / "e.pt").steps == 7 and load_model(write(tmp_path / "d.pt")).steps is None


def test_a_model_knows_what_it_was_early(tmp_path):
    """Its EMA, whichever weights are asked for; half the bytes of it when exported."""
    average, early = weights(1), weights(2)
    source = write(tmp_path / "c.pt", ema=average, model=weights(3), early=early)
    for model in load_model(source), load_model(source, ema=False):
        ours = model.early.state_dict()
        assert all(torch.equal(value, ours[name]) for name, value in early.items()) and not model.early.training
    for_sampling(source, tmp_path / "e.pt")
    exported = load_checkpoint(tmp_path / "e.pt")
    assert all(torch.equal(exported["early"][name], value.half()) for name, value in early.items())
    assert load_model(write(tmp_path / "d.pt")).early is None


@pytest.mark.parametrize("broken", [
    {}, [1], 7, {"stem.weight": torch.zeros(1)}, weights(1, width=9), {"stem.weight": None},
    {name: value * math.nan for name, value in weights().items()},
], ids=["empty", "list", "number", "one", "other", "none", "NaN"])
def test_early_weights_are_checked_like_the_others(tmp_path, broken):
    refused(write(tmp_path / "c.pt", early=broken))


def test_a_weight_with_two_names_must_be_finite_by_either(tmp_path, monkeypatch):
    """A buffer may be infinite, a mask for example, but not a weight that shares its memory with another."""
    class Tied(torch.nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__()
            self.first = torch.nn.Linear(2, 2)
            self.second = self.first
            self.register_buffer("mask", torch.tensor([-math.inf]))

    monkeypatch.setitem(NETWORKS, "unet", Tied)
    ema = Tied().state_dict()
    assert load_model(write(tmp_path / "c.pt", {"network": "unet"}, ema)).network.mask.isinf()
    for name in "first.weight", "second.weight":
        broken = ema | {name: torch.full((2, 2), math.inf)}
        with pytest.raises(ValueError, match=f"{name} holds NaN or infinite numbers"):
            load_model(write(tmp_path / "c.pt", {"network": "unet"}, broken))


def test_a_model_of_a_run_that_was_stopped_at_once(tmp_path):
    assert load_model(write(tmp_path / "c.pt", {}, weights(1), step=0)).steps == 0


@pytest.mark.parametrize("step", [-1, 1.5, "7", True, [7], torch.tensor(7), float("nan")], ids=str)
def test_a_step_that_is_none_is_refused(tmp_path, step):
    refused(write(tmp_path / "c.pt", step=step), "no run is at step")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError()], ids=repr)
def test_a_file_that_cannot_be_read_now_is_not_called_damaged(path, monkeypatch, error):
    """Somebody might delete it."""
    monkeypatch.setattr(checkpoint, "read_tensors", lambda path: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        load_checkpoint(path)


def test_a_model_translates_the_networks_v(path):
    model = load_model(path)
    x_t, t, labels = torch.randn(4, 1, 28, 28), torch.tensor([0, 7, 15, 19]), torch.tensor([0, 3, 9, 10])
    expected = model.ddpm.clipped_noise_from_v(x_t, t, model.network(x_t, t, labels))
    assert torch.equal(model(x_t, t, labels), expected)
    assert not torch.equal(model(x_t, t, labels), model(x_t, t))


def test_in_bf16_the_products_are_bf16_and_the_noise_is_not(path):
    for precision, dtype in ("fp32", torch.float32), ("bf16", torch.bfloat16):
        model, seen = load_model(path, precision=precision), []
        model.network.stem.register_forward_hook(lambda layer, x, out: seen.append(out.dtype))
        noise = model(torch.zeros(2, 1, 28, 28), torch.tensor([0, 1]))
        assert seen == [dtype] and noise.dtype == torch.float32


def test_a_model_goes_where_it_is_told(path):
    assert {p.device.type for p in load_model(path, "meta").network.parameters()} == {"meta"}


# ----------------------------------------------------------------------------------------------------------------------
# Version 1

def older(state):
    """The state as it was in a file of version 1: two layers and one entry had other names, and there was one network
    and no curve."""
    state = {name: value for name, value in state.items() if name not in ("lr", "curve")} | {"version": 1}
    state["settings"] = {name: value for name, value in state["settings"].items() if name != "network"}
    for part in "model", "ema":
        state[part] = {name.replace("downsample.", "shrink.").replace("upsample.", "grow."): value
                       for name, value in state[part].items()}
    if "since_report" in state:
        state["recent"] = state.pop("since_report")
        state["recent"]["sums"] = state["recent"]["sums"][:2]
    return state


def test_a_model_of_version_1_loads(tmp_path):
    raw, average = weights(1), weights(2)
    new = load_checkpoint(write(tmp_path / "new.pt", ema=average, model=raw, step=7))
    torch.save(older(new), tmp_path / "old.pt")
    assert torch.load(tmp_path / "old.pt", weights_only=True)["ema"].keys() != average.keys()
    for ema, expected in (True, average), (False, raw):
        model = load_model(tmp_path / "old.pt", ema=ema)
        assert model.settings == SETTINGS and model.steps == 7
        assert all(torch.equal(value, expected[name]) for name, value in model.network.state_dict().items())


def test_a_run_of_version_1_can_go_on(tmp_path):
    new = load_run(trained())
    old = older(load_run(trained()))
    old["settings"]["network"] = new["settings"]["network"]  # there was none but "unet" then
    torch.save(old, tmp_path / "old.pt")
    state = load_run(tmp_path / "old.pt")
    assert state.keys() == new.keys() and state["settings"] == new["settings"]
    for part in "model", "ema":
        assert all(torch.equal(state[part][name], value) for name, value in new[part].items())
    progress = Progress(torch.device("cpu"))
    progress.load_state_dict(tmp_path / "old.pt", state)
    assert (progress.step, progress.seconds, progress.history) == (new["step"], new["seconds"], new["history"])
    assert progress.step == 120 and progress.since_report["steps"] == new["since_report"]["steps"]
    assert progress.means() == [x / new["since_report"]["steps"] for x in new["since_report"]["sums"][:2]]


# ----------------------------------------------------------------------------------------------------------------------
# What is not sound is refused

def test_a_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere.pt.*python train.py"):
        load_model(tmp_path / "nowhere.pt")


def test_a_folder_is_not_a_checkpoint(tmp_path):
    refused(tmp_path, "not a file")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "not a file")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, torch.zeros(3), {"format": "another", "version": 2}, None])
def test_a_torch_file_of_another_kind_is_refused(path, content):
    torch.save(content, path)
    refused(path, "not a checkpoint of this project")


@pytest.mark.parametrize("version", [0, 3, -1, None, "2", 2.0, True, [2], 10**30, torch.tensor([1, 2])], ids=str)
def test_another_version_is_refused(tmp_path, version):
    refused(write(tmp_path / "c.pt", version=version), "format version .*this code reads versions 1 and 2")


@pytest.mark.parametrize("name, value", [
    ("schedule", "quadratic"), ("schedule", None), ("schedule", 3), ("schedule", ["linear"]),
    ("timesteps", 0), ("timesteps", -5), ("timesteps", 10**9), ("timesteps", 20.0), ("timesteps", "20"),
    ("timesteps", True),
    ("image_size", 10**9), ("image_size", 0), ("image_channels", 0), ("image_channels", 2),
    ("image_channels", 10**9),
    ("classes", -1), ("classes", 10**9), ("width", 10**9), ("width", 2), ("width", None), ("width", [8]),
    ("width", torch.tensor(8)), ("depth", 0), ("depth", 10**9), ("depth", float("nan")),
    ("image_size", None), ("image_channels", None), ("classes", None), ("timesteps", None), ("network", None),
    ("network", "resnet"), ("network", ["unet"]), ("label_dropout", torch.tensor([0.0, 1.0])), ("label_dropout", "0"),
    ("batch_size", 0), ("batch_size", 1.5), ("batch_size", None), ("timesteps", 10),
    ("class_shares", None), ("class_shares", [0.1] * 9), ("class_shares", [0.1] * 9 + [float("nan")]),
    ("class_shares", [0.1] * 9 + [-0.1]), ("class_shares", ["0.1"] * 10), ("class_shares", [1e300] * 10),
])
def test_settings_that_no_model_has_are_refused(tmp_path, name, value):
    refused(write(tmp_path / "c.pt", {name: value}), name)


def test_a_size_that_no_network_has_is_refused(tmp_path):
    refused(write(tmp_path / "c.pt", {"image_size": 30}), "multiple of 4")


@pytest.mark.parametrize("name", OF_A_MODEL)
def test_missing_settings_are_refused(tmp_path, name):
    settings = {key: value for key, value in SETTINGS.items() if key != name}
    torch.save({"format": "ddpm-mnist", "version": 2, "settings": settings, "ema": weights()}, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", f"{name} is None")


@pytest.mark.parametrize("settings", [None, [], "linear", 5])
def test_settings_that_are_no_settings_are_refused(tmp_path, settings):
    torch.save({"format": "ddpm-mnist", "version": 2, "settings": settings, "ema": weights()}, tmp_path / "c.pt")
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
    refused(path, "do not fit its network")


def test_a_small_file_that_claims_a_large_network_costs_little(tmp_path):
    path = write(tmp_path / "c.pt", {"width": 400, "depth": 1})
    with Allocated() as allocated:
        refused(path, "not a tensor of shape|do not fit its network")
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


def test_the_tiny_trained_model_loads():
    model = load_model(trained())
    assert model.settings["dataset"] == "MNIST" and sum(model.settings["class_shares"]) == pytest.approx(1)
    assert trained().stat().st_size < 2_000_000


@pytest.mark.skipif(not SHIPPED.exists(), reason="the shipped model is not there yet")
def test_the_shipped_model_loads():
    model = load_model()
    assert model.settings["image_size"] == 28 and model.settings["classes"] == 10
    assert SHIPPED.stat().st_size < 12_000_000
