"""What a run says of itself: metrics, the curve of its loss, grids, lines on the terminal; and a report never costs a
run."""
import errno
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch

import train
from ddpm import DDPM
from diffusion_model import build_network
from diffusion_schedules import make_betas
from helpers import FLAGS, N, ROOT, before_step, call, contents, crash, few_digits, metrics, run_in
from sample import draw
from utils import pictures
from utils.checkpoint import COLUMNS, Progress, load_checkpoint, load_model
from utils.data import load_dataset
from utils.metrics import Validation
from utils.pictures import make_grid, upscale
from utils.settings import SETTINGS

CPU = torch.device("cpu")
SAMPLE = f"python {os.path.relpath(ROOT / 'sample.py')}"
PLOT = pictures.plot_losses


@pytest.fixture(scope="module", autouse=True)
def quick():
    with few_digits():
        yield


@pytest.fixture
def full_reports(monkeypatch):
    monkeypatch.setattr(pictures, "plot_losses", PLOT)
    monkeypatch.setattr(train, "draw", draw)


# ----------------------------------------------------------------------------------------------------------------------
# The figures

def test_the_metrics_are_what_they_are_called(tmp_path, clock):
    run_in(tmp_path / "one", "--max-steps", 8, "--report-every", 1)
    state = run_in(tmp_path / "four", "--max-steps", 10, "--report-every", 4)
    ones, fours = metrics(tmp_path / "one"), metrics(tmp_path / "four")
    assert list(fours[0]) == list(COLUMNS) == [
        "step", "epoch", "train_loss", "validation_loss", "validation_loss_q1", "validation_loss_q2",
        "validation_loss_q3", "validation_loss_q4", "lr", "grad_norm", "images_per_second", "seconds"]
    assert [row["step"] for row in fours] == ["4", "8", "10"]
    assert [float(row["images_per_second"]) for row in fours] == pytest.approx([8 / 0.04] * 3)
    assert [float(row["seconds"]) for row in fours] == pytest.approx([0.16, 0.32, 0.4])
    for k, row in enumerate(fours[:2]):
        part = ones[4 * k:4 * k + 4]
        for name in "train_loss", "grad_norm":  # means since the last report
            assert float(row[name]) == pytest.approx(sum(float(one[name]) for one in part) / 4)
        for name in "validation_loss", "lr", "epoch":  # as they are now
            assert row[name] == part[-1][name]
        quarters = [float(row[f"validation_loss_q{i}"]) for i in range(1, 5)]
        assert float(row["validation_loss"]) == pytest.approx(sum(quarters) / 4)
        assert float(row["epoch"]) == pytest.approx(int(row["step"]) * 8 / N)
    assert [row["step"] for row in state["history"]] == [4, 8]  # the last one is no part of an uninterrupted run


def test_a_run_reports_at_half_time_and_at_its_end_at_least(tmp_path, clock):
    """However rare --report-every has it: there is something to look at."""
    for flags, steps in [(["--epochs", 1, "--batch-size", 40], ["3", "5"]),
                         (["--epochs", 1, "--batch-size", 40, "--report-every", 2], ["2", "4", "5"]),
                         (["--epochs", 1, "--batch-size", 50, "--report-every", 1000], ["2", "4"]),
                         (["--minutes", 0.0119], ["9", "18"])]:  # of 17.85 steps, by the clock
        out = tmp_path / "-".join(steps)
        run_in(out, *flags)
        assert [row["step"] for row in metrics(out)] == steps


def test_a_report_after_a_resume_has_the_rate_of_the_last_step(tmp_path):
    """Also if no step was made since: the run was killed before its last report."""
    run_in(tmp_path, "--max-steps", 5, "--epochs", 20)
    reported = metrics(tmp_path)
    (tmp_path / "metrics.csv").unlink()
    run_in(tmp_path, "--max-steps", 5, "--resume")
    lr = 5e-3 * (1 + math.cos(math.pi * 4 / math.ceil(20 * N / 8))) / 2
    assert [float(row["lr"]) for row in metrics(tmp_path)] == [float(row["lr"]) for row in reported] == [
        pytest.approx(lr)]


