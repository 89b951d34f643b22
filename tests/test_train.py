"""Training: every image once, each formula of the loop by hand, and failures that lose nothing.

What a run says of itself: test_reports.py. What happens to one that is interrupted: test_resume.py.
"""
import copy
import math
import os
import shlex
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch

import sample
import train
from ddpm import DDPM
from diffusion_model import Model, UNet, build_network
from diffusion_schedules import make_betas
from fake_device import pretend
from helpers import (FLAGS, N, NETWORK, ROOT, assert_one_line, before_step, call, crash, few_digits, metrics, run_in,
                     same, trained)
from sample import draw
from utils import checkpoint
from utils.checkpoint import Progress, load_checkpoint, save_checkpoint
from utils.data import DATASETS, load_dataset, to_uint8
from utils.images import load_images
from utils.metrics import Validation
from utils.muon import make_optimizers
from utils.settings import SETTINGS, SHIPPED

CPU = torch.device("cpu")
SAMPLE = f"python {os.path.relpath(ROOT / 'sample.py')}"


@pytest.fixture(scope="module", autouse=True)
def quick():
    with few_digits():
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Batches

def batches(steps, images=50, device="cpu", timesteps=1000, schedule="linear", weighting="simple", **settings):
    """draw_batch of each step. Of so many images of one pixel, whose grey level is their number; labels: its last
    digit."""
    settings = {"seed": 0, "batch_size": 7, "label_dropout": 0.0, "classes": 10} | settings
    if isinstance(images, int):
        images = torch.arange(images, device=device).to(torch.uint8).view(-1, 1, 1, 1)
    p, *_ = train.objective(DDPM(make_betas(schedule, timesteps)), weighting, CPU)
    labels = torch.arange(len(images), device=device) % 10
    return [train.draw_batch(step, images, labels, settings, p) for step in steps]


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
    (x0, y, _, _), = batches([0], images, batch_size=5)
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


@pytest.fixture
def generators(monkeypatch):
    """The device and seed of every random generator that is made, in a list that fills. They are the CPU's, since one
    of another device would need the device."""
    made = []

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            made.append([torch.device(device).type])
            return super().__new__(cls)

        def manual_seed(self, seed):
            made[-1].append(seed)
            return super().manual_seed(seed)

    monkeypatch.setattr(torch, "Generator", Generator)
    return made


def test_no_two_things_share_a_random_stream(generators):
    """Neither the orders of two epochs, nor two steps, nor one of each, and none with those of another seed."""
    for seed in 0, 1:
        batches(range(20), images=53, seed=seed)  # of three epochs, whose order no other test has asked for
    seeds = [seed % 2**32 for _, seed in generators]  # torch keeps 32 bits on the CPU
    assert len(set(seeds)) == len(seeds) == 2 * (20 + 3)


def test_other_lengths_of_training_draw_the_same():
    assert same(batches([5]), batches([5], epochs=3, max_steps=9))


@pytest.mark.parametrize("timesteps, batch_size, steps", [(20, 7, 2000), (1000, 640, 200), (4, 1, 2000), (1, 7, 20)])
def test_timesteps_are_uniform_from_the_first_to_the_last(timesteps, batch_size, steps):
    t = torch.cat([t for _, _, t, _ in batches(range(steps), timesteps=timesteps, batch_size=batch_size)])
    assert t.dtype == torch.long and t.min() == 0 and t.max() == timesteps - 1
    counts = torch.bincount(t, minlength=timesteps).double()
    p = 1 / timesteps
    assert (counts - len(t) * p).abs().max() <= 5 * math.sqrt(len(t) * p * (1 - p))


@pytest.mark.parametrize("weighting, power, of_noise", [("v", 0.25, 0), ("balanced", 0, 0), ("medium", 0.25, 0.25)])
@pytest.mark.parametrize("schedule", ["linear", "logsnr"])
def test_timesteps_are_drawn_in_proportion(schedule, weighting, power, of_noise):
    drawn = batches(range(150), timesteps=20, batch_size=640, weighting=weighting, schedule=schedule)
    counts = torch.bincount(torch.cat([t for _, _, t, _ in drawn]), minlength=20).double()
    a = DDPM(make_betas(schedule, 20)).alpha_bars
    p = a ** power * (1 - a) ** of_noise
    p /= p.sum()
    assert (abs(counts - 150 * 640 * p) <= 5 * (150 * 640 * p * (1 - p)).sqrt()).all()


