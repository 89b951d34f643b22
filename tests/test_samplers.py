"""The samplers: each step in numpy, what all of them promise, Gaussian data whose end is known, and diffusers."""
import math

import numpy as np
import pytest
import torch

import evaluate
import sample
from ddpm import DDPM, SAMPLERS, ImageNoise, Sampler, ddim_step
from diffusion_schedules import sampling_timesteps
from helpers import assert_one_line, call, trained
from sample import generate
from test_ddpm import (DTYPES, VARIANCES, best_noise, close, ddpm_of, fresh, images, last, randn, run, seeded, table_of,
                       wave)
from utils.checkpoint import load_model
from utils.data import read_npz

DETERMINISTIC = ["ddim", "dpm++"]


# ----------------------------------------------------------------------------------------------------------------------
# Each step of each sampler, in numpy

@pytest.mark.parametrize("name, T", [("linear", 40), ("linear", 1000), ("cosine", 30), ("linear", 2), ("linear", 1)])
@pytest.mark.parametrize("variance", VARIANCES)
def test_ddpm_is_algorithm_2(variance, name, T):
    """x_{t-1} = 1/sqrt(alpha_t) (x_t - beta_t / sqrt(1 - alpha_bar_t) noise_theta) + sigma_t z, with z = 0 at t = 0."""
    ddpm, x = ddpm_of(name, T), randn(2, 1, 3, 3)
    noises = [randn(2, 1, 3, 3, seed=s) for s in range(1, T)]
    supply = iter(noises)
    yielded = run(ddpm, wave, x, noise_fn=lambda x: next(supply), clip=False, variance=variance)
    betas, a = ddpm.betas.numpy(), table_of(ddpm)
    for k, (t, new, _) in enumerate(yielded):
        assert t == T - 1 - k
        alpha, alpha_bar, alpha_bar_before = 1 - betas[t], a[t + 1], a[t]
        noise = wave(x, torch.full((2,), t)).numpy()
        wanted = (x.numpy() - betas[t] / math.sqrt(1 - alpha_bar) * noise) / math.sqrt(alpha)
        if t > 0:
            sigma2 = betas[t] * (1 - alpha_bar_before) / (1 - alpha_bar) if variance == "posterior" else betas[t]
            wanted = wanted + math.sqrt(sigma2) * noises[k].numpy()
        close(new, wanted, 1e-8)
        x = new


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps", [2, 7, 30])
def test_ddpm_with_fewer_steps_is_ddpm_on_the_respaced_table(steps, variance):
    """The chain of the visited timesteps is itself a DDPM, of betas 1 - alpha_bar_t / alpha_bar_s."""
    full, x = ddpm_of(), randn(2, 1, 3, 3)
    visited = sampling_timesteps(1000, steps).flip(0)
    a = full.alpha_bars[visited]
    short = DDPM(1 - a / torch.cat([torch.ones(1, dtype=torch.float64), a[:-1]]))
    ours = run(full, wave, x, steps=steps, noise_fn=fresh(3), variance=variance)
    theirs = run(short, lambda x, t: wave(x, visited[t]), x, noise_fn=fresh(3), variance=variance)
    for (t, x, x0_hat), (k, x_short, x0_hat_short) in zip(ours, theirs, strict=True):
        assert t == visited[k]
        close(x, x_short, 1e-7)
        close(x0_hat, x0_hat_short, 1e-7)


def test_without_a_step_before_dpmpp_sde_is_ddpm():
    """Its first step is a draw from the posterior."""
    x = randn(2, 1, 3, 3)
    for a_t, a_s in (0.1, 0.3), (1e-4, 0.9), (0.5, 0.999):
        close(SAMPLERS["dpm++sde"].step(x, wave(x, torch.ones(2)), a_t, a_s, None, fresh(1)),
              SAMPLERS["ddpm"].step(x, wave(x, torch.ones(2)), a_t, a_s, None, fresh(1)), 1e-9)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "dpm++sde"])
