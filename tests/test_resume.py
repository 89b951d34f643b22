"""A run that was interrupted, however it was, ends as one that was not; what no run can have saved is refused; and what
is in a folder already is not lost unasked."""
import math
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import diffusion_model
import train
from diffusion_model import build_network
from helpers import (FLAGS, N, NETWORK, ROOT, assert_one_line, before_step, call, contents, crash, few_digits, metrics,
                     run_in, same, start)
from utils import checkpoint
from utils.checkpoint import Progress, load_checkpoint, load_model, restore_optimizers, save_checkpoint
from utils.export import for_sampling
from utils.files import lock_folder
from utils.muon import make_optimizers
from utils.settings import SETTINGS

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def quick():
    with few_digits(), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train, "EARLY_IMAGES", 7 * 16)  # of the runs below: 16 steps
        monkeypatch.setattr(Progress, "MOST_POINTS", 20)  # of the curve: after 20 steps of them
        yield


# ----------------------------------------------------------------------------------------------------------------------
# As if nothing had happened

# 32 steps of 7 images: more than an epoch of 28.6 steps, so that one batch spans two.
LENGTH = ["--batch-size", 7, "--epochs", 2, "--report-every", 8]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, quick):
    """The uninterrupted run that the others are compared with: its folder and its checkpoint."""
    out = tmp_path_factory.mktemp("straight")
    return out, run_in(out, *LENGTH, "--max-steps", 32)


def test_what_the_average_was_early_is_kept(tmp_path, monkeypatch):
    """After the first batch that ends at so many images, or beyond; in a shorter run there is none."""
    monkeypatch.setattr(train, "EARLY_IMAGES", 9)  # two batches of eight
    last = ["--batch-size", 8, "--max-steps"]
    first, second, fourth = (run_in(tmp_path / str(n), *last, n) for n in (1, 2, 4))
    assert first["early"] is None
    assert same(second["early"], second["ema"]) and same(fourth["early"], second["ema"])
    assert not same(fourth["early"], fourth["ema"])


@pytest.mark.parametrize("stops", [[1], [16], [30], [5, 6, 26], [31]])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, straight, stops):
    for flags in [["--max-steps", stop] for stop in stops] + [["--max-steps", 32]]:
        state = run_in(tmp_path, *LENGTH, *flags, *["--resume"] * (tmp_path / "checkpoint.pt").exists())
    out, expected = straight
    assert state["step"] == 32
    for name in "model", "ema", "early", "optimizer", "lr", "history", "since_report", "curve", "settings":
        assert same(state[name], expected[name]), name
    assert same(metrics(tmp_path), metrics(out))


@pytest.mark.parametrize("save_every, step", [(12, 18), (12, 24), (7, 30)])
def test_a_crash_between_saves_changes_nothing(tmp_path, monkeypatch, straight, save_every, step):
    """What was reported after the last save is done again, and stands in metrics.csv once."""
    before_step(monkeypatch, step, crash)
    result = call(train, *FLAGS, *LENGTH, "--max-steps", 32, "--save-every", save_every, "--out", tmp_path)
    assert_one_line(result, 1, "crash")
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == step // save_every * save_every
    assert same(run_in(tmp_path, *LENGTH, "--max-steps", 32, "--resume"), straight[1])
    assert [int(row["step"]) for row in metrics(tmp_path)] == [8, 16, 24, 32]
    assert same(metrics(tmp_path), metrics(straight[0]))


@pytest.mark.parametrize("step", [2, 4])
def test_a_crash_between_a_save_and_its_report_loses_no_report(tmp_path, monkeypatch, step):
    """It is written when the run goes on, even if nothing is left to train."""
    flags, report = ["--max-steps", 4, "--report-every", 2, "--save-every", 2], train.report
    expected = run_in(tmp_path / "straight", *flags)
    with monkeypatch.context() as patch:
        patch.setattr(train, "report", lambda out, progress, *args: crash() if progress.step == step
                      else report(out, progress, *args))
        assert_one_line(call(train, *FLAGS, *flags, "--out", tmp_path / "run"), 1, "crash")
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == step
    assert same(run_in(tmp_path / "run", *flags, "--resume"), expected)
    assert same(metrics(tmp_path / "run"), metrics(tmp_path / "straight"))
    assert [{str(path.relative_to(tmp_path / name)) for path in contents(tmp_path / name)}
            for name in ("run", "straight")] == [{"checkpoint.pt", "loss.png", "metrics.csv", "settings.json",
                                                  "samples/step_0000002.png", "samples/step_0000004.png"}] * 2