def test_a_draw_that_rounds_up_to_one_is_still_a_timestep(monkeypatch):
    largest = torch.tensor(1.0).nextafter(torch.tensor(0.0))
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: largest.expand(*shape).clone())
    (_, _, t, _), = batches([0], batch_size=64)
    assert t.max() == 999


def test_timesteps_are_independent_of_the_images():
    """Over many epochs each image meets low and high timesteps alike."""
    total = torch.zeros(50)
    for x0, _, t, _ in batches(range(1000), batch_size=35):
        total[to_uint8(x0).flatten().long()] += t
    mean, deviation = 999 / 2, 1000 / math.sqrt(12) / math.sqrt(700)
    assert (total / 700 - mean).abs().max() < 5 * deviation


def test_noise_is_standard_normal_and_new_at_each_step():
    noise = torch.cat([noise for *_, noise in batches(range(600))]).flatten()
    n = len(noise)
    assert abs(noise.mean()) < 5 / math.sqrt(n) and abs(noise.var() - 1) < 5 * math.sqrt(2 / n)
    assert len(noise.unique()) > 0.99 * n


def test_everything_is_drawn_on_the_device_of_the_images(generators):
    """On the meta device. The order of an epoch alone is the CPU's everywhere."""
    drawn, = batches([3], images=54, device="meta", batch_size=8, label_dropout=0.1, weighting="v")
    assert [x.device.type for x in drawn] == ["meta"] * 4
    assert sorted(device for device, _ in generators) == ["cpu", "meta"]


def test_the_loss_on_a_fake_gpu():
    ddpm = DDPM(make_betas("linear", 20))
    with pretend("cuda") as home:
        model = Model(build_network(NETWORK).requires_grad_(False).to(home), ddpm, NETWORK)
        x0, noise, t = (x.to(home) for x in (*torch.zeros(2, 4, 1, 28, 28), torch.zeros(4, dtype=torch.long)))
        losses = ddpm.loss(lambda x_t, t: model(x_t, t, t), x0, t, noise)
        assert losses.device == home and losses.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# The loop, by hand

@pytest.fixture
def states(monkeypatch):
    """Copies of all that is saved, in a list that fills while a run goes on."""
    kept, save_checkpoint = [], checkpoint.save_checkpoint

    def keep(path, state):
        kept.append(state | {name: copy.deepcopy(state[name]) for name in ("model", "ema")})
        save_checkpoint(path, state)

    monkeypatch.setattr(checkpoint, "save_checkpoint", keep)
    return kept


@pytest.mark.parametrize("limit", [0.999, 0.15])
def test_the_moving_average_by_hand(tmp_path, states, limit):
    """With its warm-up, and of the weights after the optimiser's step."""
    run_in(tmp_path, "--max-steps", 3, "--save-every", 1, "--ema", limit)
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
    sampled, judged, draw, losses = [], [], train.draw, Validation.losses

    def weights(model):
        return {name: value.clone() for name, value in model.network.state_dict().items()}

    monkeypatch.setattr(train, "draw", lambda model, n, **how: sampled.append(weights(model)) or draw(model, n, **how))
    monkeypatch.setattr(Validation, "losses", lambda validation, model: judged.append(weights(model))
                        or losses(validation, model))
    run_in(tmp_path, "--max-steps", 6, "--report-every", 3, "--save-every", 3)
    assert len(sampled) == 2 and same(sampled[0], states[0]["ema"]) and not same(sampled[0], states[0]["model"])
    assert same(judged, sampled)


def test_training_is_told_the_labels(tmp_path, monkeypatch):
    told, predict_noise = [], Model.__call__
    monkeypatch.setattr(Model, "__call__", lambda model, x_t, t, labels=None: torch.is_grad_enabled()
                        and told.append(labels) or predict_noise(model, x_t, t, labels))
    run_in(tmp_path, "--max-steps", 2, "--label-dropout", 0)
    assert len(told) == 2 and all(labels.max() < 10 and len(labels.unique()) > 1 for labels in told)