def test_every_step_follows_from_the_clipped_x0_hat(sampler, clip):
    """With clip the step is that of the clipped x0_hat throughout: the noise, too, is derived again from it."""
    ddpm, x, z = ddpm_of(), randn(2, 1, 3, 3), fresh(1)
    a, before, clipped = table_of(ddpm), None, []
    visited = [999, 900, 731, 500, 421, 300, 170, 33, 4]
    yielded = run(ddpm, wave, x, sampler=sampler, timesteps=torch.tensor(visited), noise_fn=fresh(1), clip=clip)
    assert len(yielded) == len(visited)

    def lam(t):
        return math.log(a[t + 1] / (1 - a[t + 1])) / 2

    for k, (t, new, x0_hat) in enumerate(yielded):
        assert t == visited[k]
        s = visited[k + 1] if k + 1 < len(visited) else -1
        a_t, a_s = a[t + 1], a[s + 1]
        x, guess = x.numpy(), wave(x, torch.full((2,), t)).numpy()
        wanted_x0 = (x - math.sqrt(1 - a_t) * guess) / math.sqrt(a_t)
        clipped.append((np.abs(wanted_x0) > 1).mean())
        if clip:
            wanted_x0 = np.clip(wanted_x0, -1, 1)
        close(x0_hat, wanted_x0, 1e-8)
        if s == -1:
            wanted = wanted_x0
        elif sampler == "ddpm":  # the product of two Gaussians
            alpha = a_t / a_s
            precision = 1 / (1 - a_s) + alpha / (1 - alpha)
            mean = (math.sqrt(a_s) / (1 - a_s) * wanted_x0 + math.sqrt(alpha) / (1 - alpha) * x) / precision
            wanted = mean + math.sqrt(1 / precision) * z(torch.tensor(x)).numpy()
        elif sampler == "ddim":
            noise = (x - math.sqrt(a_t) * wanted_x0) / math.sqrt(1 - a_t)
            wanted = math.sqrt(a_s) * wanted_x0 + math.sqrt(1 - a_s) * noise
        else:  # Lu et al. 2022, arXiv 2211.01095, algorithm 2, and section 5 for the stochastic one
            h = lam(s) - lam(t)
            d = wanted_x0
            if before is not None:
                r = (lam(t) - lam(visited[k - 1])) / h
                d = (1 + 1 / (2 * r)) * wanted_x0 - 1 / (2 * r) * before
            if sampler == "dpm++sde":
                sigma_t, sigma_s, e2 = math.sqrt(1 - a_t), math.sqrt(1 - a_s), math.exp(-2 * h)
                wanted = (sigma_s / sigma_t * math.exp(-h) * x + math.sqrt(a_s) * (1 - e2) * d
                          + sigma_s * math.sqrt(1 - e2) * z(torch.tensor(x)).numpy())
            else:
                wanted = math.sqrt((1 - a_s) / (1 - a_t)) * x - math.sqrt(a_s) * (math.exp(-h) - 1) * d
        close(new, wanted, 1e-8)
        x, before = new, wanted_x0
    assert np.mean(clipped) > 0.3, "these inputs do not trigger the clip"


# ----------------------------------------------------------------------------------------------------------------------
# What the samplers promise