def test_a_run_that_was_killed_before_its_first_save_is_not_said_to_go_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        before_step(patch, 3, crash)
        assert call(train, *FLAGS, "--max-steps", 8, "--report-every", 2, "--out", tmp_path).code == 1
    assert metrics(tmp_path) and not (tmp_path / "checkpoint.pt").exists()
    result = call(train, *FLAGS, "--max-steps", 8, "--out", tmp_path)
    assert_one_line(result, 1, "already holds a run", "--overwrite")
    assert "--resume" not in result.err
    run_in(tmp_path, "--max-steps", 1, "--overwrite")
    assert_one_line(call(train, *FLAGS, "--max-steps", 8, "--out", tmp_path), 1, "continue it with --resume")


def test_a_run_begins_with_the_weights_of_its_seed(tmp_path):
    for seed in 0, 3:
        state = run_in(tmp_path / str(seed), "--max-steps", 1, "--lr", 1e-9, "--seed", seed)
        torch.manual_seed(seed)
        for name, value in build_network(state["settings"]).state_dict().items():
            torch.testing.assert_close(state["model"][name], value, rtol=0, atol=1e-6)


def test_another_seed_is_another_run(tmp_path, straight):
    """The control: the comparison can tell runs apart."""
    state = run_in(tmp_path, *LENGTH, "--max-steps", 32, "--seed", 1)
    for name in "model", "ema", "optimizer", "history":
        assert not same(state[name], straight[1][name])


def test_resuming_a_finished_run_does_nothing_to_it(tmp_path):
    state, rows = run_in(tmp_path, "--max-steps", 6), metrics(tmp_path)
    for steps in 6, 3:
        assert same(run_in(tmp_path, "--max-steps", steps, "--resume"), state)
        assert same(metrics(tmp_path), rows) and [row["step"] for row in rows] == ["6"]


def test_a_signal_during_the_last_report_comes_too_late_to_stop_the_run(tmp_path, monkeypatch):
    report = train.report
    monkeypatch.setattr(train, "report", lambda *args: [signal.raise_signal(signal.SIGINT), report(*args)])
    result = call(train, *FLAGS, "--max-steps", 3, "--report-every", 5, "--out", tmp_path)
    assert result.code == 0 and "done" in result.out, result.err


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_stopped_run_saves_and_says_how_to_go_on(tmp_path, monkeypatch, straight, name, code):
    if not hasattr(signal, name):
        pytest.skip(f"there is no {name} here")
    before_step(monkeypatch, 13, lambda: signal.raise_signal(getattr(signal, name)))
    handlers = [signal.getsignal(each) for each in signal.valid_signals()]
    result = call(train, *FLAGS, *LENGTH, "--max-steps", 32, "--out", tmp_path)
    assert result.code == code and result.err.count("\n") == 1
    assert [signal.getsignal(each) for each in signal.valid_signals()] == handlers
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 14  # the step was finished
    assert [int(row["step"]) for row in metrics(tmp_path)] == [8]  # no report that the run would not have had
    said, _, command = result.err.partition("Go on with: ")
    assert "stopped at step 14" in said
    python, script, *flags = shlex.split(command)
    assert (python, script) == ("python", "train.py")
    assert call(train, *flags).code == 0
    assert same(load_checkpoint(tmp_path / "checkpoint.pt"), straight[1])