@pytest.mark.parametrize("warmup, max_steps", [(4, 10), (0, 3), (100, 5), (4, 32)])
def test_the_learning_rate_by_hand(tmp_path, warmup, max_steps):
    """It rises over the warm-up and follows half a cosine over --epochs, not over --max-steps."""
    total = math.ceil(4 * N / 25)
    run_in(tmp_path, "--epochs", 4, "--max-steps", max_steps, "--warmup", warmup, "--report-every", 1, "--lr", 0.003,
           "--batch-size", 25)
    rates = [float(row["lr"]) for row in metrics(tmp_path)]
    assert rates == pytest.approx([
        0.003 * min(1, (step + 1) / max(1, warmup)) * (1 + math.cos(math.pi * step / total)) / 2
        for step in range(max_steps)])
    if max_steps == total:
        assert rates[-1] < 0.003 / 400


def test_an_epoch_ends_after_its_images(tmp_path):
    assert run_in(tmp_path, "--epochs", 1, "--batch-size", 70)["step"] == math.ceil(N / 70)
    assert float(metrics(tmp_path)[-1]["epoch"]) == pytest.approx(3 * 70 / N)


def test_max_steps_end_a_run_and_never_lengthen_it(tmp_path):
    for steps, expected in (4, 4), (9, N // 40):
        flags = ["--batch-size", 40, "--epochs", 1, "--max-steps", steps, "--out", tmp_path / str(steps)]
        assert f"length      {expected} steps\n" in call(train, *FLAGS, *flags).out
        assert load_checkpoint(tmp_path / str(steps) / "checkpoint.pt")["step"] == expected


def test_schedule_and_precision_are_those_of_the_settings(tmp_path, monkeypatch):
    models, model = [], train.Model
    monkeypatch.setattr(train, "Model", lambda *args: models.append(model(*args)) or models[-1])
    run_in(tmp_path, "--max-steps", 1, "--schedule", "cosine", "--precision", "bf16")
    training, average = models
    assert training.precision == "bf16" and average.precision == "fp32"
    assert torch.equal(training.ddpm.betas, make_betas("cosine", 20)) and average.ddpm is training.ddpm


def test_minutes_end_in_time_with_a_learning_rate_near_zero(tmp_path, monkeypatch, clock):
    """After 17.85 steps of 40 ms. Time before a resume counts, and that between two runs does not."""
    before_step(monkeypatch, 9, lambda: signal.raise_signal(signal.SIGTERM))
    flags = ["--minutes", 0.0119, "--report-every", 1, "--batch-size", 40, "--out", tmp_path]
    assert call(train, *FLAGS, *flags).code == 143
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 10
    clock.now += 1000
    assert call(train, *FLAGS, *flags, "--resume").code == 0
    state, rows = load_checkpoint(tmp_path / "checkpoint.pt"), metrics(tmp_path)
    assert state["step"] == 18 and state["seconds"] == pytest.approx(0.72)
    assert [float(row["lr"]) for row in rows[4:]] == pytest.approx(
        [0.01 * (1 + math.cos(math.pi * step * 0.04 / (60 * 0.0119))) / 2 for step in range(4, 18)])


@pytest.mark.parametrize("module, slow, step", [(Validation, "losses", 2), (train, "report", 3)])
def test_the_time_of_reports_is_part_of_the_budget(tmp_path, monkeypatch, clock, module, slow, step):
    """Also for a run that is killed right after a save, and resumed: the time of a validation is in a save of the same
    step, that of writing a report's files in the next save."""
    function = getattr(module, slow)

    def slowly(*args):
        clock.now += 10
        return function(*args)

    monkeypatch.setattr(module, slow, slowly)
    before_step(monkeypatch, step, crash)
    assert call(train, *FLAGS, "--minutes", 1, "--report-every", 2, "--save-every", 1, "--out", tmp_path).code == 1
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == step and state["seconds"] == pytest.approx(10 + 0.04 * step)


def first_batch(settings):
    """x0, labels, t and noise of the first step, and T p of its timesteps: how much oftener than others they are
    drawn."""
    a = DDPM(make_betas(settings["schedule"], 20)).alpha_bars
    p = {"v": a ** 0.25, "medium": a ** 0.25 * (1 - a) ** 0.25}.get(settings["weighting"], torch.ones_like(a))
    drawn = train.draw_batch(0, *load_dataset("MNIST"), settings, p / p.sum())
    return *drawn, (20 * p / p.sum())[drawn[2]]


def test_the_images_are_judged_by_the_clipped_v(tmp_path, monkeypatch):
    """The first loss, from batch, network and formula alone."""
    first = []
    loss = DDPM.loss
    monkeypatch.setattr(DDPM, "loss", lambda *args: first.append(loss(*args)) or first[-1])
    settings = run_in(tmp_path, "--max-steps", 1, "--precision", "fp32")["settings"]
    x0, y, t, noise, _ = first_batch(settings)
    torch.manual_seed(0)
    a = DDPM(make_betas(settings["schedule"], 20)).alpha_bars[t].float().view(-1, 1, 1, 1)
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
    v = build_network(settings)(x_t, t, y)
    x0_hat = (a.sqrt() * x_t - (1 - a).sqrt() * v).clamp(-1, 1)
    expected = (noise - (x_t - a.sqrt() * x0_hat) / (1 - a).sqrt()).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(first[0], expected)


@pytest.mark.parametrize("weighting, clip_norm", [
    ("balanced", 1e6), ("simple", 1e6), ("v", 1e6), ("medium", 1e6), ("balanced", 1e-3)])
def test_the_first_update_by_hand(tmp_path, weighting, clip_norm):
    """From the gradient g of the weighted loss AdamW has the moments (1 - beta1) g and (1 - beta2) g^2, and so steps by
    the learning rate times the sign of g."""
    state = run_in(tmp_path, "--max-steps", 1, "--optimizer", "adamw", "--warmup", 0, "--precision", "fp32",
                    "--lr", 0.01, "--weight-decay", 0.5, "--weighting", weighting, "--clip-norm", clip_norm)
    settings, moments = state["settings"], state["optimizer"][0]["state"].values()
    x0, y, t, noise, often = first_batch(settings)
    torch.manual_seed(0)
    model = Model(build_network(settings), DDPM(make_betas(settings["schedule"], 20)), settings)
    weights = model.ddpm.alpha_bars[t] ** {"medium": -1, "v": -1, "balanced": -0.5, "simple": 0}[weighting]
    losses = model.ddpm.loss(lambda x_t, t: model(x_t, t, y), x0, t, noise)
    gradients = torch.autograd.grad((weights * losses).mean(), list(model.network.parameters()))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    assert float(metrics(tmp_path)[0]["grad_norm"]) == pytest.approx(norm, rel=1e-4)
    # Of timesteps that are drawn in proportion to p the loss is divided by T p, for an estimate of L_simple.
    estimate = (losses.detach() / often).mean().item()
    assert float(metrics(tmp_path)[0]["train_loss"]) == pytest.approx(estimate, rel=1e-4)
    for (name, before), g, saved in zip(model.network.named_parameters(), gradients, moments, strict=True):
        g = g * min(1, clip_norm / norm)
        torch.testing.assert_close(saved["exp_avg"], 0.1 * g, rtol=1e-3, atol=1e-6 * norm)
        torch.testing.assert_close(saved["exp_avg_sq"], 0.01 * g * g, rtol=2e-3, atol=1e-9 * norm ** 2)
        after = before * (1 - 0.01 * 0.5) - 0.01 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(state["model"][name], after, rtol=1e-4, atol=1e-4)


# The parts of the network whose matrices are Muon's
INSIDE = {"down", "downsample", "middle", "upsample", "up", "full"}


def is_inside(name, weight):
    parts = set(name.split("."))
    return weight.ndim > 1 and bool(INSIDE & parts) and not {"scale_shift", "mixing"} & parts


def test_muon_trains_the_matrices_inside_the_network_and_adamw_the_rest(tmp_path, states, monkeypatch):
    """All of them: the ends are 0 at first, so that what lies before them has to wait for a step or two each."""
    built = []
    monkeypatch.setattr(train, "make_optimizers", lambda *args: built.extend(make_optimizers(*args)) or built)
    run_in(tmp_path, "--max-steps", 6, "--save-every", 1)
    first, last = states[0], states[-1]
    inside = [value.shape for name, value in last["model"].items() if is_inside(name, value)]
    adamw, muon = last["optimizer"]
    assert [moments["momentum"].shape for moments in muon["state"].values()] == inside
    assert len(adamw["state"]) == len(last["model"]) - len(inside)
    first_rate, second_rate = (optimizer.param_groups[0]["lr"] for optimizer in built)
    assert first_rate == second_rate != 5e-3
    assert [name for name in first["model"] if same(first["model"][name], last["model"][name])] == []


def test_what_is_summed_up_holds_no_graph(tmp_path, monkeypatch):
    """Else the graphs of all steps since the last report stay in memory."""
    graphs, add = [], Progress.add
    monkeypatch.setattr(Progress, "add", lambda progress, *what: add(progress, *what)
                        or graphs.append(progress.sums.requires_grad))
    run_in(tmp_path, "--max-steps", 3)
    assert graphs == [False] * 3


def test_the_class_shares_are_those_of_the_images(tmp_path):
    shares = run_in(tmp_path, "--max-steps", 1)["settings"]["class_shares"]
    labels = load_dataset("MNIST")[1].tolist()
    assert shares == pytest.approx([labels.count(digit) / N for digit in range(10)])


def test_training_makes_the_loss_smaller(tmp_path):
    run_in(tmp_path, "--max-steps", 24, "--report-every", 8, "--batch-size", 32)
    losses = [float(row["train_loss"]) for row in metrics(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]


def test_reports_do_not_disturb_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw", draw)
    flags = ["--timesteps", 4, "--max-steps", 4]
    often = run_in(tmp_path / "often", *flags, "--report-every", 2)
    never = run_in(tmp_path / "never", *flags, "--report-every", 1000)
    for name in "model", "ema", "optimizer":
        assert same(often[name], never[name])


def test_each_weight_has_one_optimizer():
    """Muon the matrices inside the network, AdamW the rest or, if asked to, all; with the settings' rates."""
    settings = {name: setting.default for name, setting in SETTINGS.items()} | NETWORK | {"lr": 0.3}
    network = build_network(settings)
    names = {p: name for name, p in network.named_parameters()}
    adamw, muon = ([names[p] for p in optimizer.param_groups[0]["params"]]
                   for optimizer in make_optimizers(network, settings))
    assert sorted(adamw + muon) == sorted(names.values())
    assert set(muon) == {name for p, name in names.items() if is_inside(name, p)}
    for optimizer in make_optimizers(network, settings):
        assert optimizer.param_groups[0]["lr"] == 0.3 and optimizer.param_groups[0]["weight_decay"] == 0.01

    alone, = make_optimizers(network, settings | {"optimizer": "adamw"})
    assert isinstance(alone, torch.optim.AdamW) and len(alone.param_groups[0]["params"]) == len(names)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_float32_in_any_precision(tmp_path, precision):
    state = run_in(tmp_path, "--max-steps", 3, "--precision", precision)
    assert state["settings"]["precision"] == precision
    moments = [value for optimizer in state["optimizer"] for entry in optimizer["state"].values()
               for value in entry.values()]
    assert {x.dtype for x in [*state["model"].values(), *state["ema"].values(), *moments]} == {torch.float32}


@pytest.mark.parametrize("batch_size", [1, 3, 150])
def test_the_network_never_sees_more_images_at_once_than_in_a_step(tmp_path, monkeypatch, batch_size):
    """Neither in a report nor before the first step: memory that is enough for training is enough."""
    sizes, forward = [], UNet.forward
    monkeypatch.setattr(train, "draw", sample.draw)
    monkeypatch.setattr(UNet, "forward", lambda network, x_t, *of: sizes.append(len(x_t)) or forward(network, x_t, *of))
    run_in(tmp_path, "--batch-size", batch_size, "--timesteps", 2, "--max-steps", 1)
    assert max(sizes) == batch_size and sum(sizes) >= batch_size + 40 + 2 * 64


# ----------------------------------------------------------------------------------------------------------------------
# Where it goes, and the run that ships

def test_a_run_goes_to_runs_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(train, *FLAGS, "--max-steps", 1).code == 0
    assert Path("runs/mnist/checkpoint.pt").is_file()


def test_the_shipped_model_is_what_train_makes_without_flags():
    """To its end, and the README says so. The precision is the machine's, and some settings are those of pictures."""
    state = load_checkpoint(SHIPPED)
    others = "precision", "images", "image_size", "grey", "skip_broken", "images_used"
    made = {name: setting.default for name, setting in SETTINGS.items() if name not in others}
    assert {name: state["settings"][name] for name in made} == made
    assert state["step"] == math.ceil(made["epochs"] * 60_000 / made["batch_size"])
    assert f"`python train.py`: {state['step']:,} steps" in " ".join((ROOT / "README.md").read_text().split())


# ----------------------------------------------------------------------------------------------------------------------
# Ends before the end

def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, monkeypatch):
    loss, steps = DDPM.loss, []

    def failing(*args):
        steps.append(torch.is_grad_enabled())
        return loss(*args) * (torch.nan if sum(steps) == 8 else 1)

    monkeypatch.setattr(DDPM, "loss", failing)
    result = call(train, *FLAGS, "--max-steps", 20, "--save-every", 5, "--out", tmp_path)
    assert_one_line(result, 1, "NaN or infinite", "step 7", tmp_path / "checkpoint.pt", "--lr")
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == 5 and all(torch.isfinite(value).all() for value in state["ema"].values())
    monkeypatch.setattr(DDPM, "loss", loss)
    run_in(tmp_path, "--max-steps", 10, "--resume")


@pytest.mark.parametrize("flags", [["--save-every", 2], ["--save-every", 4, "--report-every", 4]])
def test_what_is_not_finite_is_never_saved_even_if_it_is_noticed_late(tmp_path, monkeypatch, flags):
    """As on a GPU, where most steps do not look at their numbers."""
    loss, steps, add = DDPM.loss, [], Progress.add

    def failing(*args):
        steps.append(torch.is_grad_enabled())
        return loss(*args) * (torch.nan if sum(steps) == 7 else 1)

    def add_unseen(progress, *what):
        with mock.patch.object(progress, "check_finite"):
            add(progress, *what)

    monkeypatch.setattr(Progress, "add", add_unseen)
    monkeypatch.setattr(DDPM, "loss", failing)
    result = call(train, *FLAGS, "--max-steps", 12, *flags, "--out", tmp_path)
    assert_one_line(result, 1, "NaN or infinite", tmp_path / "checkpoint.pt")
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] in (4, 6)
    assert all(torch.isfinite(value).all() for name in ("model", "ema") for value in state[name].values())


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, value):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: torch.tensor(value))
    result = call(train, *FLAGS, "--max-steps", 20, "--out", tmp_path)
    assert_one_line(result, 1, "NaN or infinite", "nothing was saved yet")
    assert not (tmp_path / "checkpoint.pt").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Misuse

