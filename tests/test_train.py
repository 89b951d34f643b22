"""Training: exact resume, every image once, each formula of the loop by hand, and failures that lose nothing."""
import copy
import csv
import itertools
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import pytest
import torch
from matplotlib.axes import Axes
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from checkpoint import (SHIPPED, Model, build_network, export, load_checkpoint, load_model, lock_folder,
                        save_checkpoint)
from cli import generate
from data import enlarge, load_dataset, make_grid, to_uint8
from ddpm import DDPM
from diffusion_schedules import make_betas
from tiny import FLAGS, ROOT, assert_one_line, call, start

N = 500  # images in an epoch of the runs here
TIMES = {"seconds", "images_per_second"}
PLOT, GENERATE = train.plot_losses, train.generate


@pytest.fixture(scope="module", autouse=True)
def quick():
    """The first real digits only, N to train on and 40 to test on, and reports without plot and samples."""
    digits = {train_set: tuple(x[:n].clone() for x in load_dataset("MNIST", train=train_set))
              for train_set, n in [(True, N), (False, 40)]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_dataset", lambda name, root, train=True: digits[train])
        patch.setattr(train, "plot_losses", lambda path, history: None)
        patch.setattr(train, "generate", lambda *args, **kwargs: [(None, [(0, torch.zeros(1, 1, 28, 28), None)])])
        yield


@pytest.fixture
def full_reports(monkeypatch):
    monkeypatch.setattr(train, "plot_losses", PLOT)
    monkeypatch.setattr(train, "generate", GENERATE)


def trained(out, *flags):
    """Trains in `out` and returns the checkpoint."""
    result = call(train, *FLAGS, "--out", out, *flags)
    assert result.code == 0, result.err
    return load_checkpoint(out / "checkpoint.pt")


def same(a, b):
    """Equal bit for bit, times aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a.keys() - TIMES)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def metrics(out):
    with open(out / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def before_step(monkeypatch, step, action):
    """Does something when the step begins, once."""
    draw_batch = train.draw_batch

    def drawing(now, *args):
        if now == step:
            monkeypatch.setattr(train, "draw_batch", draw_batch)
            action()
        return draw_batch(now, *args)

    monkeypatch.setattr(train, "draw_batch", drawing)


def crash():
    """Stands for SIGKILL: nothing of the run's own is done after it."""
    raise RuntimeError("crash")


# ----------------------------------------------------------------------------------------------------------------------
# Resume

# 80 steps of 7 images: more than an epoch of 71.4 steps, so that one batch spans two.
LENGTH = ["--batch-size", 7, "--epochs", 2, "--report-every", 10]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, quick):
    """The uninterrupted run that the others are compared with: its folder and its checkpoint."""
    out = tmp_path_factory.mktemp("straight")
    return out, trained(out, *LENGTH, "--max-steps", 80)


@pytest.mark.parametrize("stops", [[1], [40], [75], [13, 14, 66], [79]])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, straight, stops):
    for flags in [["--max-steps", stop] for stop in stops] + [["--max-steps", 80]]:
        state = trained(tmp_path, *LENGTH, *flags, *["--resume"] * (tmp_path / "checkpoint.pt").exists())
    out, expected = straight
    assert state["step"] == 80
    for name in "model", "ema", "optimizer", "history", "recent", "settings":
        assert same(state[name], expected[name]), name
    assert same(metrics(tmp_path), metrics(out))


@pytest.mark.parametrize("save_every, step", [(30, 45), (30, 60), (7, 76)])
def test_a_crash_between_saves_changes_nothing(tmp_path, monkeypatch, straight, save_every, step):
    """What was reported after the last save is done again, and stands in metrics.csv once."""
    before_step(monkeypatch, step, crash)
    result = call(train, *FLAGS, *LENGTH, "--max-steps", 80, "--save-every", save_every, "--out", tmp_path)
    assert_one_line(result, 1, "crash")
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == step // save_every * save_every
    assert same(trained(tmp_path, *LENGTH, "--max-steps", 80, "--resume"), straight[1])
    assert [int(row["step"]) for row in metrics(tmp_path)] == [10, 20, 30, 40, 50, 60, 70, 80]
    assert same(metrics(tmp_path), metrics(straight[0]))


def test_another_seed_is_another_run(tmp_path, straight):
    """The control: the comparison can tell runs apart."""
    state = trained(tmp_path, *LENGTH, "--max-steps", 80, "--seed", 1)
    for name in "model", "ema", "optimizer", "history":
        assert not same(state[name], straight[1][name])


def test_resuming_a_finished_run_does_nothing_to_it(tmp_path):
    state = trained(tmp_path, "--max-steps", 6)
    assert same(trained(tmp_path, "--max-steps", 6, "--resume"), state)
    assert same(trained(tmp_path, "--max-steps", 3, "--resume"), state)
    assert [row["step"] for row in metrics(tmp_path)] == ["6"]


def test_reports_do_not_disturb_training(tmp_path, full_reports):
    often = trained(tmp_path / "often", "--max-steps", 9, "--report-every", 3)
    never = trained(tmp_path / "never", "--max-steps", 9, "--report-every", 1000)
    for name in "model", "ema", "optimizer":
        assert same(often[name], never[name])


def test_another_setting_is_refused_on_resume(tmp_path, monkeypatch):
    trained(tmp_path, "--max-steps", 2)
    monkeypatch.setattr(train, "train", lambda *args: None)
    saved = (tmp_path / "checkpoint.pt").read_bytes()
    for flag, value, old in [("--lr", 0.01, 0.005), ("--seed", 3, 0), ("--width", 16, 8), ("--batch-size", 9, 8),
                             ("--schedule", "cosine", "linear"), ("--dataset", "KMNIST", "MNIST"),
                             ("--ema", 0.5, 0.999)]:
        result = call(train, *FLAGS, "--resume", "--out", tmp_path, flag, value)
        assert_one_line(result, 1, flag, value, old, "--out")
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved


def test_length_and_reports_may_change_on_resume(tmp_path):
    trained(tmp_path, "--max-steps", 2, "--epochs", 1)
    state = trained(tmp_path, "--resume", "--max-steps", 4, "--epochs", 3, "--report-every", 4)
    assert state["step"] == 4 and (state["settings"]["epochs"], state["settings"]["report_every"]) == (3, 4)
    # and the learning rate follows the new length, 188 steps
    assert float(metrics(tmp_path)[-1]["lr"]) == pytest.approx(5e-3 * (1 + math.cos(math.pi * 3 / 188)) / 2)


def test_resume_takes_its_settings_from_the_checkpoint(tmp_path):
    settings = trained(tmp_path, "--max-steps", 2, "--lr", 0.01)["settings"]
    result = call(train, "--resume", "--max-steps", 3, "--out", tmp_path)
    assert result.code == 0 and load_checkpoint(tmp_path / "checkpoint.pt")["settings"] == settings


# ----------------------------------------------------------------------------------------------------------------------
# Batches

def batches(steps, n=50, **settings):
    """draw_batch of each step on n images of one pixel, whose grey level is their number; labels: its last digit."""
    settings = {"seed": 0, "batch_size": 7, "label_dropout": 0.0, "classes": 10, "timesteps": 1000,
                "schedule": "linear", "weighting": "simple"} | settings
    images = torch.arange(n).to(torch.uint8).view(n, 1, 1, 1)
    return [train.draw_batch(step, images, torch.arange(n) % 10, settings) for step in steps]


def numbers(drawn):
    return torch.cat([to_uint8(x0).flatten() for x0, *_ in drawn]).tolist()


@pytest.mark.parametrize("batch_size", [7, 50, 8, 1, 130])
def test_every_image_comes_once_per_epoch(batch_size):
    """Also where a batch spans two epochs, or more."""
    row = numbers(batches(range(math.ceil(4 * 50 / batch_size)), batch_size=batch_size))
    epochs = [row[start:start + 50] for start in range(0, 200, 50)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(50))}) == 5  # each in an order of its own


def test_labels_belong_to_their_images():
    for x0, y, _, _ in batches(range(20)):
        assert (to_uint8(x0).flatten() % 10).tolist() == y.tolist()


def test_images_come_scaled():
    (x0, *_), = batches([0], batch_size=50)
    torch.testing.assert_close(x0.flatten().sort().values, torch.arange(50) / 127.5 - 1)


def test_images_come_as_they_are():
    """Neither flipped nor transposed nor shifted: a mirrored digit is no digit."""
    images = torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings = {"seed": 0, "batch_size": 5, "label_dropout": 0.0, "classes": 10, "timesteps": 1000,
                "schedule": "linear", "weighting": "v"}
    x0, y, _, _ = train.draw_batch(0, images, torch.arange(5), settings)
    assert torch.equal(to_uint8(x0), images[y])


def test_labels_are_dropped_one_by_one():
    drawn = batches(range(300), label_dropout=0.25)
    dropped = torch.stack([y == 10 for _, y, _, _ in drawn])
    n = dropped.numel()
    assert abs(dropped.sum().item() - n / 4) < 5 * math.sqrt(n * 3 / 16)
    assert 0 < dropped.all(dim=1).sum() + (~dropped).all(dim=1).sum() < 100  # 0.25^7 + 0.75^7 of 300 batches: 40


def test_a_batch_is_a_function_of_seed_and_step():
    one, two, again = batches([3, 4, 3])
    torch.manual_seed(1)
    torch.rand(5)
    state = torch.get_rng_state()
    later, = batches([3])
    assert torch.equal(torch.get_rng_state(), state)
    assert same(one, again) and same(one, later)
    other_seed, = batches([3], seed=1)
    for i, name in enumerate(("x0", "labels", "t", "noise")):
        if name != "labels":  # 7 digits could be the same
            assert not same(one[i], two[i]) and not same(one[i], other_seed[i])


def test_no_two_things_share_a_random_stream(monkeypatch):
    """Neither the orders of two epochs, nor two steps, nor one of each, and none with those of another seed."""
    seeds, stream_seed = [], train.stream_seed
    monkeypatch.setattr(train, "stream_seed", lambda *numbers: seeds.append(stream_seed(*numbers)) or seeds[-1])
    train.shuffled.cache_clear()
    for seed in 0, 1:
        batches(range(20), seed=seed)  # of three epochs
    assert len({seed % 2**32 for seed in seeds}) == len(seeds) == 2 * (20 + 3)  # torch keeps 32 bits on the CPU


def test_other_lengths_of_training_draw_the_same():
    assert same(batches([5]), batches([5], epochs=3, max_steps=9))


@pytest.mark.parametrize("timesteps, batch_size", [(10, 7), (1000, 64), (4, 1), (1, 7)])
def test_timesteps_are_uniform_from_the_first_to_the_last(timesteps, batch_size):
    t = torch.cat([t for _, _, t, _ in batches(range(2000), timesteps=timesteps, batch_size=batch_size)])
    assert t.dtype == torch.long and t.min() == 0 and t.max() == timesteps - 1
    counts = torch.bincount(t, minlength=timesteps).double()
    p = 1 / timesteps
    assert (counts - len(t) * p).abs().max() <= 5 * math.sqrt(len(t) * p * (1 - p))


@pytest.mark.parametrize("weighting, power", [("v", 0.25), ("balanced", 0), ("simple", 0)])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_timesteps_are_drawn_in_proportion_to_a_power_of_alpha_bar(schedule, weighting, power):
    drawn = batches(range(1500), timesteps=20, batch_size=64, weighting=weighting, schedule=schedule)
    counts = torch.bincount(torch.cat([t for _, _, t, _ in drawn]), minlength=20).double()
    p = DDPM(make_betas(schedule, 20)).alpha_bars ** power
    p /= p.sum()
    assert (abs(counts - 1500 * 64 * p) <= 5 * (1500 * 64 * p * (1 - p)).sqrt()).all()


def test_a_draw_that_rounds_up_to_one_is_still_a_timestep(monkeypatch):
    largest = torch.tensor(1.0).nextafter(torch.tensor(0.0))
    monkeypatch.setattr(train.torch, "rand", lambda *shape, **kwargs: largest.expand(*shape).clone())
    (_, _, t, _), = batches([0], batch_size=64)
    assert t.max() == 999