def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has a job in its background ignore it
    before_step(monkeypatch, 7, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    result = call(train, *FLAGS, "--max-steps", 20, "--save-every", 5, "--out", tmp_path)
    assert result.code == 130 and result.err.count("\n") == 1 and "Traceback" not in result.err
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 5


def test_the_command_itself_stopped_by_sigterm(tmp_path):
    """As a process of its own, on all of MNIST."""
    process = start("train.py", *FLAGS, "--save-every", 1, "--data", ROOT / "data", "--out", tmp_path / "run")
    try:
        until = time.monotonic() + 900
        while not (tmp_path / "run" / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert "60,000 of MNIST" in out and err.count("\n") == 1 and "--resume" in err
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] >= 1


# ----------------------------------------------------------------------------------------------------------------------
# Runs of other kinds

def as_version_1(state):
    """The checkpoint as the first version of the format had it."""
    since = state["since_report"]
    state = {**state, "version": 1, "recent": since | {"sums": since["sums"][:2]}, "settings": dict(state["settings"])}
    del state["since_report"], state["lr"], state["curve"]
    for name in "model", "ema":
        state[name] = {key.replace("downsample", "shrink").replace("upsample", "grow"): value
                       for key, value in state[name].items()}
    return state


def test_a_run_with_the_defaults_of_before_goes_on(tmp_path):
    """Until 2026-11-26: in such a run Muon has the matrices by which time and label scale and shift."""
    flags = [*LENGTH, "--network", "unet", "--schedule", "linear", "--weighting", "v"]
    expected = run_in(tmp_path / "straight", *flags, "--max-steps", 9)
    run_in(tmp_path, *flags, "--max-steps", 4)
    resumed = run_in(tmp_path, *flags, "--resume", "--max-steps", 9)
    assert same(resumed["model"], expected["model"]) and same(resumed["optimizer"], expected["optimizer"])
    shapes = [entry["momentum"].shape for entry in expected["optimizer"][1]["state"].values()]
    assert shapes.count(expected["model"]["middle.0.scale_shift.weight"].shape) == 1


def test_a_run_of_the_first_version_goes_on(tmp_path, straight):
    """To the same weights and reports. Its curve begins with what was reported."""
    path = tmp_path / "checkpoint.pt"
    state = run_in(tmp_path, *LENGTH, "--max-steps", 27)
    weights = load_model(path).network.state_dict()
    old = as_version_1(state)
    assert {"unet.shrink.weight", "unet.grow.weight", "unet.grow.bias"} < old["model"].keys()
    assert old["recent"]["steps"] == 3
    torch.save(old, path)
    assert same(load_model(path).network.state_dict(), weights)
    resumed = run_in(tmp_path, *LENGTH, "--max-steps", 32, "--resume")
    for name in "model", "ema", "optimizer", "lr", "history", "settings":
        assert same(resumed[name], straight[1][name]), name
    assert same(metrics(tmp_path), metrics(straight[0])) and resumed["version"] == 2
    assert resumed["curve"][:3] == [[row["step"], row["train_loss"]] for row in straight[1]["history"][:3]]


def adamw_of_two_rates(network, settings):
    biases = [p for p in network.parameters() if p.ndim == 1]
    others = [p for p in network.parameters() if p.ndim != 1]
    return [torch.optim.AdamW([{"params": biases, "lr": 3 * settings["lr"]}, {"params": others}], lr=settings["lr"])]


def sgd_with_momentum(network, settings):
    return [torch.optim.SGD(network.parameters(), lr=settings["lr"], momentum=0.9)]


def adam_whose_rate_is_a_tensor(network, settings):
    return [torch.optim.Adam(network.parameters(), lr=torch.tensor(settings["lr"]))]


@pytest.mark.parametrize("build, rates, moments", [
    (make_optimizers, [1], {"step", "exp_avg", "exp_avg_sq"}),
    (adamw_of_two_rates, [3, 1], {"step", "exp_avg", "exp_avg_sq"}), (sgd_with_momentum, [1], {"momentum_buffer"}),
    (adam_whose_rate_is_a_tensor, [1], {"step", "exp_avg", "exp_avg_sq"}),
], ids=lambda value: getattr(value, "__name__", ""))
def test_any_optimizer_resumes_exactly(tmp_path, monkeypatch, build, rates, moments):
    """--optimizer adamw, and others that somebody builds in place of make_optimizers. Each group keeps its share of the
    learning rate, and each weight its moments."""
    built = []
    monkeypatch.setattr(train, "make_optimizers", lambda *args: built.extend(build(*args)) or built[-1:])
    flags = ["--epochs", 1, "--optimizer", "adamw"]
    expected = run_in(tmp_path / "straight", *flags, "--max-steps", 6)
    stopped = run_in(tmp_path, *flags, "--max-steps", 4)
    resumed = run_in(tmp_path, *flags, "--max-steps", 6, "--resume")
    assert same(resumed, expected) and not same(resumed["model"], stopped["model"])
    assert len(built) == 3
    for optimizer, step in zip(built, [5, 3, 5]):
        lr = 2e-3 * (1 + math.cos(math.pi * step / math.ceil(N / 8))) / 2  # of the last step; the warm-up took 4
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate * lr for rate in rates])
    for state in stopped, resumed:
        entries, = (optimizer["state"] for optimizer in state["optimizer"])
        assert len(entries) == len(state["model"]) and all(entry.keys() == moments for entry in entries.values())