@pytest.mark.parametrize("name, T", [("linear", 50), ("cosine", 7), ("linear", 1)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_number_of_steps(sampler, name, T):
    """1, 2, 7, 20, T-1 and T: one call of the model for each, t falling from T-1, noise-free at the end."""
    ddpm, x_T = ddpm_of(name, T), randn(2, 1, 3, 3)
    for steps in sorted({1, 2, 7, 20, T - 1, T, None} - {0}, key=lambda s: (s is None, s)):
        if steps is not None and steps > T:
            continue
        calls, draws = [], []

        def model(x, t):
            assert t.shape == (2,) and t.dtype == torch.long and (t == t[0]).all()
            calls.append((t[0].item(), x))
            return wave(x, t)

        def noise_fn(x):
            draws.append(x.shape)
            return torch.ones_like(x)

        yielded = run(ddpm, model, x_T, sampler=sampler, steps=steps, noise_fn=noise_fn)
        n = T if steps is None else steps
        ts = [t for t, _, _ in yielded]
        assert len(ts) == n and ts[0] == T - 1 and all(a > b for a, b in zip(ts, ts[1:])) and ts[-1] >= 0
        assert all(isinstance(t, int) for t in ts)
        assert n < T or ts == list(range(T - 1, -1, -1))
        assert [t for t, _ in calls] == ts, "the model is told another timestep than the one it is at"
        assert torch.equal(calls[0][1], x_T)
        assert all(torch.equal(seen, x) for (_, seen), (_, x, _) in zip(calls[1:], yielded)), "x is not passed on"
        assert len(draws) == (0 if sampler in DETERMINISTIC else n - 1), "noise at the last step, or at none"
        assert torch.equal(yielded[-1][1], yielded[-1][2]), "the sample is not the last x0_hat"
        assert all(x.shape == x0_hat.shape == x_T.shape and x.isfinite().all() for _, x, x0_hat in yielded)


@pytest.mark.parametrize("sampler, spacing", [("ddpm", "trailing"), ("ddim", "trailing"), ("dpm++", "logsnr"),
                                              ("dpm++sde", "signal")])
def test_each_sampler_has_its_own_spacing(sampler, spacing):
    ddpm = ddpm_of()
    ts = [t for t, _, _ in run(ddpm, wave, randn(1, 1, 2, 2), sampler=sampler, steps=12)]
    assert ts == sampling_timesteps(1000, 12, spacing=spacing, alpha_bars=ddpm.alpha_bars).tolist()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_explicit_timesteps_are_the_ones_visited(sampler):
    visited = torch.tensor([900, 411, 410, 3])
    yielded = run(ddpm_of(), wave, randn(1, 1, 2, 2), sampler=sampler, timesteps=visited, steps=77)
    assert [t for t, _, _ in yielded] == visited.tolist()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_perfect_network_gives_its_image_back(sampler):
    """A model that knows x0 leads every sampler, with any number of steps, exactly there."""
    ddpm, x0 = ddpm_of(), images()

    def model(x, t):
        return ddpm.predict_noise(x, t, x0)

    for steps in (1, 2, 13):
        yielded = run(ddpm, model, randn(5, 1, 4, 4, seed=1), sampler=sampler, steps=steps, noise_fn=fresh(2))
        close(yielded[-1][1], x0, 1e-8)
        assert all((x0_hat - x0).abs().max() < 1e-8 for _, _, x0_hat in yielded)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_clip_keeps_x0_hat_in_range_and_can_be_switched_off(sampler):
    x_T = randn(4, 1, 3, 3)
    with_clip = run(ddpm_of(), wave, x_T, sampler=sampler, steps=10, noise_fn=fresh(1))
    without = run(ddpm_of(), wave, x_T, sampler=sampler, steps=10, noise_fn=fresh(1), clip=False)
    assert all(x0_hat.abs().max() <= 1 for _, _, x0_hat in with_clip)
    assert without[0][2].abs().max() > 10, "these inputs do not trigger the clip"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_leaves_no_graph_and_its_input_alone(sampler):
    w = torch.nn.Parameter(torch.ones(()))
    x_T = randn(2, 1, 3, 3, dtype=torch.float32).requires_grad_()
    kept = x_T.detach().clone()
    iterator = ddpm_of(T=20).sample(lambda x, t: w * wave(x, t), x_T, sampler=sampler, steps=5)
    seen = []
    for t, x, x0_hat in iterator:
        assert torch.is_grad_enabled(), "a caller's gradients are switched off while it looks at a step"
        assert not x.requires_grad and not x0_hat.requires_grad
        seen.append((x, x.clone(), x0_hat, x0_hat.clone()))
    assert torch.equal(x_T, kept)
    for x, x_then, x0_hat, x0_hat_then in seen:  # a GIF keeps them all: no step may write into an earlier one
        assert torch.equal(x, x_then) and torch.equal(x0_hat, x0_hat_then)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_float32_follows_float64(sampler):
    """Coefficients are computed in float64 and cast once: of T = 4000, along all of the last 1000 timesteps, where they
    differ least from each other, float32 loses only its own rounding."""
    ddpm, x_T = ddpm_of(T=4000), randn(2, 1, 3, 3)
    model, visited = best_noise(ddpm, 0.0, 0.5), [*range(3999, 1000, -10), *range(999, -1, -1)]
    exact = last(ddpm, model, x_T, sampler=sampler, noise_fn=fresh(1), timesteps=visited)
    single = last(ddpm, lambda x, t: model(x.double(), t).float(), x_T.float(), sampler=sampler, noise_fn=fresh(1),
                  timesteps=visited)
    assert single.dtype == torch.float32
    close(single, exact, 1e-4)


@pytest.mark.parametrize("settings", [
    {"sampler": "euler"}, {"sampler": None}, {"steps": 0}, {"steps": -1}, {"steps": 51}, {"variance": "learned"},
    {"timesteps": torch.tensor([], dtype=torch.long)}, {"timesteps": torch.tensor([50, 3])},
    {"timesteps": torch.tensor([20, -1])}, {"timesteps": torch.tensor([20, 20, 3])},
    {"timesteps": torch.tensor([3, 20])}], ids=str)
def test_bad_arguments_are_refused_at_the_call(settings):
    """Not at the first next(), far from the mistake."""
    with pytest.raises(ValueError):
        ddpm_of(T=50).sample(wave, randn(1, 1, 2, 2), **settings)


def test_unknown_sampler_lists_the_known_ones():
    with pytest.raises(ValueError) as error:
        ddpm_of(T=50).sample(wave, randn(1, 1, 2, 2), sampler="euler")
    assert all(word in str(error.value) for word in ["euler", *SAMPLERS])


# ----------------------------------------------------------------------------------------------------------------------
# A sampler is a step, and a row in SAMPLERS

@pytest.fixture
def rows(monkeypatch):
    """Puts rows into SAMPLERS, for the time of a test."""
    return lambda **samplers: [monkeypatch.setitem(SAMPLERS, name, row) for name, row in samplers.items()]


@pytest.mark.parametrize("clip", [True, False])
def test_what_a_step_is_told(rows, clip):
    """alpha_bar as floats with all their digits; x and x0_hat as they are yielded; and what lies before: nothing at the
    first step, and the alpha_bar and x0_hat of the step before at each other."""
    told = []
    rows(new=Sampler(lambda *arguments: told.append(arguments) or arguments[0] / 2, "logsnr", None))
    ddpm, x_T, noise_fn = ddpm_of(), 2 * randn(2, 1, 3, 3), fresh(1)
    yielded = run(ddpm, wave, x_T, sampler="new", steps=6, clip=clip, noise_fn=noise_fn, variance="beta")
    visited = sampling_timesteps(1000, 6, "logsnr", ddpm.alpha_bars).tolist()
    assert [t for t, _, _ in yielded] == visited and len(told) == 5, "the last step is x0_hat, and no sampler's"
    a = [ddpm.alpha_bars[t].item() for t in visited]
    states = [x_T, *(x for _, x, _ in yielded)]
    for k, (x, x0_hat, a_t, a_s, before, given) in enumerate(told):
        assert type(a_t) is type(a_s) is float and (a_t, a_s) == (a[k], a[k + 1]) and given is noise_fn
        assert torch.equal(x, states[k]) and torch.equal(x0_hat, yielded[k][2]) and torch.equal(yielded[k][1], x / 2)
        if k == 0:
            assert before is None
        else:
            assert before[0] == a[k - 1] and torch.equal(before[1], yielded[k - 1][2])
    assert (max(x0_hat.abs().max() for _, _, x0_hat in yielded) > 1) == (not clip)


def test_a_new_sampler_is_taken_everywhere(rows, tmp_path):
    """Euler's step in one line, with a spacing and a number of steps of its own: that is DDIM's, written anew."""
    rows(euler=Sampler(lambda x, x0_hat, a_t, a_s, before, noise_fn: math.sqrt(a_s) * x0_hat + math.sqrt(1 - a_s)
                       * ((x - math.sqrt(a_t) * x0_hat) / math.sqrt(1 - a_t)), "logsnr", 3),
         like=Sampler(ddim_step, "logsnr", None))
    x_T = randn(2, 1, 3, 3)
    assert torch.equal(last(ddpm_of(), wave, x_T, sampler="euler", steps=9),
                       last(ddpm_of(), wave, x_T, sampler="like", steps=9))

    for name, *flags in ["euler", "--gif"], ["like", "--steps", 3]:
        result = call(sample, "--sampler", name, *flags, "--n", 2, "--out", tmp_path, "--npz", tmp_path / name)
        assert result.code == 0, result.err
    assert torch.equal(read_npz(tmp_path / "euler")[0], read_npz(tmp_path / "like")[0])

    for command in sample, evaluate:
        said = " ".join(call(command, "--help").out.split())
        assert "3 for euler" in said and "all T for like" in said and "euler,like" in said
        assert_one_line(call(command, "--sampler", "heun"), 2, "heun", "ddpm", "ddim", "dpm++", "euler")


def test_the_process_tells_the_noise_it_started_from():
    """Before, between and after the steps, whatever they do."""
    x_T = randn(2, 1, 3, 3)
    process = ddpm_of(T=20).sample(wave, x_T.clone(), steps=3)
    assert torch.equal(process.x_T, x_T) and iter(process) is process
    for _, x, _ in process:
        assert torch.equal(process.x_T, x_T) and not torch.equal(x, x_T)
    assert next(process, None) is None and torch.equal(process.x_T, x_T)


# ----------------------------------------------------------------------------------------------------------------------
# Gaussian data N(mu, s^2): the best prediction of the noise is known, so samplers run with no training

def affine_end(ddpm, mu, s, **settings):
    """(offset, slope) of the map from x_T to the sample, which two inputs determine."""
    x_T = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1)
    offset, end = last(ddpm, best_noise(ddpm, mu, s), x_T, clip=False, **settings).flatten().tolist()
    return offset, end - offset


def ddim_end(a, visited, mu, s):
    """The same map by composing Song et al.'s step, coefficient by coefficient, on the linear best prediction."""
    offset, slope = 0.0, 1.0
    for t, u in zip(visited, [*visited[1:], -1]):
        a_t, a_s = a[t + 1], a[u + 1]
        of_x = math.sqrt(1 - a_t) / (a_t * s ** 2 + 1 - a_t)        # noise = of_x x + constant
        constant = -of_x * math.sqrt(a_t) * mu
        by_noise = math.sqrt(1 - a_s) - math.sqrt(a_s / a_t) * math.sqrt(1 - a_t)
        gain, shift = math.sqrt(a_s / a_t) + by_noise * of_x, by_noise * constant
        offset, slope = gain * offset + shift, gain * slope
    return offset, slope


@pytest.mark.parametrize("steps, std", [(1000, 0.4985), (50, 0.4714), (10, 0.3700)])
def test_ddim_on_gaussian_data(steps, std):
    """Linear T = 1000, s = 0.5, trailing timesteps: the discretised values, not 0.5, and no sampling error at all."""
    ddpm, mu, s = ddpm_of(), 0.2, 0.5
    offset, slope = affine_end(ddpm, mu, s, sampler="ddim", steps=steps)
    assert slope == pytest.approx(std, abs=5e-5)
    visited = [1000 - 1000 // steps * k - 1 for k in range(steps)]
    close([offset, slope], ddim_end(table_of(ddpm), visited, mu, s), 1e-9)
    if steps == 1000:
        assert offset == pytest.approx(mu, abs=0.005)


def ddpm_end(ddpm, mu, s, **settings):
    """Mean and standard deviation of the ancestral sampler's result, exactly: its coefficients are read off.

    One pixel per image. Image 0 gets no noise at all: the offset. Image 1 gets x_T = 1, and image k + 2 gets 1 at draw
    k: what they are above the offset is the weight of that random number in the sample, and weights add in squares.
    """
    n = ddpm.T if settings.get("steps") is None else settings["steps"]
    unit = torch.eye(n + 1, dtype=torch.float64)[:, :, None, None, None]
    noises = torch.cat([torch.zeros_like(unit[:1]), unit]).transpose(0, 1)  # [draw, image, 1, 1, 1], x_T the first draw
    draws = iter(noises[1:])
    end = last(ddpm, best_noise(ddpm, mu, s), noises[0], clip=False, noise_fn=lambda x: next(draws), **settings)
    end = end.flatten()
    return end[0].item(), (end[1:] - end[0]).square().sum().sqrt().item()


def propagated(a, visited, mu, s, variance):
    """The same, by propagating mean and variance from one visited timestep to the next."""
    mean, var = 0.0, 1.0
    for t, u in zip(visited, [*visited[1:], -1]):
        a_t, a_s = a[t + 1], a[u + 1]
        gain0 = s ** 2 * math.sqrt(a_t) / (a_t * s ** 2 + 1 - a_t)  # E[x0 | x_t] = mu + gain0 (x_t - sqrt(a_t) mu)
        of_x0 = math.sqrt(a_s) * (1 - a_t / a_s) / (1 - a_t)
        of_x = math.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t)
        gain, shift = of_x + of_x0 * gain0, of_x0 * mu * (1 - gain0 * math.sqrt(a_t))
        sigma2 = 0 if u < 0 else (1 - a_t / a_s) * ((1 - a_s) / (1 - a_t) if variance == "posterior" else 1)
        mean, var = gain * mean + shift, gain ** 2 * var + sigma2
    return mean, math.sqrt(var)


def test_ddpm_on_gaussian_data_ends_at_its_published_width():
    """Linear T = 1000, s = 0.5: posterior variance ends at 0.4961, beta_t, the upper bound, above it."""
    ddpm = ddpm_of()
    mean, std = ddpm_end(ddpm, 0.2, 0.5)
    assert std == pytest.approx(0.4961, abs=5e-5)
    assert mean == pytest.approx(0.2, abs=0.005)
    assert 0.4961 < ddpm_end(ddpm, 0.2, 0.5, variance="beta")[1] < 0.51


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("steps", [1000, 50, 10, 1])
def test_ddpm_on_gaussian_data(steps, variance):
    ddpm = ddpm_of()
    visited = [1000 - 1000 // steps * k - 1 for k in range(steps)]
    wanted = propagated(table_of(ddpm), visited, 0.2, 0.5, variance)
    close(ddpm_end(ddpm, 0.2, 0.5, steps=steps, variance=variance), wanted, 1e-9)


def propagated_sde(a, visited, mu, s):
    """Mean and standard deviation at the end of dpm++sde, by the mean and covariance of (x_t, x0_hat of the step
    before), from one visited timestep to the next."""
    mean, cov, lam = np.array([0.0, 0.0]), np.array([[1.0, 0.0], [0.0, 0.0]]), np.log(a[1:] / (1 - a[1:])) / 2
    for k, (t, u) in enumerate(zip(visited, visited[1:])):
        a_t, a_u, h = a[t + 1], a[u + 1], lam[u] - lam[t]
        of_x = s ** 2 * math.sqrt(a_t) / (a_t * s ** 2 + 1 - a_t)  # E[x0 | x_t] = mu + of_x (x_t - sqrt(a_t) mu)
        constant = mu - of_x * math.sqrt(a_t) * mu
        half_r = h / (lam[t] - lam[visited[k - 1]]) / 2 if k else 0.0
        new, keep = 1 - math.exp(-2 * h), math.sqrt((1 - a_u) / (1 - a_t)) * math.exp(-h)
        pull = math.sqrt(a_u) * new
        step = np.array([[keep + pull * (1 + half_r) * of_x, -pull * half_r], [of_x, 0.0]])
        mean = step @ mean + np.array([pull * (1 + half_r) * constant, constant])
        cov = step @ cov @ step.T + np.diag([(1 - a_u) * new, 0.0])
    a_t = a[visited[-1] + 1]
    of_x = s ** 2 * math.sqrt(a_t) / (a_t * s ** 2 + 1 - a_t)
    return mu + of_x * (mean[0] - math.sqrt(a_t) * mu), of_x * math.sqrt(cov[0, 0])


@pytest.mark.parametrize("name", ["linear", "logsnr"])
@pytest.mark.parametrize("steps, error", [(1000, 0.005), (50, 0.01), (10, 0.1), (2, 1)])
def test_dpmpp_sde_on_gaussian_data(steps, error, name):
    """The width it ends at is what its coefficients give, exactly, and with many steps the data's."""
    ddpm, mu, s = ddpm_of(name), 0.2, 0.5
    visited = sampling_timesteps(1000, steps, SAMPLERS["dpm++sde"].spacing, ddpm.alpha_bars).tolist()
    mean, std = ddpm_end(ddpm, mu, s, sampler="dpm++sde", steps=steps)
    close([mean, std], propagated_sde(table_of(ddpm), visited, mu, s), 1e-9)
    assert std == pytest.approx(s, rel=error) and mean == pytest.approx(mu, abs=0.01)


def test_beta_variance_is_exact_for_white_noise():
    """Section 3.2: sigma_t^2 = beta_t is optimal for x0 ~ N(0, I). There every step keeps the variance 1."""
    ddpm, unit = ddpm_of(T=30), torch.eye(31, dtype=torch.float64)[:, :, None, None, None]
    draws, weights = iter(unit[1:]), []
    for _, x, _ in ddpm.sample(best_noise(ddpm, 0.0, 1.0), unit[0], clip=False, variance="beta",
                               noise_fn=lambda x: next(draws)):
        weights.append(x.square().sum().item())
    close(weights[:-1], np.ones(29), 1e-9)


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm++", 2)])
def test_order_of_convergence(sampler, order):
    """Twice the steps: half the error at first order, a quarter at second.

    The exact flow keeps (x - sqrt(alpha_bar) mu) / sqrt(alpha_bar s^2 + 1 - alpha_bar). A table uniform in log-SNR
    makes the visited timesteps exactly uniform; the error is read at t = 0, before the last, always first-order step.
    """
    T, mu, s = 1281, 0.3, 0.5
    a = torch.sigmoid(torch.linspace(6, -6, T, dtype=torch.float64))
    ddpm = DDPM(1 - a / torch.cat([torch.ones(1, dtype=torch.float64), a[:-1]]))
    x_T = torch.tensor([-1.0, 0.4, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    a_T, a_0 = a[-1].item(), a[0].item()
    kept = (x_T - math.sqrt(a_T) * mu) / math.sqrt(a_T * s ** 2 + 1 - a_T)
    exact = math.sqrt(a_0) * mu + math.sqrt(a_0 * s ** 2 + 1 - a_0) * kept
    errors = []
    for n in (40, 80, 160, 320):
        visited = torch.arange(T - 1, -1, -(T - 1) // n)
        yielded = run(ddpm, best_noise(ddpm, mu, s), x_T, sampler=sampler, timesteps=visited, clip=False)
        assert len(yielded) == n + 1
        errors.append((yielded[-2][1] - exact).abs().max().item())
    orders = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]
    assert orders[-1] == pytest.approx(order, abs=0.15), (errors, orders)
    assert errors[-1] < 0.01


def test_dpmpp_at_its_own_spacing_beats_ddim():
    """20 steps on Gaussian data, linear T = 1000: the width is off by less than 2 %, DDIM's by more than 10 %."""
    errors = {name: abs(affine_end(ddpm_of(), 0.0, 0.5, sampler=name, steps=20)[1] / 0.5 - 1) for name in DETERMINISTIC}
    assert errors["dpm++"] < 0.02 and errors["ddim"] > 0.1, errors


# ----------------------------------------------------------------------------------------------------------------------
# diffusers, on the same betas, the same stand-in network and the same timesteps

def peer_run(scheduler, x, model, **settings):
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x))), t, x, **settings).prev_sample
        yield x


