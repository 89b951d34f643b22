"""What once broke in the hands of strangers, each with its right value: schedules that float32 cannot hold, grids whose
classes stood in rows, GPUs that were waited for, and small mistakes that no test had noticed."""
import contextlib
import gc
import math
import signal
import sys
import weakref
from unittest import mock

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import evaluate
import fake_device
import sample
import train
from ddpm import DDPM, SAMPLERS, ImageNoise
from diffusion_model import Model, UNet
from diffusion_schedules import SCHEDULES, make_betas
from fake_device import Elsewhere, pretend
from helpers import (FLAGS, N, NETWORK, assert_one_line, before_step, call, crash, few_digits, metrics, run_in, start,
                     trained)
from sample import generate
from utils import pictures
from utils.checkpoint import load_checkpoint, load_model, save_checkpoint
from utils.data import class_of, read_npz
from utils.muon import Muon, set_learning_rate


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def quick_runs():
    with few_digits():
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Schedules (their numbers: test_schedules.py)

@pytest.mark.parametrize("name, first, last", [("cosine", 1, 30_000), ("linear", 20, 100_000), ("linear", 1, 4)])
def test_every_usual_number_of_timesteps_is_accepted(name, first, last):
    for T in {first, last, *np.geomspace(first, last, 30).astype(int).tolist()}:
        ddpm = DDPM(make_betas(name, T))
        assert ddpm.T == T and all(table.isfinite().all() for table in ddpm.tables.values())


@pytest.mark.parametrize("betas, words", [
    *[(SCHEDULES["linear"](T), "alpha_bar .* 1e-12") for T in range(5, 19)],
    ([0.5] * 41, "alpha_bar .* 1e-12"), (np.full(2000, 0.02, np.float32), "alpha_bar .* 1e-12"),
    ([1e-13] * 3, "first beta .* 1e-12"), ([math.nan] * 20, "between 0 and 1"), ([0.1, math.inf], "between 0 and 1"),
], ids=lambda value: str(len(value)))
def test_a_process_that_float32_cannot_hold_is_refused_with_the_limit(betas, words):
    with pytest.raises(ValueError, match=words) as error:
        DDPM(betas)
    assert "\n" not in str(error.value)
    DDPM([0.5] * 39)  # half of the image 39 times: 2e-12 is left


@pytest.mark.parametrize("name, T", [("linear", 4), ("linear", 19), ("linear", 100_000), ("cosine", 1),
                                     ("cosine", 30_000)])
def test_at_the_limits_float32_tells_the_image_from_the_noise(name, T):
    """From x_T, by the formula and by a sampler, if the noise is known."""
    ddpm, t = DDPM(make_betas(name, T)), torch.tensor([T - 1])
    x0 = torch.rand(1, 1, 1, 20_000, generator=seeded()) * 2 - 1
    noise = torch.randn(x0.shape, generator=seeded(1))
    x_T = ddpm.q_sample(x0, t, noise)
    assert x_T.dtype == torch.float32 and (ddpm.predict_x0(x_T, t, noise) - x0).abs().max() < 0.2
    (_, _, x0_hat), = ddpm.sample(lambda x, t: noise, x_T, timesteps=[T - 1])
    assert (x0_hat - x0).abs().max() < 0.2


def test_ten_linear_timesteps_are_bad_usage(tmp_path):
    result = call(train, *FLAGS, "--out", tmp_path / "run", "--timesteps", 10, "--schedule", "linear")
    assert_one_line(result, 2, "--timesteps 10", "linear", "1e-12")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("schedule, words", [
    (lambda T: torch.full((T - 1,), 0.02), "19 betas for T = 20"), (lambda T: torch.full((T + 1,), 0.02), "21 betas"),
    (lambda T: torch.full((T,), 0.9), "1e-12"), (lambda T: torch.linspace(0, 0.02, T), "between 0 and 1"),
    (lambda T: torch.full((T,), math.nan), "between 0 and 1"), (lambda T: torch.full((T, 1), 0.02), "table"),
    (lambda T: [], "non-empty"), (lambda T: 0.02, "non-empty"),
])
def test_a_schedule_of_ones_own_is_refused_before_it_trains(schedule, words, tmp_path, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "cosine", schedule)
    assert_one_line(call(train, *FLAGS, "--schedule", "cosine", "--out", tmp_path / "run"), 2, "--timesteps 20", words)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# The order of the classes