def test_each_optimizer_has_a_learning_rate_of_its_own(tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(train, "train", lambda flags, settings, *rest: rates.append(settings["lr"]))
    for flags in [], ["--optimizer", "muon"], ["--optimizer", "adamw"], ["--optimizer", "adamw", "--lr", 0.007]:
        assert call(train, *FLAGS, *flags, "--out", tmp_path).code == 0
    assert rates == [0.005, 0.005, 0.002, 0.007]


@pytest.mark.parametrize("flags, device, expected", [
    ([], "cpu", (128, 128)), (["--minutes", 0.5], "cpu", (64, 64)), (["--minutes", 15], "cpu", (64, 64)),
    (["--minutes", 15.1], "cpu", (128, 128)), (["--minutes", 5], "cuda", (128, 128)),
    (["--max-steps", 9], "cpu", (128, 128)), (["--minutes", 5, "--width", 96], "cpu", (96, 64)),
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
    assert shlex.split(printed)[2:] == [
        *SAMPLE.split(), "--checkpoint", str(out / "checkpoint.pt"), "--n", "64", "--gif"]
    before_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    result = call(train, *flags, "--overwrite")
    command = shlex.split(result.err.split("Go on with: ")[1])
    assert command == ["python", "train.py", *map(str, flags), "--resume"]


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
    (["--dataset", "SVHN"], ["MNIST", "FashionMNIST", "KMNIST", "EMNIST", "QMNIST"]),
    (["--schedule", "quadratic"], ["linear", "cosine"]),
    (["--device", "tpu"], ["auto", "cpu", "cuda", "mps"]),
    (["--precision", "fp8"], ["fp32", "bf16"]),
    (["--weighting", ""], ["medium", "v", "balanced", "simple"]),
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
    for name, setting in SETTINGS.items():
        assert "--" + name.replace("_", "-") in result.out
        assert setting.default in (None, False) or str(setting.default) in result.out
    assert "None" not in result.out and "False" not in result.out


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


@pytest.fixture
def full_disk(monkeypatch):
    """A function that names the files that have no room on the disk any more."""
    replace, full = os.replace, set()

    def replacing(source, target):
        if Path(target).name in full:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replacing)
    return full.update


@pytest.mark.parametrize("failing", ["settings.json", "checkpoint.pt"])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, full_disk, failing):
    run_in(tmp_path, "--max-steps", 2)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    full_disk([failing])
    result = call(train, *FLAGS, "--max-steps", 4, "--resume", "--out", tmp_path)
    assert_one_line(result, 1, "No space left on device", failing)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path, full_disk):
    """Each of its files is one, and none of them keeps the next report from being whole."""
    full_disk(["metrics.csv", "loss.png", "step_0000002.png"])
    result = call(train, *FLAGS, "--max-steps", 3, "--report-every", 2, "--out", tmp_path)
    assert result.code == 0 and load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3
    said = result.err.splitlines()
    assert len(said) == 5 and all("warning: " in line and "No space left on device" in line for line in said)
    for name in "metrics.csv", "loss.png", "step_0000002.png":
        assert any(name in line for line in said)
    assert os.listdir(tmp_path / "samples") == ["step_0000003.png"]
    full_disk.__self__.clear()
    run_in(tmp_path, "--max-steps", 4, "--resume")
    assert [row["step"] for row in metrics(tmp_path)] == ["2", "4"]


