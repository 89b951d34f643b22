"""What users add: networks, optimizers, weightings, settings and data sets of their own. Each test is of one kind of
fault, with several members of it."""
import math
import signal
import sys
import types
import urllib.error

import numpy as np
import pytest
import torch
from torch import nn

import diffusion_model
import sample
import train
from ddpm import WEIGHTINGS
from diffusion_model import BayesUNet
from helpers import FLAGS, assert_one_line, before_step, call, contents, few_digits, run_in, same
from utils import cli, settings
from utils.checkpoint import load_checkpoint, load_model, save_checkpoint
from utils.cli import integer, number
from utils.data import DATASETS, load_dataset
from utils.settings import SETTINGS, Setting


@pytest.fixture(scope="module", autouse=True)
def quick():
    with few_digits():
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Networks of their own

class Net(nn.Module):
    """A network to be added to: by `more` in its constructor, by `inside` in its midst."""

    def __init__(self, image_size, image_channels, classes, width, depth):
        super().__init__()
        self.width = width
        self.first, self.label = nn.Conv2d(image_channels, width, 3, padding=1), nn.Embedding(classes + 1, width)
        self.more()
        self.last = nn.Conv2d(width, image_channels, 3, padding=1)

    def more(self):
        pass

    def inside(self, h):
        return h

    def forward(self, x_t, t, labels=None):
        labels = torch.full_like(t, self.label.num_embeddings - 1) if labels is None else labels
        return self.last(self.inside(torch.relu(self.first(x_t) + self.label(labels)[:, :, None, None])))


class Buffers(Net):
    """Of normalisations, of all types that a checkpoint can hold, and some that are not to be saved."""

    def more(self):
        self.batch = nn.BatchNorm2d(self.width, affine=False)
        self.instance = nn.InstanceNorm2d(self.width, track_running_stats=True)
        for dtype in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
                      torch.bfloat16, torch.float64):
            self.register_buffer(f"of_{dtype}".replace(".", "_"), torch.zeros(2, 3).to(dtype))
        self.register_buffer("of_nothing", torch.zeros(0, 3))
        self.register_buffer("scale", torch.linspace(1, 2, self.width)[:, None, None], persistent=False)
        self.no_buffer = torch.linspace(2, 1, self.width)[:, None, None]

    def inside(self, h):
        for name, buffer in self.named_buffers():
            if name.startswith("of_"):
                buffer.copy_(buffer + self.training)  # of a bool: that there was a batch
        return self.batch(h) * self.scale + self.instance(h) * self.no_buffer


class MadeOnTheWay(Net):
    """A buffer that is there from the first batch on, as caches are, before others that the EMA needs."""

    def more(self):
        self.register_buffer("cache", None, persistent=False)
        self.norm = nn.BatchNorm2d(self.width)

    def inside(self, h):
        if self.cache is None or self.cache.shape != h.shape[1:]:
            self.cache = torch.ones(h.shape[1:], device=h.device)
        return self.norm(h) + self.cache


class Masked(Net):
    """Attention over rows, each to those above it, by a mask of minus infinity."""

    def more(self):
        self.attention = nn.MultiheadAttention(self.width, 2, batch_first=True)
        self.register_buffer("mask", torch.full((28, 28), -math.inf).triu(1))

    def inside(self, h):
        rows = h.mean(3).transpose(1, 2)
        return h + self.attention(rows, rows, rows, attn_mask=self.mask)[0].transpose(1, 2)[..., None]


class Tied(Net):
    """Weights that two layers share, weights that do not learn, and weights that nothing depends on."""

    def more(self):
        self.a, self.b, self.fixed = (nn.Conv2d(self.width, self.width, 3, padding=1) for _ in range(3))
        self.b.weight = self.a.weight
        self.fixed.requires_grad_(False)
        self.unused = nn.Linear(3, 3)

    def inside(self, h):
        return self.b(torch.relu(self.a(self.fixed(h))))