class BatchNormNet(nn.Module):
    """A network with buffers: a BatchNorm's, and the number of batches it was trained on."""

    def __init__(self, image_size, image_channels, classes, width, depth):
        super().__init__()
        self.first, self.norm = nn.Conv2d(image_channels, width, 3, padding=1), nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, image_channels, 3, padding=1)
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, x_t, t, labels=None):
        self.batches += self.training
        return self.last(torch.relu(self.norm(self.first(x_t))))


def test_another_network_with_buffers_trains_and_resumes_exactly(tmp_path, monkeypatch):
    """One that is a row of NETWORKS, and so a choice of --network. The moving average has the buffers of the last
    step."""
    monkeypatch.setitem(diffusion_model.NETWORKS, "batchnorm", BatchNormNet)
    monkeypatch.setitem(SETTINGS, "network", SETTINGS["network"]._replace(kind=("unet", "batchnorm")))
    expected = run_in(tmp_path / "straight", "--network", "batchnorm", "--max-steps", 8)
    run_in(tmp_path, "--network", "batchnorm", "--max-steps", 5)
    resumed = run_in(tmp_path, "--max-steps", 8, "--resume")
    assert same(resumed, expected) and resumed["settings"]["network"] == "batchnorm"
    buffers = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "batches"}
    average, raw = (load_model(tmp_path / "checkpoint.pt", ema=ema).network for ema in (True, False))
    assert isinstance(average, BatchNormNet) and not average.training
    for network, saved in (average, resumed["ema"]), (raw, resumed["model"]):
        assert same(dict(network.state_dict()), saved)
        assert network.batches.dtype == torch.long and network.batches == network.norm.num_batches_tracked == 8
    for name in resumed["ema"]:
        assert same(resumed["ema"][name], resumed["model"][name]) == (name in buffers), name


def test_an_optimizer_that_could_not_be_saved_is_refused_before_anything_is_lost(tmp_path, monkeypatch):
    class Keeper(torch.optim.SGD):
        """Keeps what no checkpoint can hold."""

        def step(self):
            super().step()
            self.state[self.param_groups[0]["params"][0]]["steps"] = {1, 2}

    run_in(tmp_path, "--max-steps", 2)
    before = contents(tmp_path)
    monkeypatch.setattr(train, "make_optimizers", lambda network, settings: [Keeper(network.parameters(), lr=0.01)])
    result = call(train, *FLAGS, "--max-steps", 5, "--overwrite", "--out", tmp_path)
    assert_one_line(result, 1, "a checkpoint cannot hold", "steps", "set")
    assert contents(tmp_path) == before


# ----------------------------------------------------------------------------------------------------------------------
# Settings of a run that goes on

def test_another_setting_is_refused_on_resume(tmp_path, monkeypatch):
    run_in(tmp_path, "--max-steps", 2)
    monkeypatch.setattr(train, "train", lambda *args: None)
    saved = (tmp_path / "checkpoint.pt").read_bytes()
    for flag, value, old in [("--lr", 0.01, 0.005), ("--seed", 3, 0), ("--width", 16, 8), ("--batch-size", 9, 8),
                             ("--schedule", "cosine", "logsnr"), ("--dataset", "KMNIST", "MNIST"),
                             ("--ema", 0.5, 0.999)]:
        result = call(train, *FLAGS, "--resume", "--out", tmp_path, flag, value)
        assert_one_line(result, 1, flag, value, old, "--out")
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved


def test_length_and_reports_may_change_on_resume(tmp_path):
    run_in(tmp_path, "--max-steps", 2, "--epochs", 1)
    state = run_in(tmp_path, "--resume", "--max-steps", 4, "--epochs", 3, "--report-every", 4)
    assert state["step"] == 4 and (state["settings"]["epochs"], state["settings"]["report_every"]) == (3, 4)
    # and the learning rate follows the new length, 75 steps
    assert float(metrics(tmp_path)[-1]["lr"]) == pytest.approx(5e-3 * (1 + math.cos(math.pi * 3 / 75)) / 2)