def test_images_that_no_model_may_have_are_refused_before_training(tmp_path, monkeypatch):
    """They could be trained on, but what came of it would not be loaded."""
    images = torch.zeros(8, 1, 516, 516, dtype=torch.uint8)
    monkeypatch.setitem(DATASETS, "MNIST", lambda root, train: (images, torch.arange(8) % 2))
    result = call(train, *FLAGS, "--out", tmp_path, "--max-steps", 1)
    assert_one_line(result, 1, "MNIST", "image_size", "516", "512")
    assert not (tmp_path / "checkpoint.pt").exists()


# ----------------------------------------------------------------------------------------------------------------------
# What a run begins with

def test_a_run_begins_with_the_weights_of_another_model(tmp_path):
    """The averaged ones. All of them, or those that fit: a network with another width has few in common."""
    source = trained()
    run_in(tmp_path / "same", "--init", source, "--lr", 1e-9, "--max-steps", 1, "--overwrite")
    ours, theirs = load_checkpoint(tmp_path / "same" / "checkpoint.pt"), load_checkpoint(source)
    for name, value in theirs["ema"].items():
        torch.testing.assert_close([ours["model"][name], ours["ema"][name]], [value, value], rtol=0, atol=1e-6)
    assert ours["step"] == 1 and len(ours["ema"]) == len(theirs["ema"])

    result = call(train, *FLAGS, "--width", 16, "--init", source, "--max-steps", 1, "--out", tmp_path / "wide")
    line = next(line for line in result.out.splitlines() if line.startswith("weights"))
    assert "pixel.weight" not in line and "unet.stem.weight" in line and str(source) in line
    result = call(train, *FLAGS, "--init", source, "--max-steps", 1, "--out", tmp_path / "all")
    assert "new are: none" in result.out
    older = {name: value for name, value in theirs["ema"].items() if "pixel" not in name}  # without a layer
    save_checkpoint(tmp_path / "older.pt", theirs | {"ema": older})
    result = call(train, *FLAGS, "--init", tmp_path / "older.pt", "--max-steps", 1, "--out", tmp_path / "old")
    assert "new are: pixel.bias, pixel.weight\n" in result.out
    older["unet.stem.bias"] = older["unet.stem.bias"] * math.nan
    save_checkpoint(tmp_path / "nan.pt", theirs | {"ema": older})
    result = call(train, *FLAGS, "--init", tmp_path / "nan.pt", "--max-steps", 1, "--out", tmp_path / "nan")
    assert_one_line(result, 1, "stem.bias", "NaN")