def test_timesteps_are_independent_of_the_images():
    """Over many epochs each image meets low and high timesteps alike."""
    total = torch.zeros(50)
    for x0, _, t, _ in batches(range(5000)):
        total[to_uint8(x0).flatten().long()] += t
    mean, deviation = 999 / 2, 1000 / math.sqrt(12) / math.sqrt(700)
    assert (total / 700 - mean).abs().max() < 5 * deviation


def test_noise_is_standard_normal_and_new_at_each_step():
    noise = torch.cat([noise for *_, noise in batches(range(600))]).flatten()
    n = len(noise)
    assert abs(noise.mean()) < 5 / math.sqrt(n) and abs(noise.var() - 1) < 5 * math.sqrt(2 / n)
    assert len(noise.unique()) > 0.99 * n


def test_everything_is_drawn_on_the_device_of_the_images(monkeypatch):
    """On the meta device, and with generators that need no GPU."""
    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            made.append(str(device))
            return super().__new__(cls)

    made = []
    monkeypatch.setattr(torch, "Generator", Generator)
    train.shuffled.cache_clear()
    drawn = train.draw_batch(3, torch.zeros(50, 1, 28, 28, dtype=torch.uint8, device="meta"),
                             torch.zeros(50, dtype=torch.long, device="meta"),
                             {"seed": 0, "batch_size": 8, "label_dropout": 0.1, "classes": 10, "timesteps": 20,
                              "schedule": "linear", "weighting": "v"})
    train.shuffled.cache_clear()
    assert [x.device.type for x in drawn] == ["meta"] * 4 and set(made) == {"cpu", "meta"}


def test_the_loss_on_a_fake_gpu():
    settings = {"image_size": 28, "image_channels": 1, "classes": 10, "width": 8, "depth": 1}
    ddpm = DDPM(make_betas("linear", 20))
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            network = build_network(settings)
            x0, noise, t = torch.zeros(4, 1, 28, 28), torch.zeros(4, 1, 28, 28), torch.zeros(4, dtype=torch.long)
        model = Model(network, ddpm, settings)
        losses = model.ddpm.loss(lambda x_t, t: model.denoiser(x_t, t, t), x0, t, noise)
        assert losses.device.type == "cuda" and losses.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# The loop, by hand

@pytest.fixture
def states(monkeypatch):
    """Copies of all that is saved, in a list that fills while a run goes on."""
    kept = []

    def keep(path, state):
        kept.append(state | {name: copy.deepcopy(state[name]) for name in ("model", "ema")})
        save_checkpoint(path, state)

    monkeypatch.setattr(train, "save_checkpoint", keep)
    return kept


@pytest.mark.parametrize("limit", [0.999, 0.15])
def test_the_moving_average_by_hand(tmp_path, states, limit):
    """With its warm-up, and of the weights after the optimiser's step."""
    trained(tmp_path, "--max-steps", 3, "--save-every", 1, "--ema", limit)
    torch.manual_seed(0)
    average = build_network(states[0]["settings"]).state_dict()
    weights = average
    for state, decay in zip(states, [1 / 10, 2 / 11, 3 / 12]):
        assert not same(state["model"], weights)
        weights, decay = state["model"], min(limit, decay)
        average = {name: decay * value + (1 - decay) * weights[name] for name, value in average.items()}
        for name, value in average.items():
            torch.testing.assert_close(state["ema"][name], value, rtol=1e-6, atol=1e-7)


def test_what_is_reported_and_sampled_is_the_moving_average(tmp_path, states, monkeypatch):
    seen, judged, losses = [], [], train.Validation.losses

    def weights(model):
        return {name: value.clone() for name, value in model.network.state_dict().items()}

    monkeypatch.setattr(train, "write_report", lambda out, history, model: seen.append(weights(model)))
    monkeypatch.setattr(train.Validation, "losses", lambda validation, model: judged.append(weights(model))
                        or losses(validation, model))
    trained(tmp_path, "--max-steps", 6, "--report-every", 3, "--save-every", 3)
    assert len(seen) == 2 and same(seen[0], states[0]["ema"]) and not same(seen[0], states[0]["model"])
    assert same(judged, seen)


def test_training_is_told_the_labels(tmp_path, monkeypatch):
    told, denoiser = [], Model.denoiser
    monkeypatch.setattr(Model, "denoiser", lambda model, x_t, t, labels=None: torch.is_grad_enabled()
                        and told.append(labels) or denoiser(model, x_t, t, labels))
    trained(tmp_path, "--max-steps", 2, "--label-dropout", 0)
    assert len(told) == 2 and all(labels.max() < 10 and len(labels.unique()) > 1 for labels in told)


@pytest.mark.parametrize("warmup, max_steps", [(4, 10), (0, 3), (100, 5), (4, 63)])
def test_the_learning_rate_by_hand(tmp_path, warmup, max_steps):
    """It rises over the warm-up and follows half a cosine over --epochs, not over --max-steps."""
    total = math.ceil(1 * N / 8)
    trained(tmp_path, "--epochs", 1, "--max-steps", max_steps, "--warmup", warmup, "--report-every", 1, "--lr", 0.003)
    rates = [float(row["lr"]) for row in metrics(tmp_path)]
    assert rates == pytest.approx([
        0.003 * min(1, (step + 1) / max(1, warmup)) * (1 + math.cos(math.pi * step / total)) / 2
        for step in range(max_steps)])
    if max_steps == total:
        assert rates[-1] < 0.003 / 1000


def test_an_epoch_ends_after_its_images(tmp_path):
    assert trained(tmp_path, "--epochs", 1, "--batch-size", 70)["step"] == math.ceil(N / 70)
    assert float(metrics(tmp_path)[-1]["epoch"]) == pytest.approx(8 * 70 / N)