def agree(ours, theirs, tolerance):
    """At every step, relative to the image's size: without the clip the first steps reach into the hundreds."""
    for (t, x, _), peer in zip(ours, theirs, strict=True):
        error = ((x - peer).abs().max() / peer.abs().max().clamp(min=1)).item()
        assert error < tolerance, f"t = {t}: off by {error:.2g}"


def start():
    """Images from three seeds, wider than x_T should be, so that x0_hat leaves [-1, 1] more often."""
    return 1.5 * torch.cat([randn(2, 1, 4, 4, seed=seed, dtype=torch.float32) for seed in range(3)])


# diffusers' float32 tables have 1 - alpha_bar_0 = 1e-4 only to 3e-4 of itself; ours are float64.
PEER_TOLERANCE = 2e-4
PEER_CASES = [("linear", 1000, 1000), ("linear", 1000, 50), ("linear", 1000, 10), ("cosine", 100, 20),
              ("cosine", 50, 50)]  # not logsnr: at its clear end a table in float32 has 1 - alpha_bar to 1 in 30


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("name, T, steps", PEER_CASES)
def test_ddpm_agrees_with_diffusers(name, T, steps, variance, clip):
    """On timesteps that end at 0: elsewhere diffusers, with fixed_large, adds noise at the last step too."""
    schedulers = pytest.importorskip("diffusers.schedulers")
    ddpm, kind = ddpm_of(name, T), {"posterior": "fixed_small", "beta": "fixed_large"}[variance]
    peer = schedulers.DDPMScheduler(T, trained_betas=ddpm.betas.numpy(), variance_type=kind, clip_sample=clip)
    visited = sampling_timesteps(T, steps, "logsnr", ddpm.alpha_bars)
    peer.set_timesteps(timesteps=visited.tolist())
    generator = seeded(100)
    ours = ddpm.sample(wave, start(), noise_fn=lambda x: torch.randn(x.shape, generator=generator), clip=clip,
                       variance=variance, timesteps=visited)
    agree(ours, peer_run(peer, start(), wave, generator=seeded(100)), PEER_TOLERANCE)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name, T, steps", PEER_CASES)