class Rates(Net):
    """Numbers that the constructor takes out of a tensor, as is the custom for the rates of layers."""

    def more(self):
        self.rates = [rate.item() for rate in torch.linspace(0.5, 1, 3)]

    def inside(self, h):
        return h * self.rates[1]


class Dropout(Net):
    """Random numbers of torch's, which neither we nor a checkpoint know of."""

    def more(self):
        self.dropout = nn.Dropout(0.3)

    def inside(self, h):
        return self.dropout(h)


class Late(Net):
    """One layer for the first two batches, of which an optimizer keeps moments, and another for those after them."""

    def more(self):
        self.early, self.late = (nn.Conv2d(self.width, self.width, 1) for _ in range(2))
        self.register_buffer("batches", torch.tensor(0))

    def inside(self, h):
        self.batches += self.training
        return h + (self.late(h) if self.batches > 2 else self.early(h))


class Labelled(Net):
    """Which takes numbers for labels only, and not None."""

    def forward(self, x_t, t, labels):
        return super().forward(x_t, t, labels.clone())


def known(monkeypatch, network):
    """Makes it a row of NETWORKS. Returns the flags that choose it."""
    monkeypatch.setitem(diffusion_model.NETWORKS, "new", network)
    monkeypatch.setitem(SETTINGS, "network", SETTINGS["network"]._replace(kind=(*diffusion_model.NETWORKS,)))
    return ["--network", "new"]


def trains_and_resumes(tmp_path, *flags):
    """A run of 4 steps, one that is resumed after 2, and their samples. Returns the checkpoint, which they share."""
    expected = run_in(tmp_path / "straight", *flags, "--max-steps", 4)
    run_in(tmp_path / "resumed", *flags, "--max-steps", 2)
    resumed = run_in(tmp_path / "resumed", "--max-steps", 4, "--resume")
    assert [name for name in expected if name != "seconds" and not same(resumed[name], expected[name])] == []
    result = call(sample, "--checkpoint", tmp_path / "resumed" / "checkpoint.pt", "--n", 2, "--steps", 2,
                  "--out", tmp_path / "drawn")
    assert result.code == 0 and result.err == "" and (tmp_path / "drawn" / "grid.png").exists()
    return resumed


@pytest.mark.parametrize("network", [Buffers, MadeOnTheWay, Masked, Tied, Rates, Dropout, Late])
def test_any_network_trains_resumes_and_draws(tmp_path, monkeypatch, network):
    state = trains_and_resumes(tmp_path, *known(monkeypatch, network))
    average, raw = (load_model(tmp_path / "resumed" / "checkpoint.pt", ema=ema).network for ema in (True, False))
    for each, saved in (average, state["ema"]), (raw, state["model"]):
        assert type(each) is network and same(dict(each.state_dict()), saved)
    learning = {name for name, _ in average.named_parameters(remove_duplicate=False)
                if not name.startswith(("fixed", "unused", "late"))}
    differs = {name for name in state["ema"] if not same(state["ema"][name], state["model"][name])}
    assert learning <= differs and not differs & {name for name, _ in average.named_buffers()}
    if network is Tied:
        assert average.a.weight is average.b.weight and same(state["ema"]["a.weight"], state["ema"]["b.weight"])


class Complex(Net):
    def more(self):
        self.numbers = nn.Parameter(torch.ones(2, 2, dtype=torch.cfloat))

    def inside(self, h):
        return h * self.numbers.sum().real


class OneNumber(Net):
    """Which has an output of another shape, that would be repeated for all pixels."""

    def forward(self, *given):
        return super().forward(*given).mean((2, 3), keepdim=True)


def lbfgs(network, settings):
    """Whose step wants a function to call."""
    return [torch.optim.LBFGS(network.parameters(), lr=settings["lr"])]