def test_max_steps_end_a_run_and_never_lengthen_it(tmp_path):
    for steps, expected in (4, 4), (9, N // 100):
        flags = ["--batch-size", 100, "--epochs", 1, "--max-steps", steps, "--out", tmp_path / str(steps)]
        assert f"length      {expected} steps\n" in call(train, *FLAGS, *flags).out
        assert load_checkpoint(tmp_path / str(steps) / "checkpoint.pt")["step"] == expected


def test_schedule_and_precision_are_those_of_the_settings(tmp_path, monkeypatch):
    models, model = [], train.Model
    monkeypatch.setattr(train, "Model", lambda *args: models.append(model(*args)) or models[-1])
    trained(tmp_path, "--max-steps", 1, "--schedule", "cosine", "--precision", "bf16")
    training, average = models
    assert training.precision == "bf16" and average.precision == "fp32"
    assert torch.equal(training.ddpm.betas, make_betas("cosine", 20)) and average.ddpm is training.ddpm


def test_minutes_end_in_time_with_a_learning_rate_near_zero(tmp_path, monkeypatch):
    """By a clock that goes on by 0.01 s whenever it is read. Time before a resume counts."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 100))
    before_step(monkeypatch, 15, lambda: signal.raise_signal(signal.SIGTERM))
    flags = ["--minutes", 0.02, "--report-every", 1, "--out", tmp_path]
    assert call(train, *FLAGS, *flags).code == 143
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 16
    assert call(train, *FLAGS, *flags, "--resume").code == 0
    state, rows = load_checkpoint(tmp_path / "checkpoint.pt"), metrics(tmp_path)
    assert 1.15 < state["seconds"] < 1.25 and 24 < state["step"] < 36
    assert float(rows[-1]["lr"]) < 0.02 * 5e-3 < float(rows[len(rows) // 2]["lr"])


def test_the_time_of_reports_is_part_of_the_budget(tmp_path, monkeypatch):
    """Also for a run that is killed right after a report and a save, and resumed."""
    ticks = itertools.count()
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=lambda: next(ticks) / 1000))
    monkeypatch.setattr(train, "write_report", lambda *args: [next(ticks) for _ in range(10_000)])
    before_step(monkeypatch, 2, crash)
    assert call(train, *FLAGS, "--minutes", 1, "--report-every", 2, "--save-every", 2, "--out", tmp_path).code == 1
    assert load_checkpoint(tmp_path / "checkpoint.pt")["seconds"] == pytest.approx(10, abs=0.1)


def test_a_run_of_minutes_may_go_on_by_epochs(tmp_path, monkeypatch):
    before_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
    assert call(train, *FLAGS, "--minutes", 0.1, "--out", tmp_path).code == 143
    state = trained(tmp_path, "--resume", "--epochs", 1)
    assert state["step"] == math.ceil(N / 8) and state["settings"]["minutes"] is None


def test_the_images_are_judged_by_the_clipped_v(tmp_path, monkeypatch):
    """The first loss, from batch, network and formula alone."""
    first = []
    loss = DDPM.loss
    monkeypatch.setattr(DDPM, "loss", lambda *args: first.append(loss(*args)) or first[-1])
    settings = trained(tmp_path, "--max-steps", 1, "--precision", "fp32")["settings"]
    x0, y, t, noise = train.draw_batch(0, *train.load_dataset("MNIST", "data"), settings)
    torch.manual_seed(0)
    ddpm = DDPM(make_betas("linear", 20))
    a = ddpm.alpha_bars[t].float().view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    v = build_network(settings)(x_t, t, y)
    x0_hat = (a.sqrt() * x_t - (1 - a).sqrt() * v).clamp(-1, 1)
    expected = (noise - (x_t - a.sqrt() * x0_hat) / (1 - a).sqrt()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(first[0], expected)


@pytest.mark.parametrize("weighting, clip_norm", [("balanced", 1e6), ("simple", 1e6), ("v", 1e6), ("balanced", 1e-3)])
def test_the_first_update_by_hand(tmp_path, weighting, clip_norm):
    """From the gradient g of the weighted loss AdamW has the moments (1 - beta1) g and (1 - beta2) g^2, and so steps by
    the learning rate times the sign of g."""
    state = trained(tmp_path, "--max-steps", 1, "--optimizer", "adamw", "--warmup", 0, "--precision", "fp32",
                    "--lr", 0.01, "--weight-decay", 0.5, "--weighting", weighting, "--clip-norm", clip_norm)
    settings, moments = state["settings"], state["optimizer"][0]["state"].values()
    x0, y, t, noise = train.draw_batch(0, *train.load_dataset("MNIST", "data"), settings)
    torch.manual_seed(0)
    model = Model(build_network(settings), DDPM(make_betas("linear", 20)), settings)
    weights = model.ddpm.alpha_bars[t] ** {"v": -1, "balanced": -0.5, "simple": 0}[weighting]
    losses = model.ddpm.loss(lambda x_t, t: model.denoiser(x_t, t, y), x0, t, noise)
    gradients = torch.autograd.grad((weights * losses).mean(), list(model.network.parameters()))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    assert float(metrics(tmp_path)[0]["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    # Of timesteps that are drawn in proportion to p the loss is divided by T p, for an estimate of L_simple.
    p = model.ddpm.alpha_bars ** (0.25 if weighting == "v" else 0)
    estimate = (losses.detach() / (20 * p / p.sum())[t]).mean()
    assert float(metrics(tmp_path)[0]["train_loss"]) == pytest.approx(estimate.item(), rel=1e-4)
    for (name, before), g, saved in zip(model.network.named_parameters(), gradients, moments, strict=True):
        g = g * min(1, clip_norm / norm)
        torch.testing.assert_close(saved["exp_avg"], 0.1 * g, rtol=1e-3, atol=1e-6 * norm)
        torch.testing.assert_close(saved["exp_avg_sq"], 0.01 * g * g, rtol=2e-3, atol=1e-9 * norm ** 2)
        after = before * (1 - 0.01 * 0.5) - 0.01 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(state["model"][name], after, rtol=1e-4, atol=1e-4)


def test_muon_trains_the_matrices_inside_the_network_and_adamw_the_rest(tmp_path, states):
    trained(tmp_path, "--max-steps", 3, "--save-every", 1)
    first, last = states[0], states[-1]
    inside = [value.shape for name, value in last["model"].items()
              if name.split(".")[0] in ("down", "shrink", "middle", "grow", "up") and value.ndim > 1]
    adamw, muon = last["optimizer"]
    assert [moments["momentum"].shape for moments in muon["state"].values()] == inside
    assert len(adamw["state"]) == len(last["model"]) - len(inside)
    assert adamw["param_groups"][0]["lr"] == muon["param_groups"][0]["lr"] != 5e-3
    assert [name for name in first["model"] if same(first["model"][name], last["model"][name])] == []


def test_what_is_summed_up_holds_no_graph(tmp_path, monkeypatch):
    """Else the graphs of all steps since the last report stay in memory."""
    checked, isfinite = [], torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda x: checked.append(x.requires_grad) or isfinite(x))
    trained(tmp_path, "--max-steps", 3)
    assert len(checked) >= 3 and not any(checked)


def test_the_class_shares_are_those_of_the_images(tmp_path):
    shares = trained(tmp_path, "--max-steps", 1)["settings"]["class_shares"]
    labels = train.load_dataset("MNIST", "data")[1].tolist()
    assert shares == pytest.approx([labels.count(digit) / N for digit in range(10)])


def test_training_makes_the_loss_smaller(tmp_path):
    trained(tmp_path, "--max-steps", 120, "--report-every", 20)
    losses = [float(row["train_loss"]) for row in metrics(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]


def test_each_weight_has_one_optimizer():
    """Muon the matrices inside the network, AdamW the rest or, if asked to, all; with the settings' rates."""
    settings = {name: default for name, (default, _, _) in train.SETTINGS.items()} | {
        "image_size": 28, "image_channels": 1, "classes": 10, "width": 8, "depth": 2, "precision": "bf16", "lr": 0.3}
    network = build_network(settings)
    names = {p: name for name, p in network.named_parameters()}
    adamw, muon = ([names[p] for p in optimizer.param_groups[0]["params"]]
                   for optimizer in train.make_optimizers(network, settings))
    assert sorted(adamw + muon) == sorted(names.values())
    inside = ("down", "shrink", "middle", "grow", "up")
    assert set(muon) == {name for p, name in names.items() if p.ndim > 1 and name.split(".")[0] in inside}
    for optimizer in train.make_optimizers(network, settings):
        assert optimizer.param_groups[0]["lr"] == 0.3 and optimizer.param_groups[0]["weight_decay"] == 0.01

    alone, = train.make_optimizers(network, settings | {"optimizer": "adamw"})
    assert isinstance(alone, torch.optim.AdamW) and len(alone.param_groups[0]["params"]) == len(names)


def test_an_adamw_run_resumes_exactly_too(tmp_path):
    straight = trained(tmp_path / "a", "--optimizer", "adamw", "--max-steps", 8)
    trained(tmp_path / "b", "--optimizer", "adamw", "--max-steps", 5)
    assert same(trained(tmp_path / "b", "--resume", "--max-steps", 8), straight)
    assert not same(trained(tmp_path / "c", "--max-steps", 8)["model"], straight["model"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_float32_in_any_precision(tmp_path, precision):
    state = trained(tmp_path, "--max-steps", 3, "--precision", precision)
    assert state["settings"]["precision"] == precision
    moments = [value for optimizer in state["optimizer"] for entry in optimizer["state"].values()
               for value in entry.values()]
    assert {x.dtype for x in [*state["model"].values(), *state["ema"].values(), *moments]} == {torch.float32}


# ----------------------------------------------------------------------------------------------------------------------
# Reports and files

COLUMNS = ["step", "epoch", "train_loss", "validation_loss", "validation_loss_q1", "validation_loss_q2",
           "validation_loss_q3", "validation_loss_q4", "lr", "grad_norm", "images_per_second", "seconds"]


def test_the_metrics_are_what_they_are_called(tmp_path):
    trained(tmp_path / "one", "--max-steps", 8, "--report-every", 1)
    state = trained(tmp_path / "four", "--max-steps", 10, "--report-every", 4)
    ones, fours = metrics(tmp_path / "one"), metrics(tmp_path / "four")
    assert list(fours[0]) == COLUMNS
    assert [row["step"] for row in fours] == ["4", "8", "10"]
    assert 32 / float(fours[0]["images_per_second"]) == pytest.approx(float(fours[0]["seconds"]), rel=0.5)
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


def test_validation_is_the_same_each_time_and_sorted_by_noise():
    settings = {"dataset": "MNIST", "timesteps": 1000, "classes": 10, "label_dropout": 0.9}
    validation = train.Validation(settings, "data", torch.device("cpu"))
    asked = []

    def denoiser(x_t, t, labels):
        assert not torch.is_grad_enabled()
        asked.append((x_t, t, labels))
        return x_t * (t >= 500).view(-1, 1, 1, 1)

    model = SimpleNamespace(ddpm=DDPM(make_betas("linear", 1000)), denoiser=denoiser)
    state = torch.get_rng_state()
    losses = validation.losses(model)
    assert losses == validation.losses(model) and torch.equal(torch.get_rng_state(), state)
    x_t, t, labels = asked[0]
    assert x_t[0].median() == pytest.approx(-1, abs=0.05)  # hardly any noise yet, and black is -1
    assert t.tolist() == [25 * i for i in range(40)]
    assert torch.equal(labels, train.load_dataset("MNIST", "data", train=False)[1])
    # A network that never had a label is not asked about them.
    assert (train.Validation(settings | {"label_dropout": 1.0}, "data", torch.device("cpu")).labels == 10).all()
    # To say 0 costs the noise's variance, 1; to repeat x_t costs little once it is all noise.
    assert len(losses) == 4 and losses[:2] == pytest.approx([1, 1], abs=0.05) and losses[3] < losses[2] < 0.1


def test_the_files_of_a_run(tmp_path, full_reports):
    result = call(train, *FLAGS, "--max-steps", 4, "--report-every", 3, "--out", tmp_path / "run")
    assert result.code == 0 and result.err == ""
    run = tmp_path / "run"
    assert sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()) == [
        ".lock", "checkpoint.pt", "loss.png", "metrics.csv", "samples/step_0000003.png", "samples/step_0000004.png",
        "settings.json"]
    state = load_checkpoint(run / "checkpoint.pt")
    assert json.loads((run / "settings.json").read_text()) == state["settings"]
    assert state["settings"].keys() >= train.SETTINGS.keys()
    assert iio.imread(run / "samples" / "step_0000004.png").shape == (2 * 242, 2 * 242)
    assert iio.imread(run / "loss.png").std() > 0
    # what it will do, and what to do next
    network = build_network(state["settings"])
    for words in (f"{sum(p.numel() for p in network.parameters()):,} parameters", f"{N:,} of MNIST", "4 steps", "cpu",
                  str(run), f"python sample.py --checkpoint {run / 'checkpoint.pt'}"):
        assert words in result.out


def test_a_report_shows_64_samples(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "generate", GENERATE)
    settings = {"image_size": 28, "image_channels": 1, "classes": 10, "class_shares": [0.1] * 10, "width": 8,
                "depth": 1}
    model = Model(build_network(settings), DDPM(make_betas("linear", 20)), settings)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.normal_(0, 0.1)
    train.write_report(tmp_path, [dict.fromkeys(COLUMNS, 7)], model)
    (_, process), = generate(model, 64, batch_size=64)
    *_, (_, x, _) = process
    assert (iio.imread(tmp_path / "samples" / "step_0000007.png") == enlarge(make_grid(to_uint8(x)), 2)).all()


def test_the_sample_grid_is_guided_as_the_commands_will_be(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(train, "write_report", lambda out, history, model: steps.append(model.steps))
    trained(tmp_path, "--max-steps", 3, "--report-every", 2)
    assert steps == [2, 3] and load_model(tmp_path / "checkpoint.pt").steps == 3


def test_the_sample_grid_shows_what_the_average_draws(tmp_path, full_reports):
    trained(tmp_path, "--max-steps", 40)  # enough for the labels to make a difference
    (_, process), = generate(load_model(tmp_path / "checkpoint.pt"), 64, batch_size=64)
    *_, (_, x, _) = process
    picture = iio.imread(tmp_path / "samples" / "step_0000040.png")
    assert (picture == enlarge(make_grid(to_uint8(x)), 2)).all()


def test_the_plot_shows_what_its_legends_say(tmp_path, monkeypatch):
    plotted, plot = {}, Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, label, **kwargs: plotted.update({label: (x, y)})
                        or plot(axes, x, y, label=label, **kwargs))
    PLOT(tmp_path / "loss.png", [{name: 10 * k + row for k, name in enumerate(COLUMNS)} for row in (1, 2)])
    assert [label.split()[0] for label in plotted] == ["training", "validation", "first", "second", "third", "last:"]
    assert list(plotted.values()) == [([1, 2], [10 * k + 1, 10 * k + 2]) for k in range(2, 8)]


def test_a_run_goes_to_runs_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(train, *FLAGS, "--max-steps", 1).code == 0
    assert Path("runs/mnist/checkpoint.pt").is_file()


def test_images_that_no_model_may_have_are_refused_before_training(tmp_path, monkeypatch):
    """They could be trained on, but what came of it would not be loaded."""
    images = torch.zeros(8, 1, 516, 516, dtype=torch.uint8)
    monkeypatch.setattr(train, "load_dataset", lambda *args, **how: (images, torch.arange(8) % 2))
    result = call(train, *FLAGS, "--out", tmp_path, "--max-steps", 1)
    assert_one_line(result, 1, "MNIST: image_size is 516", "512")
    assert not (tmp_path / "checkpoint.pt").exists()


def test_the_shipped_model_is_what_its_command_makes():
    """By the README. It is older than the choice of an optimizer, and the precision is the machine's."""
    settings = load_checkpoint(SHIPPED)["settings"]
    made = {name: default for name, (default, _, _) in train.SETTINGS.items() if name not in ("optimizer", "precision")}
    made |= {"lr": train.LR_ADAMW, "warmup": 200, "weighting": "balanced"}
    assert {name: settings[name] for name in made} == made
    assert "`python train.py --optimizer adamw --warmup 200 --weighting balanced`: 42,188 steps" in \
        (ROOT / "README.md").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Ends before the end

def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, monkeypatch):
    loss, steps = DDPM.loss, []

    def failing(*args):
        steps.append(torch.is_grad_enabled())
        return loss(*args) * (torch.nan if sum(steps) == 13 else 1)

    monkeypatch.setattr(DDPM, "loss", failing)
    result = call(train, *FLAGS, "--max-steps", 20, "--save-every", 5, "--out", tmp_path)
    assert_one_line(result, 1, "NaN or infinite", "step 12", tmp_path / "checkpoint.pt", "--lr")
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == 10 and all(torch.isfinite(value).all() for value in state["ema"].values())
    monkeypatch.setattr(DDPM, "loss", loss)
    trained(tmp_path, "--max-steps", 20, "--resume")


class Unhurried(str):
    """Stands for a GPU, where numbers are looked at rarely: a device by name whose type is not "cpu"."""
    type = "gpu"


@pytest.mark.parametrize("flags", [
    ["--save-every", 10],
    ["--save-every", 20, "--report-every", 20],
])
def test_what_is_not_finite_is_never_saved_even_if_it_is_noticed_late(tmp_path, monkeypatch, flags):
    loss, steps = DDPM.loss, []

    def failing(*args):
        steps.append(torch.is_grad_enabled())
        return loss(*args) * (torch.nan if sum(steps) == 33 else 1)

    monkeypatch.setattr(train, "pick_device", lambda name: Unhurried("cpu"))
    monkeypatch.setattr(DDPM, "loss", failing)
    result = call(train, *FLAGS, "--max-steps", 60, *flags, "--out", tmp_path)
    assert_one_line(result, 1, "NaN or infinite", tmp_path / "checkpoint.pt")
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] in (20, 30)
    assert all(torch.isfinite(value).all() for name in ("model", "ema") for value in state[name].values())


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, value):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: torch.tensor(value))
    result = call(train, *FLAGS, "--max-steps", 20, "--out", tmp_path)
    assert_one_line(result, 1, "NaN or infinite", "nothing was saved yet")
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_saves_and_says_how_to_go_on(tmp_path, monkeypatch, straight, number, code):
    before_step(monkeypatch, 33, lambda: signal.raise_signal(number))
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    result = call(train, *FLAGS, *LENGTH, "--max-steps", 80, "--out", tmp_path)
    assert result.code == code and result.err.count("\n") == 1
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 34  # the step was finished
    assert [int(row["step"]) for row in metrics(tmp_path)] == [10, 20, 30]  # no report that the run would not have had
    said, _, command = result.err.partition("Go on with: ")
    assert "stopped at step 34" in said
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
    process = start("train.py", *FLAGS, "--save-every", 1, "--out", tmp_path / "run", cwd=tmp_path)
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
# Misuse