UNIFORM = [0.1] * 10
MNIST = [0.0987, 0.1124, 0.0993, 0.1022, 0.0974, 0.0904, 0.0986, 0.1044, 0.0975, 0.0991]
SHARES = {"uniform": UNIFORM, "MNIST": MNIST, "uneven": [0.7, 0.0, 0.2, 0.05, 0.03, 0.01, 0.01], "rare": [0.998, 0.002],
          "letters": [1 / 47] * 47}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_the_first_images_have_their_shares_however_many_they_are(shares):
    labels = np.array([class_of(i, shares) for i in range(3000)])
    counts = (labels[:, None] == np.arange(len(shares))).cumsum(axis=0)
    n = np.arange(1, 3001)[:, None]
    assert np.abs(counts - n * np.array(shares)).max() <= 4.5
    assert (counts[-1] > 0).tolist() == [share > 0 for share in shares]


@pytest.mark.parametrize("columns", range(5, 22))
@pytest.mark.parametrize("shares", [UNIFORM, MNIST], ids=["uniform", "MNIST"])
def test_grids_look_shuffled(shares, columns):
    """Of vertical neighbours in random order 28 % differ by at most one, and 10 % are equal."""
    labels = np.array([class_of(i, shares) for i in range(400)])
    apart = np.abs(labels[columns:] - labels[:-columns])
    assert 0.18 < (apart <= 1).mean() < 0.36 and (apart == 0).mean() < 0.16


def test_the_class_of_an_image_depends_on_its_number_alone():
    settings = NETWORK | {"label_dropout": 0.1}
    model, drawn = Model(torch.nn.Linear(1, 1), DDPM(make_betas("cosine", 12)), settings), []
    for n, batch_size, seed in (60, 64, 0), (45, 7, 0), (60, 1, 3), (31, 64, 2**32 - 1):
        labels = torch.cat([labels for labels, _ in generate(model, n, batch_size=batch_size, seed=seed)])
        assert len(labels) == n and labels.tolist() == [class_of(i, UNIFORM) for i in range(n)]
        drawn.append(labels[:31].tolist())
    assert drawn == [drawn[0]] * 4


# ----------------------------------------------------------------------------------------------------------------------
# Waiting for a GPU

QUESTIONS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal",
             "aten::unique_dim", "aten::_unique2", "aten::bincount", "aten::repeat_interleave"}


class Watched(fake_device.Pretend):
    """The pretended device, which notes what goes to it or comes from it, and whether somebody waits for it: "copy",
    "copy that waits" or "question"."""
    seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.pin_memory:
            pinned = super().__torch_function__(function, types, args, kwargs).clone()
            pinned.is_pinned_here = True
            return pinned
        if function is torch.Tensor.to:
            device, _, non_blocking, _ = torch._C._nn._parse_to(*args[1:], **kwargs)
            # clip_grad_norm_ asks C++ for the device of the gradients, which says that it is the CPU
            if device and device.type != args[0].device.type and "clip_grad" not in sys._getframe(1).f_code.co_filename:
                self.note_copy(args[0], non_blocking)
        elif function is torch.Tensor.cpu and isinstance(args[0], Elsewhere):
            self.seen.append("copy that waits")
        elif function in (torch.Tensor.tolist, torch.Tensor.__contains__) and isinstance(args[0], Elsewhere):
            self.seen.append("question")
        elif function in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") not in (None, "cpu"):
            self.seen.append("copy that waits")
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def note_copy(cls, x, non_blocking):
        cls.seen.append("copy" if non_blocking and getattr(x, "is_pinned_here", False) else "copy that waits")


@contextlib.contextmanager
def watched():
    """pretend("cuda"), in which Watched.seen grows. Yields the device."""
    dispatch = Elsewhere.__torch_dispatch__.__func__

    def noted(cls, function, types, args=(), kwargs=None):
        name = function._schema.name
        indices = [x for x in args[1] if x is not None] if name in ("aten::index", "aten::index_put_") else []
        if name in QUESTIONS or any(x.dtype == torch.bool for x in indices):
            Watched.seen.append("question")
        elif name == "aten::copy_" and type(args[0]) is not type(args[1]) and args[1].ndim:
            Watched.note_copy(args[1], len(args) > 2 and args[2])  # x[0] = 1 is none: numbers travel with the operation
        elif any(type(x) is not Elsewhere and x.ndim for x in indices):
            Watched.seen.append("copy that waits")
        return dispatch(cls, function, types, args, kwargs)

    with mock.patch.object(fake_device, "Pretend", Watched), mock.patch.object(Watched, "seen", []), \
            mock.patch.object(Elsewhere, "__torch_dispatch__", classmethod(noted)), pretend("cuda") as home:
        yield home


