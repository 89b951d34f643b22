"""What strangers do: reports that cannot be written, terminals that close, full disks, and networks, optimizers and
data sets of their own. Each test is of one kind of fault, with several members of it."""
import contextlib
import errno
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import urllib.error
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from torch import nn

import diffusion_model
import evaluate
import sample
import train
from ddpm import WEIGHTINGS
from diffusion_model import BayesUNet, UNet
from helpers import FLAGS, ROOT, assert_one_line, before_step, call, few_digits, metrics, run_in, same, start
from utils import checkpoint, cli, pictures, settings
from utils.checkpoint import Progress, load_checkpoint, load_model, save_checkpoint
from utils.cli import integer, number
from utils.data import DATASETS, load_dataset
from utils.settings import SETTINGS, Setting

PLOT = pictures.plot_losses


@pytest.fixture(scope="module", autouse=True)
def quick():
    with few_digits():
        yield


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Flags for a process of its own, which knows nothing of few_digits: it trains on eight pictures in a folder."""
    folder = tmp_path_factory.mktemp("eight")
    (folder / "pictures").mkdir()
    for i in range(8):
        iio.imwrite(folder / "pictures" / f"{i}.png", np.full((28, 28), 30 * i, np.uint8))
    return ["--images", folder / "pictures", "--grey", "--image-size", 28, "--data", folder, "--timesteps", 4,
            "--epochs", 1000]


@pytest.fixture
def clock(monkeypatch):
    """Stands still but for the steps, each of which takes the seconds in this list of one number."""
    now, draw_batch, takes = [0.0], train.draw_batch, [1.0]

    def slow_draw_batch(*args):
        now[0] += takes[0]
        return draw_batch(*args)

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train, "draw_batch", slow_draw_batch)
    return takes


def contents(folder):
    """The bytes of all files in a folder, but for the lock."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


# ----------------------------------------------------------------------------------------------------------------------
# A report never costs a run