def test_a_run_that_is_shortened_ends_where_it_is(tmp_path):
    """At a learning rate that it had, and not at one that a run of the new length would have come to."""
    before, rows = run_in(tmp_path, "--max-steps", 40), metrics(tmp_path)
    state = run_in(tmp_path, "--resume", "--epochs", 1)
    assert state["step"] == 40 and same(state["model"], before["model"])
    assert same(metrics(tmp_path), rows) and float(rows[-1]["lr"]) > 4e-3


def test_a_run_of_minutes_may_go_on_by_epochs(tmp_path, monkeypatch):
    before_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
    assert call(train, *FLAGS, "--minutes", 0.1, "--out", tmp_path).code == 143
    state = run_in(tmp_path, "--resume", "--epochs", 1)
    assert state["step"] == math.ceil(N / 8) and state["settings"]["minutes"] is None


def test_resume_takes_its_settings_from_the_checkpoint(tmp_path):
    settings = run_in(tmp_path, "--max-steps", 2, "--lr", 0.01)["settings"]
    result = call(train, "--resume", "--max-steps", 3, "--out", tmp_path)
    assert result.code == 0 and load_checkpoint(tmp_path / "checkpoint.pt")["settings"] == settings


def test_what_auto_was_decided_to_stays_so(tmp_path):
    """The command that is printed to go on has the flags of the run, --precision auto perhaps."""
    decided = run_in(tmp_path, "--max-steps", 1, "--precision", "auto")["settings"]["precision"]
    other = {"bf16": "fp32", "fp32": "bf16"}[decided]
    assert run_in(tmp_path, "--max-steps", 2, "--precision", "auto", "--resume")["settings"]["precision"] == decided
    flags = ["--precision", other, "--resume", "--max-steps", 2, "--out", tmp_path]
    assert_one_line(call(train, *FLAGS, *flags), 1, "--precision", decided)


# ----------------------------------------------------------------------------------------------------------------------
# What is in the folder already

def test_a_run_is_not_overwritten_unasked(tmp_path):
    run_in(tmp_path, "--max-steps", 3)
    before = contents(tmp_path)
    assert_one_line(call(train, *FLAGS, "--max-steps", 3, "--out", tmp_path), 1, "--resume", "--overwrite", tmp_path)
    assert contents(tmp_path) == before
    assert run_in(tmp_path, "--max-steps", 2, "--overwrite")["step"] == 2
    # No report of the old run is taken for one of the new.
    assert [row["step"] for row in metrics(tmp_path)] == ["2"]
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_0000002.png"]


def test_a_run_does_not_overwrite_the_checkpoint_that_it_begins_with(tmp_path):
    """By whatever name. One that is put aside is in nobody's way, wherever it lies."""
    run_in(tmp_path, "--max-steps", 2)
    checkpoint, aside = tmp_path / "checkpoint.pt", tmp_path / "aside.pt"
    os.symlink(checkpoint, tmp_path / "link.pt")
    before = contents(tmp_path)
    for name in "checkpoint.pt", "samples/../checkpoint.pt", "link.pt":
        result = call(train, *FLAGS, "--init", tmp_path / name, "--overwrite", "--out", tmp_path)
        assert_one_line(result, 2, "--overwrite", "--init", tmp_path / name, "--out")
        assert contents(tmp_path) == before
    os.link(checkpoint, aside)
    assert run_in(tmp_path, "--init", aside, "--overwrite", "--max-steps", 1)["step"] == 1
    assert aside.read_bytes() == before[checkpoint]


@pytest.mark.parametrize("name", ["metrics.csv", "loss.png", "samples/step_0000007.png"])
def test_what_is_left_of_a_run_without_its_checkpoint_is_not_overwritten_unasked(tmp_path, name):
    """Of one whose checkpoint was moved elsewhere, say. What no run writes is in nobody's way, and stays."""
    (tmp_path / "samples").mkdir()
    others = [tmp_path / "notes.txt", tmp_path / "samples" / "best.png"]
    for path in [*others, tmp_path / name]:
        path.write_text("of long ago")
    before = contents(tmp_path)
    result = call(train, *FLAGS, "--max-steps", 1, "--out", tmp_path)
    assert_one_line(result, 1, "--overwrite", tmp_path)
    assert contents(tmp_path) == before and len(before) == 3
    run_in(tmp_path, "--max-steps", 1, "--overwrite")
    assert all(path.read_text() == "of long ago" for path in others)
    assert contents(tmp_path).get(tmp_path / name) != b"of long ago"
    (tmp_path / "other").mkdir()
    for path in others:
        path.rename(tmp_path / "other" / path.name)
    run_in(tmp_path / "other", "--max-steps", 1)