@pytest.mark.parametrize("network, optimizers, words", [
    (Complex, None, ["numbers", "complex64"]), (OneNumber, None, ["1, 1, 1]"]), (Net, lbfgs, ["closure"]),
    (Labelled, None, ["NoneType"]),
], ids=lambda value: getattr(value, "__name__", ""))
def test_what_cannot_be_a_run_is_refused_before_anything_is_lost(tmp_path, monkeypatch, network, optimizers, words):
    run_in(tmp_path, "--max-steps", 1)
    before = contents(tmp_path)
    if optimizers:
        monkeypatch.setattr(train, "make_optimizers", optimizers)
    before_step(monkeypatch, 0, lambda: pytest.fail("it is trained"))
    result = call(train, *FLAGS, *known(monkeypatch, network), "--max-steps", 2, "--overwrite", "--out", tmp_path)
    assert_one_line(result, 1, *words)
    assert contents(tmp_path) == before


# ----------------------------------------------------------------------------------------------------------------------
# Optimizers of their own

class Counting(torch.optim.SGD):
    """Counts them in its groups, as some that need no schedule do."""

    def step(self):
        for group in self.param_groups:
            group["steps"] = group.get("steps", 0) + 1
            group["weight_decay"] = 1 / group["steps"]
        super().step()


OPTIMIZERS = {
    "SGD": torch.optim.SGD, "Adagrad": torch.optim.Adagrad, "ASGD": torch.optim.ASGD,
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr, momentum=0.9, centered=True),
    "AdamW": lambda p, lr: torch.optim.AdamW([{"params": [x], "weight_decay": 1 / x.ndim} for x in p], lr=lr),
    "Adafactor": torch.optim.Adafactor,
}


def built(monkeypatch, name):
    """Puts it in place of our optimizers."""
    monkeypatch.setattr(train, "make_optimizers", lambda network, settings: [
        OPTIMIZERS[name](network.parameters(), lr=settings["lr"] / 5)])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_trains_resumes_and_draws(tmp_path, monkeypatch, name):
    built(monkeypatch, name)
    state = trains_and_resumes(tmp_path, "--epochs", 1)
    assert not same(state["model"], state["ema"])  # it learns


def test_an_optimizer_that_counts_in_its_groups_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "Counting", Counting)
    built(monkeypatch, "Counting")
    assert_one_line(call(train, *FLAGS, "--max-steps", 3, "--out", tmp_path), 1, "steps", "param_groups")
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("name", ["SGD", "Adagrad", None])
def test_a_run_that_is_stopped_before_its_first_step_goes_on(tmp_path, monkeypatch, name):
    """Some optimizers have moments from the start."""
    class Stopped(cli.StopSignals):
        def __enter__(self):
            super().__enter__()
            signal.raise_signal(signal.SIGTERM)
            return self

    if name:
        built(monkeypatch, name)
    with monkeypatch.context() as patch:
        patch.setattr(train, "StopSignals", Stopped)
        assert call(train, *FLAGS, "--max-steps", 3, "--out", tmp_path).code == 143
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 0
    resumed = run_in(tmp_path, "--max-steps", 3, "--resume")
    assert same(resumed["model"], run_in(tmp_path / "straight", "--max-steps", 3)["model"])


# ----------------------------------------------------------------------------------------------------------------------
# Weightings and settings of their own

@pytest.mark.parametrize("p, w", [
    (lambda a: torch.log(a / (1 - a)), torch.ones_like), (lambda a: a[:10], torch.ones_like),
    (lambda a: 0 * a, torch.ones_like), (lambda a: a / 0, torch.ones_like),
    (torch.ones_like, lambda a: torch.log(a - a)), (torch.ones_like, lambda a: a[:10]),
])
def test_a_weighting_that_cannot_be_drawn_by_is_refused_before_the_run(tmp_path, monkeypatch, p, w):
    monkeypatch.setitem(WEIGHTINGS, "simple", (p, w))
    monkeypatch.setattr(train, "draw_batch", lambda *args: pytest.fail("it is trained"))
    result = call(train, *FLAGS, "--weighting", "simple", "--max-steps", 1, "--out", tmp_path)
    assert_one_line(result, 1, "weighting simple", "tables [T]")