NOTICED = {
    "to": (lambda x, home: torch.ones(2).to(home), ["copy that waits"]),
    "to, not pinned": (lambda x, home: torch.ones(2).to(home, non_blocking=True), ["copy that waits"]),
    "to, pinned": (lambda x, home: torch.ones(2).pin_memory().to(home), ["copy that waits"]),
    "as it should be": (lambda x, home: torch.ones(2).pin_memory().to(home, non_blocking=True), ["copy"]),
    "back": (lambda x, home: x.to("cpu", non_blocking=True), ["copy that waits"]),
    "cpu": (lambda x, home: x.cpu(), ["copy that waits"]),
    "tensor": (lambda x, home: torch.tensor([1, 2], device=home), ["copy that waits"]),
    "copy_": (lambda x, home: x.copy_(torch.zeros(2)), ["copy that waits"]),
    "an index": (lambda x, home: x[torch.tensor([1])], ["copy that waits"]),
    "item": (lambda x, home: x.sum().item(), ["question"]), "tolist": (lambda x, home: x.tolist(), ["question"]),
    "bool": (lambda x, home: bool((x > 0).all()), ["question"]), "float": (lambda x, home: float(x[0]), ["question"]),
    "nonzero": (lambda x, home: x.nonzero(), ["question"]), "a mask": (lambda x, home: x[x > 0], ["question"]),
    "nothing": (lambda x, home: torch.zeros(2, device=home) + x[torch.arange(2, device=home)] * 2, []),
}


@pytest.mark.parametrize("action, noted", NOTICED.values(), ids=NOTICED)
def test_what_is_waited_for_is_noticed(action, noted):
    with watched() as home:
        x = torch.ones(2, device=home)
        Watched.seen.clear()
        action(x, home)
        assert Watched.seen == noted


def traffic(first, last, tmp_path, monkeypatch, draw_batch=train.draw_batch, **changed):
    """What is noted in each of these steps of a run, which goes on from step 120 unless that is `changed`."""
    begins = {}
    save_checkpoint(tmp_path / "checkpoint.pt", load_checkpoint(trained()) | changed)
    monkeypatch.setattr(train, "draw_batch", lambda step, *args: begins.update({step: len(Watched.seen)})
                        or draw_batch(step, *args))
    with few_digits(), watched():
        flags = ["--out", tmp_path, "--resume", "--epochs", 5000, "--max-steps", last + 2]
        result = call(train, *flags, "--device", "cuda")
        assert result.code == 0, result.err
        return [Watched.seen[begins[step]:begins[step + 1]] for step in range(first, last + 1)]


def test_a_step_of_training_waits_for_nothing(tmp_path, monkeypatch):
    """Between reports: the numbers of its images go to the GPU, and nothing else goes there or comes back. This run has
    a point of its curve every 512 steps."""
    steps = traffic(20_004, 20_011, tmp_path, monkeypatch, step=20_000, curve=[[512 * k, 0.5] for k in range(1, 40)],
                    since_report={"steps": 20_000, "seconds": 1.0, "sums": [1.0, 1.0, 0.0]})
    assert steps == 8 * [["copy"]]


def test_a_young_run_asks_for_its_loss_every_other_step(tmp_path, monkeypatch):
    """For its curve, which is to have 40 points or more; the longer it is, the more rarely."""
    steps = traffic(123, 126, tmp_path, monkeypatch)
    assert steps in (2 * [["copy"], ["copy", "question"]], 2 * [["copy", "question"], ["copy"]])


def test_a_copy_that_is_added_to_a_step_is_noticed(tmp_path, monkeypatch):
    def draw_batch(step, images, *args, draw_batch=train.draw_batch):
        torch.ones(3).to(images.device)
        return draw_batch(step, images, *args)

    assert traffic(123, 123, tmp_path, monkeypatch, draw_batch)[0][:2] == ["copy that waits", "copy"]