def test_a_run_that_another_process_made_just_now_is_not_overwritten(tmp_path, monkeypatch):
    """Between this one's first look and its lock."""
    lock = checkpoint.lock_folder

    def locked(out):
        (out / "checkpoint.pt").write_bytes(b"another's")
        return lock(out)

    monkeypatch.setattr(checkpoint, "lock_folder", locked)
    assert_one_line(call(train, *FLAGS, "--max-steps", 3, "--out", tmp_path), 1, "--overwrite")
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"another's"


def test_an_overwritten_run_does_not_come_back(tmp_path, monkeypatch):
    """Not even if the new one is killed before it has saved anything."""
    run_in(tmp_path, "--max-steps", 3)
    before_step(monkeypatch, 1, crash)
    assert call(train, *FLAGS, "--max-steps", 3, "--overwrite", "--width", 16, "--out", tmp_path).code == 1
    assert_one_line(call(train, "--resume", "--out", tmp_path), 1, "no checkpoint at")


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, ConnectionError])
def test_a_run_is_kept_until_the_one_that_overwrites_it_has_made_a_step(tmp_path, monkeypatch, error):
    """A compiler may be missing, a batch not fit into memory, and of several processes another may notice it first."""
    def fail():
        raise error("in the first step")

    run_in(tmp_path, "--max-steps", 3)
    before = contents(tmp_path)
    before_step(monkeypatch, 0, fail)
    assert call(train, *FLAGS, "--max-steps", 3, "--overwrite", "--width", 16, "--out", tmp_path).code == 1
    assert contents(tmp_path) == before