def test_by_default_the_rate_rises_for_50_steps(tmp_path):
    flags = ["--width", 8, "--depth", 1, "--timesteps", 20, "--device", "cpu", "--report-every", 1, "--max-steps", 3,
             "--epochs", 20]
    assert call(train, *flags, "--out", tmp_path).code == 0
    rates, total = [float(row["lr"]) for row in metrics(tmp_path)], math.ceil(20 * N / 128)
    assert rates == pytest.approx([5e-3 * (k + 1) / 50 * (1 + math.cos(math.pi * k / total)) / 2 for k in range(3)])


@pytest.mark.parametrize("steps, points", [(1, 1), (79, 79), (80, 40), (1000, 62)])
def test_the_curve_of_the_training_loss_in_a_run_of_any_length(steps, points):
    """Evenly spaced points, each the mean since the one before, over reports away."""
    progress = Progress(CPU)
    losses = [math.sin(step) + 2 for step in range(steps)]
    for step, loss in enumerate(losses):
        progress.add(torch.tensor(loss, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
        progress.advance()
        if step % 7 == 6:
            progress.since_report["seconds"] = 1.0
            progress.report([1.0] * 4, 8, N)
    (gap, _), *_ = progress.curve
    assert len(progress.curve) == points
    for k, (step, loss) in enumerate(progress.curve):
        assert step == gap * (k + 1) and loss == pytest.approx(sum(losses[step - gap:step]) / gap)


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


@pytest.mark.parametrize("flags", [["--minutes", 0.6], ["--epochs", 3, "--batch-size", 20]], ids=str)
def test_the_first_plot_that_a_newcomer_makes_has_lines_in_it(tmp_path, clock, flags):
    """Of a run of half a minute, a step a second, and of one of 30 steps."""
    clock.step = 1
    state, rows = run_in(tmp_path, *flags), metrics(tmp_path)
    assert len(rows) >= 2 and int(rows[-1]["step"]) == state["step"] >= 30
    gap, *others = (step for step, _ in state["curve"])
    assert 20 <= 1 + len(others) < 80 and others == list(range(2 * gap, state["step"] + 1, gap))


# ----------------------------------------------------------------------------------------------------------------------
# What is judged

def test_validation_is_the_same_each_time_and_sorted_by_noise():
    settings = {"dataset": "MNIST", "timesteps": 1000, "classes": 10, "label_dropout": 0.9, "batch_size": 64,
                "image_size": 28, "image_channels": 1}
    validation = Validation(settings, "data", CPU)
    asked = []

    def model(x_t, t, labels):
        assert not torch.is_grad_enabled()
        asked.append((x_t, t, labels))
        return x_t * (t >= 500).view(-1, 1, 1, 1)

    model.ddpm = DDPM(make_betas("linear", 1000))
    state = torch.get_rng_state()
    losses = validation.losses(model)
    assert losses == validation.losses(model) and torch.equal(torch.get_rng_state(), state)
    x_t, t, labels = asked[0]
    assert x_t[0].median() == pytest.approx(-1, abs=0.05)  # hardly any noise yet, and black is -1
    assert t.tolist() == [25 * i for i in range(40)]
    # To say 0 costs the noise's variance, 1; to repeat x_t costs little once it is all noise.
    assert len(losses) == 4 and losses[:2] == pytest.approx([1, 1], abs=0.05) and losses[3] < losses[2] < 0.1
    # The memory of a step of training is enough, and the batches make no difference.
    asked.clear()
    assert Validation(settings | {"batch_size": 7}, "data", CPU).losses(model) == pytest.approx(losses)
    assert [len(t) for _, t, _ in asked] == [7, 7, 7, 7, 7, 5]
    assert torch.equal(torch.cat([y for *_, y in asked]), labels)
    # A network that never had a label is not asked about them.
    assert (Validation(settings | {"label_dropout": 1.0}, "data", CPU).labels == 10).all()


def test_validation_is_on_test_digits_from_all_over(monkeypatch):
    """Each with its own label. The first digits of MNIST are easier than the others."""
    digits = [(image.numpy().tobytes(), label.item()) for image, label in zip(*load_dataset("MNIST", train=False))]
    settings = {"dataset": "MNIST", "timesteps": 1000, "classes": 10, "label_dropout": 0.1, "batch_size": 64,
                "image_size": 28, "image_channels": 1}
    monkeypatch.setattr(Validation, "IMAGES", 10)
    validation = Validation(settings, "data", CPU)
    chosen = [digits.index((image.numpy().tobytes(), label.item()))
              for image, label in zip(validation.images, validation.labels)]
    assert len(set(chosen)) == 10 and max(chosen) >= 20 and validation.t.tolist() == list(range(0, 1000, 100))


def test_reports_are_of_an_average_that_is_not_trained(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "report", lambda out, progress, model: seen.append(model.network))
    run_in(tmp_path, "--max-steps", 2)
    assert seen and not seen[-1].training and not any(p.requires_grad for p in seen[-1].parameters())


# ----------------------------------------------------------------------------------------------------------------------
# The files

def test_the_files_of_a_run(tmp_path, full_reports):
    flags = ["--timesteps", 4, "--max-steps", 4, "--report-every", 3, "--out", tmp_path / "run"]
    result = call(train, *FLAGS, *flags)
    assert result.code == 0 and result.err == ""
    run = tmp_path / "run"
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()) == [
        ".lock", "checkpoint.pt", "loss.png", "metrics.csv", "samples/step_0000003.png", "samples/step_0000004.png",
        "settings.json"]
    state = load_checkpoint(run / "checkpoint.pt")
    assert json.loads((run / "settings.json").read_text()) == state["settings"]
    assert state["settings"].keys() >= SETTINGS.keys()
    assert iio.imread(run / "samples" / "step_0000004.png").shape == (2 * 242, 2 * 242)
    assert iio.imread(run / "loss.png").std() > 0
    # what it will do, and what to do next
    network = build_network(state["settings"])
    for words in (f"{sum(p.numel() for p in network.parameters()):,} parameters", f"{N:,} of MNIST", "4 steps", "cpu",
                  str(run), f"{SAMPLE} --checkpoint {run / 'checkpoint.pt'}"):
        assert words in result.out


def test_the_sample_grid_is_guided_as_the_commands_will_be(tmp_path, monkeypatch):
    """Which depends on how many images the model was trained on."""
    steps, draw = [], train.draw
    monkeypatch.setattr(train, "draw", lambda model, n, **how: steps.append((n, model.steps)) or draw(model, n, **how))
    run_in(tmp_path, "--max-steps", 3, "--report-every", 2)
    assert steps == [(64, 2), (64, 3)] and load_model(tmp_path / "checkpoint.pt").steps == 3


def test_the_sample_grid_shows_what_the_average_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw", draw)
    run_in(tmp_path, "--max-steps", 20, "--batch-size", 32)  # enough for the labels to make a difference
    images, _ = draw(load_model(tmp_path / "checkpoint.pt"), 64, batch_size=32)
    picture = iio.imread(tmp_path / "samples" / "step_0000020.png")
    assert len(images) == 64 and (picture == upscale(make_grid(images), 2)).all()


def test_overwrite_leaves_no_picture_of_the_old_run(tmp_path, monkeypatch):
    """Nor anything else, however soon the new one ends."""
    run_in(tmp_path, "--max-steps", 3)
    assert {path.name for path in tmp_path.rglob("*.*")} >= {"loss.png", "metrics.csv", "step_0000003.png"}
    before_step(monkeypatch, 1, crash)
    assert call(train, *FLAGS, "--max-steps", 3, "--overwrite", "--out", tmp_path).code == 1
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {".lock"}


# ----------------------------------------------------------------------------------------------------------------------
# What is said

def test_without_a_terminal_there_is_a_line_a_minute(tmp_path, clock):
    clock.step = 25
    result = call(train, *FLAGS, "--epochs", 1, "--max-steps", 13, "--report-every", 5, "--out", tmp_path)
    assert re.findall(r"(?m)^step +(\d+) +(\d+)% done$", result.out) == [
        (str(step), f"{100 * (step - 1) / 25:.0f}") for step in (3, 6, 9, 12)]


def test_a_run_that_has_no_step_left_says_so(tmp_path, clock):
    clock.step = 1

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


def test_the_bar_counts_images_from_where_the_run_stands(tmp_path, monkeypatch):
    bars = []

    class Noted(train.Bar):
        def __init__(self, **how):
            bars.append(how)
            super().__init__(**how)

    monkeypatch.setattr(train, "Bar", Noted)
    run_in(tmp_path, "--max-steps", 3)
    run_in(tmp_path, "--max-steps", 5, "--resume")
    before_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    assert call(train, *FLAGS, "--minutes", 0.01, "--out", tmp_path / "minutes").code == 143
    assert [(how["initial"], how["total"], how["unit"]) for how in bars] == [
        (0, 24, "image"), (24, 40, "image"), (0, None, "image")]


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