@pytest.mark.parametrize("settings", [{"guidance": 1}, {"guidance": 0}, {"guidance": 2, "guidance_interval": (0, 1e9)},
                                      {"guidance": 2, "guidance_interval": (0.5, 5)}], ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_of_sampling_waits_for_nothing(sampler, settings):
    """The noise of stochastic samplers comes from the CPU, in one copy; the others have nothing to wait for. From the
    second step on, when the tables are there."""
    checkpoint = trained()
    with watched() as home:
        model = load_model(checkpoint, home)
        for labels, process in generate(model, 5, sampler=sampler, steps=5, batch_size=3, **settings):
            next(process)
            for step in range(4):
                Watched.seen.clear()
                next(process)
                assert Watched.seen == (["copy"] if sampler in ("ddpm", "dpm++sde") and step < 3 else [])


# ----------------------------------------------------------------------------------------------------------------------
# Small mistakes that no test had noticed

def test_pixels_follow_from_the_seed():
    """Drawn here with numpy and torch alone: for image i a generator whose seed is mixed from (seed, i)."""
    for seed, indices in (0, [0, 1, 2]), (7, [5, 3]), (2**32 - 1, [2**32 - 1]):
        noise_fn = ImageNoise(seed, indices)
        first, second = noise_fn(torch.empty(len(indices), 1, 3, 5)), noise_fn(torch.empty(len(indices), 1, 3, 5))
        for k, i in enumerate(indices):
            mixed = np.random.SeedSequence((seed, i)).generate_state(2, np.uint32).tolist()
            generator = torch.Generator().manual_seed(mixed[0] + (mixed[1] << 32))
            assert torch.equal(first[k], torch.randn(1, 3, 5, generator=generator))
            assert torch.equal(second[k], torch.randn(1, 3, 5, generator=generator))
    model = load_model(trained())
    (_, process), = generate(model, 1, seed=7)
    mixed = np.random.SeedSequence((7, 0)).generate_state(1, np.uint64).item()
    assert torch.equal(process.x_T[0], torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(mixed)))


def test_norms_divide_by_the_root_of_the_variance_and_1e_5():
    """Over all channels and pixels of an image. Where the variance is as small, it shows."""
    network, found = UNet(width=8, depth=1), 0
    for layer in network.modules():
        if isinstance(layer, torch.nn.GroupNorm):
            x = 0.003 * torch.randn(2, layer.num_channels, 4, 4, generator=seeded()) + 0.5
            variance, mean = torch.var_mean(x, dim=(1, 2, 3), correction=0, keepdim=True)
            torch.testing.assert_close(layer(x), (x - mean) / (variance + 1e-5).sqrt(), rtol=1e-3, atol=1e-4)
            found += 1
    assert found == 7


def test_a_reader_that_leaves_is_exit_code_1(tmp_path):
    process = start("sample.py", "--checkpoint", trained(), "--n", 1, "--steps", 1, "--out", tmp_path)
    process.stdout.close()
    process.wait(timeout=900)
    with process.stderr as stderr:
        assert (process.returncode, stderr.read()) == (1, "") and (tmp_path / "grid.png").exists()


def test_64_images_are_sampled_at_a_time(monkeypatch):
    model = load_model(trained())
    assert [len(labels) for labels, _ in generate(model, 130)] == [64, 64, 2]
    for module in sample, evaluate:
        monkeypatch.setattr(sys, "argv", ["x.py"])
        assert module.parse_flags().batch_size == 64


def test_every_seed_of_32_bits_is_accepted(tmp_path, quick_runs, monkeypatch):
    flags = ["--checkpoint", trained(), "--n", 1, "--steps", 1, "--out", tmp_path, "--npz", tmp_path / "x.npz"]
    pixels = []
    for seed in 2**31 - 1, 2**31, 2**32 - 1:
        assert call(sample, *flags, "--seed", seed).code == 0
        pixels.append(read_npz(tmp_path / "x.npz")[0].numpy().tobytes())
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--seed", str(seed)])
        assert evaluate.parse_flags().seed == seed
    assert len(set(pixels)) == 3
    assert run_in(tmp_path / "run", "--max-steps", 1, "--seed", 2**32 - 1)["settings"]["seed"] == 2**32 - 1
    for module in sample, evaluate, train:
        assert_one_line(call(module, "--seed", 2**32), 2, "--seed", 2**32 - 1)


def test_no_more_images_are_kept_than_the_grid_shows(tmp_path, monkeypatch):
    """Beside those at hand: with --npz there may be a million."""
    monkeypatch.setattr(pictures.Gallery, "GRID", 6)
    alive, most, finished = weakref.WeakSet(), [], sample.finished

    def noted(x):
        gc.collect(1)  # what is young; all else would take long
        most.append(sum(map(len, alive)))
        images = finished(x)
        alive.add(images)
        return images

    monkeypatch.setattr(sample, "finished", noted)
    flags = ["--n", 24, "--batch-size", 2, "--steps", 1, "--out", tmp_path, "--npz", tmp_path / "x.npz"]
    assert call(sample, "--checkpoint", trained(), *flags).code == 0
    assert len(most) == 12 and max(most) <= 6 + 2 and len(read_npz(tmp_path / "x.npz")[0]) == 24
    assert iio.imread(tmp_path / "grid.png").shape == (62 * 7, 92 * 7)  # two rows of three