def test_a_weighting_may_leave_the_noisiest_timesteps_out():
    """In this step the largest random number rounds to 1, which no cumulative probability exceeds."""
    p = (torch.arange(1000) < 571).double() / 571
    images, labels = torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.zeros(8, dtype=torch.long)
    settings = {"seed": 0, "batch_size": 1024, "label_dropout": 0.1, "classes": 1}
    _, _, t, _ = train.draw_batch(2208, images, labels, settings, p)
    assert t.max() == 570


@pytest.mark.parametrize("setting, text, value, other", [
    (Setting("none", str, ""), "some", "some", 5), (Setting(4, (1, 2, 4), ""), 2, 2, 3),
    (Setting(0.5, number(0, 1), ""), 1, 1.0, "1"),
])
def test_a_setting_of_any_kind_is_kept_and_checked(tmp_path, monkeypatch, setting, text, value, other):
    monkeypatch.setitem(SETTINGS, "own", setting)
    assert run_in(tmp_path, "--own", text, "--max-steps", 1)["settings"]["own"] == value
    state = run_in(tmp_path, "--resume", "--max-steps", 2)
    assert state["settings"]["own"] == value
    save_checkpoint(tmp_path / "checkpoint.pt", state | {"settings": state["settings"] | {"own": other}})
    assert_one_line(call(train, "--resume", "--out", tmp_path), 1, "the setting own is")


def test_older_checkpoints_have_the_settings_of_networks_that_came_later(tmp_path, monkeypatch):
    """The shipped model, and older runs, with a network that reads one setting more."""
    class Later(BayesUNet):
        also_takes = (*BayesUNet.also_takes, "heads")

        def __init__(self, heads, **arguments):
            super().__init__(**arguments)
            self.heads = heads

    older = run_in(tmp_path, "--max-steps", 1)
    monkeypatch.setitem(SETTINGS, "heads", Setting(4, integer(1, 64), ""))
    monkeypatch.setattr(settings, "OF_A_MODEL", (*settings.OF_A_MODEL, "heads"))
    monkeypatch.setattr(settings.settings_of_a_file, "__defaults__", (settings.OF_A_MODEL,))
    monkeypatch.setitem(diffusion_model.NETWORKS, "bayes", Later)
    monkeypatch.setitem(settings.OLDER, "heads", 2)
    assert load_model().network.heads == load_model(tmp_path / "checkpoint.pt").network.heads == 2
    resumed = run_in(tmp_path, "--resume", "--max-steps", 2)
    assert resumed["settings"] == older["settings"] | {"heads": 2}
    flags = ["--init", tmp_path / "checkpoint.pt", "--max-steps", 1, "--out", tmp_path / "new"]
    assert call(train, *FLAGS, *flags).code == 0


def test_init_checks_the_settings_of_its_checkpoint(tmp_path):
    state = run_in(tmp_path, "--max-steps", 1)
    save_checkpoint(tmp_path / "odd.pt", state | {"settings": state["settings"] | {"timesteps": 0}})
    result = call(train, *FLAGS, "--init", tmp_path / "odd.pt", "--max-steps", 1, "--out", tmp_path / "new")
    assert_one_line(result, 1, f"{tmp_path / 'odd.pt'}: the setting timesteps is 0")


# ----------------------------------------------------------------------------------------------------------------------
# Data of their own

LEVELS = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
CLASSES = np.arange(12) % 3
FIXED = LEVELS.copy()
FIXED.flags.writeable = False


def the_data_are(monkeypatch, data, test=None):
    monkeypatch.setitem(DATASETS, "MNIST", lambda root, train: data if train or test is None else test)