def test_a_run_that_begins_with_the_weights_of_another_model_has_a_network_like_that_one(tmp_path, monkeypatch):
    """Even a short one, which would have a small one by itself. Unless asked otherwise. And its levels."""
    state, saved = load_checkpoint(trained()), []  # trained before nothing trains any more
    monkeypatch.setattr(train, "train", lambda flags, settings, *args: saved.append(settings))
    changed = state["settings"] | {"schedule": "cosine", "levels": [7, 9]}
    save_checkpoint(tmp_path / "c.pt", state | {"settings": changed})
    for flags in ["--minutes", 1], ["--minutes", 1, "--depth", 2, "--network", "unet", "--schedule", "linear"]:
        result = call(train, "--init", tmp_path / "c.pt", *flags, "--out", tmp_path, "--device", "cpu")
        assert result.code == 0, result.err
    assert [[settings[name] for name in ("network", "width", "depth", "batch_size", "schedule", "timesteps", "levels")]
            for settings in saved] == [["bayes", 8, 1, 64, "cosine", 20, [7, 9]],
                                       ["unet", 8, 2, 64, "linear", 20, [7, 9]]]


@pytest.mark.parametrize("flags, code, words", [
    (["--init", "missing.pt"], 1, ["missing.pt"]), (["--init", "", "--max-steps", 1], 2, ["--init"]),
    (["--init", SHIPPED, "--resume"], 2, ["--init", "--resume"]),
    (["--init", SHIPPED, "--network", "unet"], 1, ["no weight in", "fits"])])