@pytest.mark.parametrize("n, side, factor", [(1, 32, 22), (2, 62, 11), (64, 242, 2), (130, 362, 1)])
def test_the_grid_is_enlarged_to_be_seen(n, side, factor, tmp_path):
    """By a whole number, to at most 720 pixels. What is as large already is left as it is."""
    assert call(sample, "--checkpoint", trained(), "--n", n, "--steps", 1, "--out", tmp_path).code == 0
    picture = iio.imread(tmp_path / "grid.png")
    assert max(picture.shape) == side * factor
    assert (picture == picture[::factor, ::factor].repeat(factor, axis=0).repeat(factor, axis=1)).all()


def test_by_default_the_rate_rises_for_50_steps(tmp_path, quick_runs):
    flags = ["--width", 8, "--depth", 1, "--timesteps", 20, "--device", "cpu", "--report-every", 1, "--max-steps", 3,
             "--epochs", 20]
    assert call(train, *flags, "--out", tmp_path).code == 0
    rates, total = [float(row["lr"]) for row in metrics(tmp_path)], math.ceil(20 * N / 128)
    assert rates == pytest.approx([5e-3 * (k + 1) / 50 * (1 + math.cos(math.pi * k / total)) / 2 for k in range(3)])


def test_a_report_after_a_resume_has_the_rate_of_the_last_step(tmp_path, quick_runs):
    """Also if no step was made since: the run was killed before its last report."""
    run_in(tmp_path, "--max-steps", 5, "--epochs", 20)
    reported = metrics(tmp_path)
    (tmp_path / "metrics.csv").unlink()
    run_in(tmp_path, "--max-steps", 5, "--resume")
    lr = 5e-3 * (1 + math.cos(math.pi * 4 / math.ceil(20 * N / 8))) / 2
    assert [float(row["lr"]) for row in metrics(tmp_path)] == [float(row["lr"]) for row in reported] == [
        pytest.approx(lr)]


def test_there_is_a_report_after_half_of_the_run(tmp_path, quick_runs):
    """Exactly half of it: of 5 batches of 40, 2.5 are half."""
    run_in(tmp_path, "--epochs", 1, "--batch-size", 40, "--report-every", 1000)
    assert [row["step"] for row in metrics(tmp_path)] == ["3", "5"]
    run_in(tmp_path / "even", "--epochs", 1, "--batch-size", 50, "--report-every", 1000)
    assert [row["step"] for row in metrics(tmp_path / "even")] == ["2", "4"]


def test_the_bar_counts_images_from_where_the_run_stands(tmp_path, quick_runs, monkeypatch):
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


def test_reports_are_of_an_average_that_is_not_trained(tmp_path, quick_runs, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "report", lambda out, progress, model: seen.append(model.network))
    run_in(tmp_path, "--max-steps", 2)
    assert seen and not seen[-1].training and not any(p.requires_grad for p in seen[-1].parameters())


def test_a_model_of_one_class_can_be_guided():
    settings = {"classes": 1, "class_shares": [1.0], "label_dropout": 0.1}
    assert Model(None, None, settings).supports_guidance and Model(None, None, settings).num_classes == 1


def test_muon_forgets_as_fast_as_measured():
    """EXPERIMENTS.md, Optimizer; and the rate is told as a number, even if an optimizer has it as a tensor."""
    weight = torch.nn.Parameter(torch.eye(3))
    assert Muon([weight], lr=0.1).param_groups[0]["momentum"] == 0.9
    rate = set_learning_rate([torch.optim.Adam([weight], lr=torch.tensor(0.5))], {"warmup": 0}, 0, 0.0)
    assert type(rate) is float and rate == 0.5


def test_overwrite_leaves_no_picture_of_the_old_run(tmp_path, quick_runs, monkeypatch):
    """Nor anything else, however soon the new one ends."""
    run_in(tmp_path, "--max-steps", 3)
    assert {path.name for path in tmp_path.rglob("*.*")} >= {"loss.png", "metrics.csv", "step_0000003.png"}
    before_step(monkeypatch, 1, crash)
    assert call(train, *FLAGS, "--max-steps", 3, "--overwrite", "--out", tmp_path).code == 1
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {".lock"}


@pytest.mark.parametrize("kind", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4", ">u2"])
def test_labels_may_be_of_any_type_of_whole_numbers(kind, tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((10, 28, 28), np.uint8), labels=np.arange(10).astype(kind))
    _, labels = read_npz(tmp_path / "x.npz")
    assert labels.dtype == torch.int64 and labels.tolist() == list(range(10))