@pytest.mark.parametrize("name", ["metrics.csv", "loss.png", "step_0000002.png"])
def test_a_file_that_another_program_holds_open_is_one_warning(tmp_path, monkeypatch, name):
    """On Windows it cannot be replaced. Once it can, all of it is there."""
    replace, refused = os.replace, []

    def replacing(source, target):
        if Path(target).name == name and not refused:
            refused.append(target)
            raise PermissionError(errno.EACCES, "Permission denied", str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", replacing)
    result = call(train, *FLAGS, "--max-steps", 4, "--report-every", 2, "--out", tmp_path)
    assert result.code == 0 and len(refused) == 1
    assert re.fullmatch(f"warning: .*{name}.*Permission denied.*\n", result.err)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4
    assert [row["step"] for row in metrics(tmp_path)] == ["2", "4"]
    assert {path.name for path in contents(tmp_path)} | {name} == {
        "checkpoint.pt", "settings.json", "metrics.csv", "loss.png", "step_0000002.png", "step_0000004.png"}


@pytest.mark.parametrize("package, lost", [("matplotlib", "loss.png"), ("imageio", "step_0000002.png")])
def test_a_package_that_is_missing_is_noticed_at_once_and_costs_no_run(tmp_path, monkeypatch, package, lost):
    monkeypatch.setattr(pictures, "plot_losses", PLOT)
    monkeypatch.setitem(sys.modules, package, None)  # to import it is an ImportError
    said = []
    before_step(monkeypatch, 0, lambda: said.append(sys.stderr.getvalue()))
    result = call(train, *FLAGS, "--max-steps", 2, "--out", tmp_path)
    assert result.code == 0 and load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2
    at_once, at_the_report = result.err.splitlines()
    assert said == [at_once + "\n"] and lost in at_the_report
    assert all(line.startswith("warning: ") and package in line for line in (at_once, at_the_report))
    assert {"metrics.csv", "loss.png", "step_0000002.png"} - {path.name for path in contents(tmp_path)} == {lost}


def test_a_run_in_a_notebook_and_the_command_that_it_prints(tmp_path, monkeypatch, eight):
    """Jupyter names a back end that only it has, and a matplotlibrc may ask for what is not installed. The command is
    run where the run was: not in the folder of the scripts."""
    (tmp_path / "rc").write_text("text.usetex: True\nfont.family: No Such Font\nbackend: qtagg\nsavefig.format: svg\n")
    monkeypatch.setenv("MATPLOTLIBRC", str(tmp_path / "rc"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    process = start("train.py", *FLAGS, *eight, "--max-steps", 2, "--out", "my run", cwd=tmp_path)
    out, err = process.communicate(timeout=900)
    assert (process.returncode, err) == (0, "")
    pictures = [tmp_path / "my run" / name for name in ("loss.png", "samples/step_0000002.png")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    sample_, it, python, script, *flags = shlex.split(out.splitlines()[-1])
    assert (sample_, it, python) == ("sample", "it", "python")
    monkeypatch.chdir(tmp_path)
    assert Path(script).resolve() == ROOT / "sample.py"
    made = call(sample, *flags)
    assert (made.code, made.err) == (0, "")
    assert all(Path(path).is_file() for path in made.out.split())


@pytest.mark.parametrize("backend", ["svg", "module://nowhere", None])
def test_plots_leave_the_back_end_of_a_notebook_as_it_is(monkeypatch, backend):
    """None: it stays open until somebody asks for a window."""
    monkeypatch.delenv("MPLBACKEND", raising=False)
    if backend:
        monkeypatch.setenv("MPLBACKEND", backend)
    code = """if True:
        import io, os
        from utils.pictures import plot_losses
        plot_losses(io.BytesIO(), [], [[1, 1.0], [2, 0.5]])
        import matplotlib
        chosen = dict.__getitem__(matplotlib.rcParams, "backend")
        print(os.environ.get("MPLBACKEND"), chosen if isinstance(chosen, str) else None)
    """
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (process.returncode, process.stdout.split()) == (0, [str(backend)] * 2), process.stderr


def test_a_script_of_others_that_imports_a_part_keeps_its_files_when_it_is_interrupted(tmp_path):
    (tmp_path / "mine.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom utils.data import to_uint8\n"
        "file = open('log.txt', 'w')\nfile.write('not flushed yet')\nraise KeyboardInterrupt\n")
    process = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode != 0 and "KeyboardInterrupt" in process.stderr
    assert (tmp_path / "log.txt").read_text() == "not flushed yet"


@pytest.mark.skipif(not shutil.which("head") or not hasattr(signal, "SIGHUP"), reason="another kind of shell")
def test_nohup_train_head_goes_on_to_its_end(tmp_path, eight):
    """nohup python train.py | head -n 1, whose terminal is closed after a step."""
    process = start("train.py", *FLAGS, *eight, "--max-steps", 12, "--save-every", 1, "--out", tmp_path,
                    preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    head = subprocess.run(["head", "-n", "1"], stdin=process.stdout, stdout=subprocess.PIPE, text=True)
    process.stdout.close()
    while process.poll() is None and not (tmp_path / "checkpoint.pt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    with process.stderr as file:
        assert file.read() == "" and process.wait() == 0 and head.stdout.startswith("model")
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 12 and len(metrics(tmp_path)) == 1


def test_a_stderr_that_was_closed_before_the_start_costs_no_run(tmp_path, monkeypatch):
    """python train.py 2>&-, as some who start programs in the background have it."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, FLAGS), "--max-steps", "1", "--out", str(tmp_path)])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", None)
    with contextlib.suppress(SystemExit):
        cli.run(train.main)
    if sys.stderr:  # what took its place
        sys.stderr.close()
    assert (tmp_path / "checkpoint.pt").exists() and (tmp_path / "metrics.csv").exists()


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


# ----------------------------------------------------------------------------------------------------------------------
# Places

@pytest.mark.skipif(not hasattr(os, "login_tty"), reason="no such terminals here, or Python before 3.11")
def test_a_terminal_that_closes_in_the_midst_of_a_run_loses_nothing(tmp_path, eight):
    """A real one, on which the bar is drawn until it is gone."""
    ours, theirs = os.openpty()
    command = [sys.executable, ROOT / "train.py", *FLAGS, *eight, "--report-every", 1, "--out", tmp_path]
    process = subprocess.Popen(list(map(str, command)), stdin=theirs, stdout=theirs, stderr=theirs,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=lambda: os.login_tty(0))
    try:
        os.close(theirs)
        seen = b""
        while b"validation" not in seen:
            seen += os.read(ours, 1000)
        os.close(ours)
        assert process.wait(timeout=60) == 128 + signal.SIGHUP
    finally:
        process.kill()
        process.wait()
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] >= 1 and [row["step"] for row in metrics(tmp_path)] == [
        str(row["step"]) for row in state["history"]]


def test_a_disk_that_fills_up_in_the_midst_of_a_checkpoint_is_one_line_with_its_path(tmp_path, monkeypatch):
    """So does a limit on the size of files end it."""
    resource = pytest.importorskip("resource")
    run_in(tmp_path, "--max-steps", 2)
    before, limits = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    before_step(monkeypatch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1])))
    try:
        result = call(train, *FLAGS, "--max-steps", 5, "--resume", "--out", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(result, 1, tmp_path / "checkpoint.pt", os.strerror(errno.EFBIG))
    assert contents(tmp_path) == before


OPTIMIZED = """if True:
    import json, sys
    sys.path.insert(0, "tests")
    import evaluate, sample, train
    from helpers import FLAGS, call, few_digits
    out = sys.argv[1]
    drawn = ["--checkpoint", out + "/checkpoint.pt", "--n", 2, "--steps", 2, "--device", "cpu"]
    with few_digits():
        made = [call(train, *FLAGS, "--max-steps", 2, "--out", out), call(sample, *drawn, "--gif", "--out", out),
                call(evaluate, *drawn, "--json", out + "/figures.json", "--pairs", out + "/pairs.png"),
                *[call(module, "--help") for module in (train, sample, evaluate)]]
    print(json.dumps([__debug__, [vars(result) for result in made]]))
"""


def test_all_commands_run_without_docstrings(tmp_path):
    """python -OO, which leaves assertions out as well."""
    process = subprocess.run([sys.executable, "-OO", "-W", "error", "-c", OPTIMIZED, str(tmp_path)], cwd=ROOT,
                             env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    debug, results = json.loads(process.stdout)
    assert debug is False and [(result["code"], result["err"]) for result in results] == [(0, "")] * 6
    assert {"grid.png", "process.gif", "figures.json", "pairs.png"} < {path.name for path in contents(tmp_path)}
    for result, flag in zip(results[3:], ("--resume", "--gif", "--npz")):
        assert flag in result["out"] and "None" not in result["out"]


@pytest.mark.skipif(os.name == "nt", reason="signals are others there")
@pytest.mark.parametrize("command", ["train.py", "sample.py", "evaluate.py"])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, monkeypatch, command):
    """And what else goes wrong there is told as ever."""
    fake = tmp_path / "torch.py"
    fake.write_text("import time\nprint('importing', flush=True)\ntime.sleep(20)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", f"{command}: error: interrupted\n")
    fake.write_text("raise ImportError('no such torch')\n")
    process = start(command)
    out, err = process.communicate()
    assert process.returncode == 1 and err.startswith("Traceback") and err.endswith("ImportError: no such torch\n")


def test_without_imageio_nothing_is_sampled_in_vain(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "generate", lambda *args, **kwargs: pytest.fail("it was sampled"))
    monkeypatch.setitem(sys.modules, "imageio.v3", None)
    assert_one_line(call(sample, "--out", tmp_path), 1, "imageio")


@pytest.mark.parametrize("module", ["sample", "train"])
def test_python_without_lzma_can_import_all(module):
    code = f"import sys\nsys.modules['_lzma'] = None\nimport {module}"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("command", ["train.py", "sample.py", "evaluate.py", "edit.py"])
def test_without_torch_a_line_says_how_to_get_it(command):
    """As without the environment. -S: packages that were installed are not found."""
    process = subprocess.run([sys.executable, "-S", ROOT / command], capture_output=True, text=True,
                             env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    assert process.returncode == 1 and process.stdout == "" and process.stderr.count("\n") == 1
    assert process.stderr.startswith(f"{command}: error: ") and "is not installed" in process.stderr
    assert "source .venv/bin/activate" in process.stderr and "pip install -r requirements.txt" in process.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Words

def test_a_run_that_has_no_step_left_says_so(tmp_path, clock):
    def said(*flags):
        out = call(train, *FLAGS, "--batch-size", 40, "--out", tmp_path, *flags).out
        assert ("no step left" in out) != ("done" in out.splitlines()[-2])
        return "no step left" in out and all(way in out for way in ("--resume", "--epochs", "--minutes"))

    assert not said("--epochs", 1, "--max-steps", 3)
    assert said("--resume", "--max-steps", 3) and said("--resume", "--max-steps", 2)
    assert not said("--resume") and said("--resume")
    assert said("--resume", "--minutes", 0.05) and said("--resume", "--minutes", 0.08)  # a second a step, 5 by now
    assert not said("--resume", "--minutes", 0.1)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 6


def test_without_a_terminal_there_is_a_line_a_minute(tmp_path, clock):
    clock[0] = 25
    result = call(train, *FLAGS, "--epochs", 1, "--max-steps", 13, "--report-every", 5, "--out", tmp_path)
    assert re.findall(r"(?m)^step +(\d+) +(\d+)% done$", result.out) == [
        (str(step), f"{100 * (step - 1) / 25:.0f}") for step in (3, 6, 9, 12)]


@pytest.mark.parametrize("flags", [["--minutes", 0.6], ["--epochs", 3, "--batch-size", 20]], ids=str)
def test_the_first_plot_that_a_newcomer_makes_has_lines_in_it(tmp_path, clock, flags):
    """Of a run of half a minute, a step a second, and of one of 30 steps."""
    state, rows = run_in(tmp_path, *flags), metrics(tmp_path)
    assert len(rows) >= 2 and int(rows[-1]["step"]) == state["step"] >= 30
    gap, *others = (step for step, _ in state["curve"])
    assert 20 <= 1 + len(others) < 80 and others == list(range(2 * gap, state["step"] + 1, gap))


def test_each_point_of_the_curve_is_the_mean_of_its_steps_also_across_a_resume(tmp_path, monkeypatch):
    losses, add = {}, Progress.add
    monkeypatch.setattr(Progress, "MOST_POINTS", 10)
    monkeypatch.setattr(Progress, "add", lambda progress, loss, norm: losses.update({progress.step + 1: loss.item()})
                        or add(progress, loss, norm))
    for stop in 5, 11, 14:
        curve = run_in(tmp_path, "--max-steps", stop, *["--resume"] * (stop > 5))["curve"]
        gap = 1 if stop == 5 else 2
        assert [step for step, _ in curve] == list(range(gap, stop + 1, gap))
        for step, loss in curve:
            assert loss == pytest.approx(sum(losses[k] for k in range(step - gap + 1, step + 1)) / gap)
    assert len(set(losses.values())) == 14


def test_the_shipped_model_that_is_missing_is_restored_by_git(tmp_path, monkeypatch):
    """Nobody who left --checkpoint out is told to leave it out."""
    for module in settings, checkpoint:
        monkeypatch.setattr(module, "SHIPPED", tmp_path.resolve() / "mnist.pt")
    monkeypatch.chdir(tmp_path)
    for result in call(sample), call(evaluate), call(sample, "--checkpoint", tmp_path / "mnist.pt"):
        assert_one_line(result, 1, "mnist.pt", "git checkout")
        assert "without --checkpoint" not in result.err
    assert_one_line(call(sample, "--checkpoint", "other.pt"), 1, "other.pt", "train.py", "without --checkpoint")


# ----------------------------------------------------------------------------------------------------------------------
# Memory

@pytest.mark.parametrize("batch_size", [1, 3, 150])
def test_the_network_never_sees_more_images_at_once_than_in_a_step(tmp_path, monkeypatch, batch_size):
    """Neither in a report nor before the first step: memory that is enough for training is enough."""
    sizes, forward = [], UNet.forward
    monkeypatch.setattr(train, "draw", sample.draw)
    monkeypatch.setattr(UNet, "forward", lambda network, x_t, *of: sizes.append(len(x_t)) or forward(network, x_t, *of))
    run_in(tmp_path, "--batch-size", batch_size, "--timesteps", 2, "--max-steps", 1)
    assert max(sizes) == batch_size and sum(sizes) >= batch_size + 40 + 2 * 64


def test_a_clock_may_stand_still_in_a_step(tmp_path, monkeypatch):
    """As that of Windows does for 16 ms at a time. The run can be saved just after a report, and go on."""
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    for flags in ["--max-steps", 2, "--report-every", 1], ["--max-steps", 3, "--resume", "--report-every", 100], \
            ["--max-steps", 4, "--resume"]:
        result = call(train, *FLAGS, "--out", tmp_path, *flags)
        assert result.code == 0, result.err
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4