def test_weights_that_cannot_be_had_are_one_line(tmp_path, flags, code, words):
    assert_one_line(call(train, *FLAGS, "--out", tmp_path, *flags), code, *words)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_compiled_network_trains_to_the_same_weights(tmp_path, monkeypatch):
    """And its checkpoint has the same names. (Here by the backend that takes no compiler.)"""
    flags, compile, compiled = ["--max-steps", 3, "--precision", "fp32"], torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile",
                        lambda network: compiled.append(network) or compile(network, backend="eager"))
    plain, fast = (run_in(tmp_path / str(len(flag)), *flags, *flag) for flag in ([], ["--compile"]))
    assert len(compiled) == 1 and same(plain["model"], fast["model"]) and same(plain["ema"], fast["ema"])


def test_a_run_on_some_of_the_images(tmp_path):
    """Those that the seed draws, each of them once an epoch."""
    result = call(train, *FLAGS, "--images-used", 20, "--epochs", 2, "--out", tmp_path)
    assert "images      20 of MNIST" in result.out and load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 5
    settings = {"dataset": "MNIST", "images_used": 20}
    drawn = [load_images(settings | {"seed": seed})[0] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    every = {image.numpy().tobytes() for image in load_dataset("MNIST")[0]}
    assert len({image.numpy().tobytes() for image in drawn[0]} & every) == 20
    assert len(load_images(settings, train=False)[0]) == 40  # of the validation all
    assert_one_line(call(train, *FLAGS, "--images-used", N + 1, "--out", tmp_path / "x"), 1, N + 1, f"{N} images")


def test_some_of_the_images_need_not_have_all_labels(tmp_path, monkeypatch):
    """The model knows the last class all the same, and draws none of it unless it is asked to."""
    images, labels = load_dataset("MNIST")
    labels = torch.zeros_like(labels)
    labels[0] = 9
    monkeypatch.setitem(DATASETS, "MNIST", lambda root, train: (images, labels))
    settings = {"dataset": "MNIST", "images_used": 20}
    seed = next(seed for seed in range(9) if load_images(settings | {"seed": seed})[1].max() == 0)
    state = run_in(tmp_path, "--images-used", 20, "--seed", seed, "--max-steps", 2)
    assert state["settings"]["classes"] == 10 and state["settings"]["class_shares"] == [1.0, *[0.0] * 9]


def test_no_two_streams_of_a_run_are_the_same(tmp_path, monkeypatch):
    """Neither of two steps, nor of what is drawn for a step and by the network in it, nor of the order of an epoch."""
    streams, fold_in = [], train.fold_in
    monkeypatch.setattr(train, "fold_in", lambda *numbers: streams.append(fold_in(*numbers)) or streams[-1])
    train.shuffled.cache_clear()
    run_in(tmp_path, "--max-steps", 5, "--images-used", 20)
    assert len(streams) == len(set(streams)) == 2 * 5 + 2