@pytest.mark.parametrize("data", [
    *[(LEVELS, CLASSES.astype(dtype)) for dtype in ("uint8", "int8", "int32", "uint16", "uint64")],
    (LEVELS, torch.from_numpy(CLASSES).to(torch.uint8)), (FIXED, CLASSES), (LEVELS[::-1], CLASSES[::-1]),
    [torch.from_numpy(LEVELS).transpose(2, 3), CLASSES.tolist()],
], ids=["uint8", "int8", "int32", "uint16", "uint64", "tensor", "read-only", "backwards", "lists"])
def test_whole_numbers_of_any_type_and_arrays_of_any_layout_are_taken(monkeypatch, data):
    the_data_are(monkeypatch, data)
    images, labels = load_dataset("MNIST")
    assert images.dtype == torch.uint8 and np.array_equal(images.numpy(), data[0])
    assert labels.dtype == torch.int64 and np.array_equal(labels.numpy(), data[1])


@pytest.mark.parametrize("data, words", [
    *[((images, CLASSES), ["uint8", str(images.dtype)]) for images in (
        LEVELS / 127.5 - 1, LEVELS.astype(np.float16) / 255, LEVELS.astype(int), LEVELS > 99, LEVELS.astype(np.int8))],
    ((LEVELS.reshape(12, 8, 8, 1), CLASSES), ["[12, 8, 8, 1]"]), ((LEVELS[:, [0] * 4], CLASSES), ["[12, 4, 8, 8]"]),
    ((LEVELS[:0], CLASSES[:0]), ["0 images"]), ((LEVELS[..., :6, :6], CLASSES), ["multiple of 4", "6"]),
    ((LEVELS, np.eye(3, dtype=int)[CLASSES]), ["labels", "[12, 3]"]), ((LEVELS, ["cat"] * 12), ["MNIST"]),
    ((LEVELS, CLASSES, CLASSES), ["MNIST"]), (LEVELS, ["MNIST"]), (None, ["MNIST"]),
    ({"images": LEVELS, "labels": CLASSES}, ["MNIST"]), ([(torch.from_numpy(image), 0) for image in LEVELS], ["MNIST"]),
])
def test_data_that_no_model_is_for_are_refused_before_training(tmp_path, monkeypatch, data, words):
    the_data_are(monkeypatch, data)
    assert_one_line(call(train, *FLAGS, "--max-steps", 1, "--out", tmp_path), 1, *words)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("test, words", [
    ((LEVELS, CLASSES + 1), ["label 3", "test"]), ((LEVELS.repeat(2, 2).repeat(2, 3), CLASSES), ["16, 16"]),
    ((LEVELS.repeat(3, 1), CLASSES), ["3, 8, 8"]), ((LEVELS / 255, CLASSES), ["float64"]),
], ids=["label", "size", "channels", "floats"])
def test_test_images_of_another_kind_are_refused_before_training(tmp_path, monkeypatch, test, words):
    """And not at the first report, with all that was learned until then."""
    the_data_are(monkeypatch, (LEVELS, CLASSES), test)
    before_step(monkeypatch, 0, lambda: pytest.fail("it is trained"))
    assert_one_line(call(train, *FLAGS, "--max-steps", 1, "--out", tmp_path), 1, *words)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("error, reason", [
    (urllib.error.HTTPError("http://x", 404, "Not Found", {}, None), "Not Found"), (TimeoutError("timed out"), "timed"),
    (PermissionError(13, "Permission denied", "raw"), "Permission denied"),
])
def test_a_failed_download_tells_its_reason(tmp_path, monkeypatch, error, reason):
    def fail(*args, **kwargs):
        raise error

    torchvision = types.SimpleNamespace(datasets=types.SimpleNamespace(FashionMNIST=fail))
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    assert_one_line(call(train, "--dataset", "FashionMNIST", "--out", tmp_path), 1, "FashionMNIST", reason)


def test_without_torchvision_nobody_is_told_to_delete_what_was_downloaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    result = call(train, "--dataset", "FashionMNIST", "--out", tmp_path)
    assert_one_line(result, 1, "torchvision is not installed here", "pip install -r requirements.txt")
    assert "delete" not in result.err