def test_a_run_is_not_overwritten_unasked(tmp_path):
    trained(tmp_path, "--max-steps", 3)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert_one_line(call(train, *FLAGS, "--max-steps", 3, "--out", tmp_path), 1, "--resume", "--overwrite", tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert trained(tmp_path, "--max-steps", 2, "--overwrite")["step"] == 2
    # No report of the old run is taken for one of the new.
    assert [row["step"] for row in metrics(tmp_path)] == ["2"]
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step_0000002.png"]


def test_a_run_that_another_process_made_just_now_is_not_overwritten(tmp_path, monkeypatch):
    """Between this one's first look and its lock."""
    lock = train.lock_folder

    def locked(out):
        (out / "checkpoint.pt").write_bytes(b"another's")
        return lock(out)

    monkeypatch.setattr(train, "lock_folder", locked)
    assert_one_line(call(train, *FLAGS, "--max-steps", 3, "--out", tmp_path), 1, "--overwrite")
    assert (tmp_path / "checkpoint.pt").read_bytes() == b"another's"


def test_what_a_killed_run_left_half_written_goes_when_the_folder_is_used_again(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = [tmp_path / f".metrics.csv.{dead.stdout.strip()}.tmp",
            tmp_path / "samples" / f".step_0000007.png.{dead.stdout.strip()}.tmp"]
    kept = [tmp_path / "samples" / f".step_0000009.png.{os.getppid()}.tmp",  # of one that is alive
            tmp_path / "samples" / ".a.b.tmp", tmp_path / ".a.b.tmp"]          # and of somebody else
    kept[0].parent.mkdir()
    for path in left + kept:
        path.touch()
    trained(tmp_path, "--max-steps", 1)
    assert all(path.exists() for path in kept) and not any(path.exists() for path in left)


def test_an_overwritten_run_does_not_come_back(tmp_path, monkeypatch):
    """Not even if the new one is killed before it has saved anything."""
    trained(tmp_path, "--max-steps", 3)
    before_step(monkeypatch, 1, crash)
    assert call(train, *FLAGS, "--max-steps", 3, "--overwrite", "--width", 16, "--out", tmp_path).code == 1
    assert_one_line(call(train, "--resume", "--out", tmp_path), 1, "no checkpoint at")


def test_resume_without_a_run_says_so(tmp_path):
    out = tmp_path / "typing error"
    assert_one_line(call(train, *FLAGS, "--resume", "--out", out), 1, "no checkpoint at", out)
    assert not out.exists()


def test_what_auto_was_decided_to_stays_so(tmp_path):
    """The command that is printed to go on has the flags of the run, --precision auto perhaps."""
    decided = trained(tmp_path, "--max-steps", 1, "--precision", "auto")["settings"]["precision"]
    other = {"bf16": "fp32", "fp32": "bf16"}[decided]
    assert trained(tmp_path, "--max-steps", 2, "--precision", "auto", "--resume")["settings"]["precision"] == decided
    flags = ["--precision", other, "--resume", "--max-steps", 2, "--out", tmp_path]
    assert_one_line(call(train, *FLAGS, *flags), 1, "--precision", decided)


def test_a_run_that_is_shortened_ends_where_it_is(tmp_path):
    trained(tmp_path, "--max-steps", 100)
    state = trained(tmp_path, "--resume", "--epochs", 1)
    assert state["step"] == 100 and float(metrics(tmp_path)[-1]["lr"]) < 1e-9


def test_each_optimizer_has_a_learning_rate_of_its_own(tmp_path):
    rates = [trained(tmp_path / str(i), "--max-steps", 1, *flags)["settings"]["lr"] for i, flags in enumerate(
        [[], ["--optimizer", "muon"], ["--optimizer", "adamw"], ["--optimizer", "adamw", "--lr", 0.007]])]
    assert rates == [0.005, 0.005, 0.002, 0.007]


@pytest.mark.parametrize("flags, device, expected", [
    ([], "cpu", (128, 64)), (["--minutes", 0.5], "cpu", (64, 32)), (["--minutes", 30], "cpu", (64, 32)),
    (["--minutes", 30.1], "cpu", (128, 64)), (["--minutes", 5], "cuda", (128, 64)),
    (["--max-steps", 9], "cpu", (128, 64)), (["--minutes", 5, "--width", 96], "cpu", (96, 32)),
    (["--minutes", 5, "--batch-size", 16], "cpu", (64, 16)),
])
def test_few_minutes_on_a_cpu_train_a_small_network(tmp_path, monkeypatch, flags, device, expected):
    seen = []
    monkeypatch.setattr(train, "pick_device", lambda name: torch.device(device))
    monkeypatch.setattr(train, "train", lambda flags, settings, *rest: seen.append(settings))
    assert call(train, "--out", tmp_path, *flags).code == 0
    assert (seen[0]["width"], seen[0]["batch_size"]) == expected


def test_printed_commands_can_be_pasted(tmp_path, monkeypatch):
    out = tmp_path / "my run --overwrite"
    flags = [*FLAGS, "--max-steps", 2, "--out", str(out)]
    printed = call(train, *flags).out.splitlines()[-1]
    assert shlex.split(printed)[2:] == ["python", "sample.py", "--checkpoint", str(out / "checkpoint.pt"), "--n", "64",
                                        "--gif"]
    before_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    result = call(train, *flags, "--overwrite")
    command = shlex.split(result.err.split("Go on with: ")[1])
    assert command == ["python", "train.py", *map(str, flags), "--resume"]


def test_a_checkpoint_for_sampling_only_says_so(tmp_path):
    trained(tmp_path, "--max-steps", 2)
    export(tmp_path / "checkpoint.pt", tmp_path / "checkpoint.pt")
    assert_one_line(call(train, "--resume", "--out", tmp_path), 1, "for sampling only")


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with lock_folder(tmp_path):
        assert_one_line(call(train, *FLAGS, "--max-steps", 2, "--out", tmp_path), 1, "another run", tmp_path)
    trained(tmp_path, "--max-steps", 2)


@pytest.mark.parametrize("change", [
    {"settings": {"lr": math.nan}}, {"settings": {"lr": "0.002"}}, {"settings": {"batch_size": 0}},
    {"settings": {"batch_size": 10**12}}, {"settings": {"dataset": "../x"}}, {"settings": {"seed": -1}},
    {"settings": {"ema": None}}, {"settings": {"precision": "int4"}}, {"settings": {"report_every": 1.5}},
    {"step": "4"}, {"step": -3}, {"recent": {}}, {"optimizer": {}}, {"optimizer": None},
    {"model": {}}, {"model": None}, {"ema": None},
    {"history": None},
], ids=str)
def test_a_hostile_checkpoint_is_one_line(tmp_path, change):
    state = trained(tmp_path, "--max-steps", 2)
    for name, value in change.items():
        state[name] = state[name] | value if name == "settings" else value
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    saved = (tmp_path / "checkpoint.pt").read_bytes()
    assert_one_line(call(train, "--resume", "--max-steps", 4, "--out", tmp_path), 1)
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved


@pytest.mark.parametrize("change", [
    {"step": -3}, {"step": 2.0}, {"step": 0}, {"step": 10**13}, {"seconds": -1.0}, {"history": [{"step": 1}]},
    {"recent": {"steps": 3}}, {"recent": {"seconds": 0.0}}, {"recent": {"sums": [1.0]}},
    {"recent": {"sums": [1.0, "1.0"]}}, {"recent": {"sums": [math.nan, 1.0]}}, {"recent": {"sums": [1.0, -1.0]}},
], ids=str)
def test_progress_that_no_run_makes_is_refused(change):
    state = {"step": 4, "seconds": 1.5, "history": [], "recent": {"steps": 4, "seconds": 1.5, "sums": [0.5, 2.0]}}
    train.check_progress("c.pt", state)
    for name, value in change.items():
        state[name] = state[name] | value if name == "recent" else value
    with pytest.raises(ValueError, match="^c.pt: "):
        train.check_progress("c.pt", state)


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
    settings = {"image_size": 28, "image_channels": 1, "classes": 10, "width": 8, "depth": 1, "optimizer": "muon",
                "lr": 0.01, "weight_decay": 0.0, "precision": "fp32"}
    network = build_network(settings)
    optimizers = train.make_optimizers(network, settings)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    states = [optimizer.state_dict() for optimizer in optimizers]
    train.restore_optimizers("c.pt", optimizers, states, 1)
    with pytest.raises(ValueError, match="^c.pt: "):
        train.restore_optimizers("c.pt", optimizers, change(*states), 1)


NUMBERS = ["0", "-1", "", "nan", "inf", "1.5", "x", "9" * 40]


@pytest.mark.parametrize("flag, value", [
    *[(flag, value) for flag in ("--epochs", "--batch-size", "--max-steps", "--save-every", "--report-every",
                                 "--timesteps", "--width", "--depth") for value in NUMBERS],
    *[("--lr", value) for value in ["0", "-1", "", "nan", "inf", "-inf", "x", "1e9"]],
    *[("--minutes", value) for value in ["0", "-1", "nan", "inf", "1e9"]],
    *[("--ema", value) for value in ["1", "-0.1", "nan", ""]],
    *[("--label-dropout", value) for value in ["1.1", "-0.1", "nan"]],
    *[("--clip-norm", value) for value in ["0", "-1", "nan", "inf"]],
    *[("--weight-decay", value) for value in ["-1", "nan", "inf"]],
    *[("--seed", value) for value in ["-1", "1.5", "", "9" * 40]], ("--warmup", "-1"), ("--warmup", "1.5"),
])
def test_numbers_out_of_range_are_one_line(tmp_path, monkeypatch, flag, value):
    monkeypatch.setattr(train, "train", lambda *args: None)
    result = call(train, "--out", tmp_path / "run", flag, value)
    assert_one_line(result, 2, flag)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, words", [
    (["--dataset", "CIFAR10"], ["MNIST", "FashionMNIST", "KMNIST", "EMNIST", "QMNIST"]),
    (["--schedule", "quadratic"], ["linear", "cosine"]),
    (["--device", "tpu"], ["auto", "cpu", "cuda", "mps"]),
    (["--precision", "fp8"], ["fp32", "bf16"]),
    (["--weighting", ""], ["v", "balanced", "simple"]),
    (["--epoch", "3"], ["unrecognized arguments: --epoch"]),
    (["here"], ["unrecognized arguments: here"]),
    (["--lr"], ["expected one argument"]),
    (["--minutes", "1", "--epochs", "2"], ["--minutes", "--epochs"]),
    (["--minutes", "1", "--max-steps", "2"], ["--minutes", "--max-steps"]),
    (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
])
def test_bad_usage_is_one_line(flags, words, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *args: None)
    assert_one_line(call(train, *flags), 2, *words)


def test_help_names_every_flag():
    result = call(train, "--help")
    assert result.code == 0 and result.err == ""
    for name, (default, _, _) in train.SETTINGS.items():
        assert "--" + name.replace("_", "-") in result.out
        assert default is None or str(default) in result.out
    assert "None" not in result.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(tmp_path):
    result = call(train, "--device", "cuda", "--out", tmp_path / "run")
    assert_one_line(result, 1, "--device cuda", "--device cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("out", ["file", "file/run", "x" * 300])
def test_an_out_that_cannot_be_written_is_one_line(tmp_path, out):
    (tmp_path / "file").write_text("a file, so that nothing can be made below it, not even by root")
    assert_one_line(call(train, *FLAGS, "--max-steps", 2, "--out", tmp_path / out), 1, tmp_path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("failing", ["settings.json", "metrics.csv"])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch, failing):
    trained(tmp_path, "--max-steps", 2)
    saved, atomic_write = (tmp_path / "checkpoint.pt").read_bytes(), train.atomic_write

    def full(path):
        if Path(path).name == failing:
            raise OSError(28, "No space left on device", str(path))
        return atomic_write(path)

    monkeypatch.setattr(train, "atomic_write", full)
    result = call(train, *FLAGS, "--max-steps", 4, "--report-every", 4, "--resume", "--out", tmp_path)
    assert_one_line(result, 1, "No space left on device", failing)
    assert (tmp_path / "checkpoint.pt").read_bytes() == saved