def test_ddim_agrees_with_diffusers(name, T, steps, clip):
    """diffusers derives the noise again after the clip where use_clipped_model_output says so."""
    schedulers = pytest.importorskip("diffusers.schedulers")
    ddpm = ddpm_of(name, T)
    peer = schedulers.DDIMScheduler(T, trained_betas=ddpm.betas.numpy(), clip_sample=clip, timestep_spacing="trailing")
    peer.set_timesteps(steps)
    ours = ddpm.sample(wave, start(), sampler="ddim", clip=clip, timesteps=peer.timesteps)
    agree(ours, peer_run(peer, start(), wave, use_clipped_model_output=True), PEER_TOLERANCE)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers and NumPy 2, not us
@pytest.mark.parametrize("spacing", ["trailing", "logsnr"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name, T, steps", PEER_CASES)
def test_dpmpp_agrees_with_diffusers(name, T, steps, clip, spacing):
    """thresholding with sample_max_value 1 is diffusers' way of clipping x0_hat to [-1, 1] here."""
    schedulers = pytest.importorskip("diffusers.schedulers")
    ddpm = ddpm_of(name, T)
    peer = schedulers.DPMSolverMultistepScheduler(
        T, trained_betas=ddpm.betas.numpy(), solver_order=2, algorithm_type="dpmsolver++", solver_type="midpoint",
        final_sigmas_type="zero", thresholding=clip, sample_max_value=1.0)
    visited = sampling_timesteps(T, steps, spacing, ddpm.alpha_bars)
    peer.set_timesteps(timesteps=visited.tolist())
    ours = ddpm.sample(wave, start(), sampler="dpm++", clip=clip, timesteps=visited)
    agree(ours, peer_run(peer, start(), wave), PEER_TOLERANCE)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("name, T, steps", PEER_CASES)
def test_dpmpp_sde_agrees_with_diffusers(name, T, steps, clip):
    schedulers = pytest.importorskip("diffusers.schedulers")
    ddpm = ddpm_of(name, T)
    peer = schedulers.DPMSolverMultistepScheduler(
        T, trained_betas=ddpm.betas.numpy(), solver_order=2, algorithm_type="sde-dpmsolver++", solver_type="midpoint",
        final_sigmas_type="zero", thresholding=clip, sample_max_value=1.0)
    visited = sampling_timesteps(T, steps, "logsnr", ddpm.alpha_bars)
    peer.set_timesteps(timesteps=visited.tolist())
    generator = seeded(100)
    ours = ddpm.sample(wave, start(), sampler="dpm++sde", clip=clip, timesteps=visited,
                       noise_fn=lambda x: torch.randn(x.shape, generator=generator))
    agree(ours, peer_run(peer, start(), wave, generator=seeded(100)), PEER_TOLERANCE)


# ----------------------------------------------------------------------------------------------------------------------
# One random stream per image

def test_image_noise_is_standard_normal_and_its_own_for_every_image_seed_and_draw():
    noise_fn = ImageNoise(7, range(8))
    first, second = noise_fn(torch.zeros(8, 1, 50, 50)), noise_fn(torch.zeros(8, 1, 50, 50))
    other = ImageNoise(8, range(8))(torch.zeros(8, 1, 50, 50))
    drawn = torch.cat([first, second, other]).flatten(1)  # [24, 2500]
    assert drawn.mean().abs() < 5 / math.sqrt(drawn.numel())
    assert drawn.var().item() == pytest.approx(1, abs=5 * math.sqrt(2 / drawn.numel()))
    assert (drawn ** 4).mean().item() == pytest.approx(3, abs=5 * math.sqrt(96 / drawn.numel()))
    correlation = torch.corrcoef(drawn) - torch.eye(24)
    assert correlation.abs().max() < 6 / math.sqrt(2500), "two streams are the same, or overlap"


def test_image_noise_of_neighbouring_seeds_and_indices_differs():
    """(seed, i) must not be folded into seed + i or seed * i."""
    pairs = [(s, i) for s in range(6) for i in range(6)]
    drawn = {ImageNoise(s, [i])(torch.zeros(1, 3)).numpy().tobytes() for s, i in pairs}
    assert len(drawn) == len(pairs)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_depends_on_its_number_and_not_on_its_batch(sampler):
    """Alone, in another order, or among others: image i is the same image."""
    ddpm = ddpm_of(T=40)

    def sampled(indices):
        noise_fn = ImageNoise(5, indices)
        x_T = noise_fn(torch.zeros(len(indices), 1, 3, 3, dtype=torch.float64))
        return last(ddpm, wave, x_T, sampler=sampler, steps=12, noise_fn=noise_fn)

    together = sampled([0, 1, 2, 3])
    close(sampled([3, 1]), together[[3, 1]])
    close(sampled([2]), together[2:3])
    assert (together[0] - together[1]).abs().max() > 0.01
    assert (sampled([4]) - together[2:3]).abs().max() > 0.01


@pytest.mark.parametrize("dtype", DTYPES)
def test_image_noise_takes_shape_and_type_of_what_it_is_for(dtype):
    noise = ImageNoise(0, [5, 6])(torch.empty(2, 3, 4, 5, dtype=dtype))
    assert noise.shape == (2, 3, 4, 5) and noise.dtype == dtype


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