LOCKING = """
import fcntl, sys
files = [open(path, "wb") for path in sys.argv[1:]]
for file in files:
    fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.name == "nt", reason="there are no such locks here")
def test_what_a_killed_run_left_half_written_goes_when_the_folder_is_used_again(tmp_path):
    """Temporary files, that is, that nobody has locked: a process that lives has its own."""
    samples = tmp_path / "samples"
    samples.mkdir()
    left = [tmp_path / ".metrics.csv.0123abcd.tmp", tmp_path / ".checkpoint.pt.4567cdef.tmp",
            samples / ".step_0000007.png.89abcdef.tmp"]
    living = [tmp_path / ".metrics.csv.00000001.tmp", tmp_path / ".checkpoint.pt.00000002.tmp",
              samples / ".step_0000009.png.00000003.tmp"]
    strangers = [samples / ".a.0123abcd.tmp", tmp_path / ".a.0123abcd.tmp"]
    for path in left + strangers:
        path.write_bytes(b"half")
    other = subprocess.Popen([sys.executable, "-c", LOCKING, *map(str, living)], text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == "locked\n"
        run_in(tmp_path, "--max-steps", 1)
        assert all(path.exists() for path in living + strangers) and not any(path.exists() for path in left)
    finally:
        other.kill()
        other.communicate()
    run_in(tmp_path, "--max-steps", 2, "--resume")
    assert not any(path.exists() for path in living) and all(path.exists() for path in strangers)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with lock_folder(tmp_path):
        assert_one_line(call(train, *FLAGS, "--max-steps", 2, "--out", tmp_path), 1, "another run", tmp_path)
    run_in(tmp_path, "--max-steps", 2)


def test_resume_without_a_run_says_so(tmp_path):
    out = tmp_path / "typing error"
    assert_one_line(call(train, *FLAGS, "--resume", "--out", out), 1, "no checkpoint at", out)
    assert not out.exists()


# ----------------------------------------------------------------------------------------------------------------------
# What no run can have saved

def test_a_checkpoint_for_sampling_only_says_so(tmp_path):
    run_in(tmp_path, "--max-steps", 2)
    for_sampling(tmp_path / "checkpoint.pt", tmp_path / "checkpoint.pt")
    assert_one_line(call(train, "--resume", "--out", tmp_path), 1, "for sampling only")


@pytest.mark.parametrize("change", [
    {"settings": {"lr": math.nan}}, {"settings": {"lr": "0.002"}}, {"settings": {"batch_size": 0}},
    {"settings": {"batch_size": 10**12}}, {"settings": {"dataset": "../x"}}, {"settings": {"seed": -1}},
    {"settings": {"ema": None}}, {"settings": {"precision": "int4"}}, {"settings": {"report_every": 1.5}},
    {"settings": {"network": "unet3"}}, {"settings": {"network": None}},
    {"step": "4"}, {"step": -3}, {"lr": None}, {"since_report": {}}, {"optimizer": {}}, {"optimizer": None},
    {"model": {}}, {"model": None}, {"ema": None},
    {"history": None},
], ids=str)
def test_a_hostile_checkpoint_is_one_line(tmp_path, saved, change):
    state = dict(saved)
    for name, value in change.items():
        state[name] = state[name] | value if name == "settings" else value
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    content = (tmp_path / "checkpoint.pt").read_bytes()
    assert_one_line(call(train, "--resume", "--max-steps", 4, "--out", tmp_path), 1)
    assert (tmp_path / "checkpoint.pt").read_bytes() == content


@pytest.fixture(scope="module")
def saved(tmp_path_factory, quick):
    """What a run of two steps saves, and would go on from."""
    out = tmp_path_factory.mktemp("saved")
    state = run_in(out, "--max-steps", 2)
    assert run_in(out, "--max-steps", 4, "--resume")["step"] == 4
    return state


@pytest.mark.parametrize("change", [
    {"step": -3}, {"step": 2.0}, {"step": 0}, {"step": 10**13}, {"seconds": -1.0}, {"lr": -1.0}, {"lr": math.nan},
    {"lr": "0.1"}, {"history": [{"step": 1}]}, {"since_report": {"steps": 3}}, {"since_report": {"seconds": 0.0}},
    {"since_report": {"sums": [1.0, 1.0]}}, {"since_report": {"sums": [1.0, "1.0", 1.0]}},
    {"since_report": {"sums": [math.nan, 1.0, 1.0]}}, {"since_report": {"sums": [1.0, 1.0, -1.0]}},
    {"curve": None}, {"curve": [1, 0.5]}, {"curve": [[1]]}, {"curve": [[0, 0.5]]}, {"curve": [[5, 0.5]]},
    {"curve": [[1, math.nan]]}, {"curve": [["1", 0.5]]}, {"curve": [[1, 0.5]] * 20},
], ids=lambda change: str(change)[:60])
def test_progress_that_no_run_makes_is_refused(change):
    state = {"step": 4, "seconds": 1.5, "lr": 0.01, "history": [], "curve": [[2, 0.5], [4, 0.25]],
             "since_report": {"steps": 4, "seconds": 1.5, "sums": [0.5, 2.0, 0.0]}}
    progress = Progress(CPU)
    progress.load_state_dict("c.pt", state)
    assert progress.state_dict() == state
    for name, value in change.items():
        state[name] = state[name] | value if name == "since_report" else value
    with pytest.raises(ValueError, match="^c.pt: "):
        Progress(CPU).load_state_dict("c.pt", state)


@pytest.mark.parametrize("change", [
    lambda adamw, muon: [adamw], lambda adamw, muon: [muon, adamw], lambda adamw, muon: [adamw, {}],
    lambda adamw, muon: [{"state": {i: adamw["state"][i] for i in list(adamw["state"])[:-1]}}, muon],
    lambda adamw, muon: [adamw, {"state": {i: m | {"exp_avg": m["momentum"]} for i, m in muon["state"].items()}}],
    lambda adamw, muon: [{"state": {i: {"exp_avg": m["exp_avg"]} for i, m in adamw["state"].items()}}, muon],
    lambda adamw, muon: [{"state": {i: m | {"exp_avg_sq": m["exp_avg_sq"] - 1} for i, m in adamw["state"].items()}},
                         muon],
    lambda adamw, muon: [{"state": {i: m | {"step": m["step"] - 9} for i, m in adamw["state"].items()}}, muon],
], ids=["one optimizer", "the other way round", "none of one", "a weight without", "more than there are",
        "fewer than there are", "negative squares", "before the first step"])
def test_moments_that_are_not_the_networks_are_refused(change):
    settings = NETWORK | {"optimizer": "muon", "lr": 0.01, "weight_decay": 0.0}
    network = build_network(settings)
    optimizers = make_optimizers(network, settings)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    states = [optimizer.state_dict() for optimizer in optimizers]
    restore_optimizers("c.pt", optimizers, states, 1, network, settings)
    assert same([optimizer.state_dict() for optimizer in optimizers], states)
    with pytest.raises(ValueError, match="^c.pt: "):
        restore_optimizers("c.pt", optimizers, change(*states), 1, network, settings)
