"""The mathematics, from the papers and not from ddpm.py: numpy, closed forms, Bayes' rule, scipy and diffusers.

Most of it runs in float64, where an agreement to 1e-9 leaves a wrong coefficient no place to hide.
"""
import math

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm import DDPM, ImageNoise
from diffusion_schedules import make_betas, sampling_timesteps

SAMPLERS = ["ddpm", "ddim", "dpm++"]
DETERMINISTIC = ["ddim", "dpm++"]
VARIANCES = ["posterior", "beta"]
DTYPES = [torch.float32, torch.float64]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def images(n=5, seed=0, dtype=torch.float64):
    """Grey levels k / 127.5 - 1, black and white among them, [n, 1, 4, 4]."""
    levels = torch.randint(0, 256, (n, 1, 4, 4), generator=seeded(seed))
    levels[:, 0, 0, 0], levels[:, 0, 0, 1] = 0, 255
    return (levels.double() / 127.5 - 1).to(dtype)


def ddpm_of(name="linear", T=1000):
    return DDPM(make_betas(name, T))


def table_of(ddpm):
    """alpha_bar from the betas alone, with alpha_bar_{-1} = 1 kept in front: entry t + 1 belongs to timestep t."""
    return np.cumprod(np.concatenate([[1.0], 1 - ddpm.betas.numpy()]))


def wave(x, t):
    """A stand-in for a network: smooth, bounded, different at every pixel and every timestep."""
    t = t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return torch.sin(1.7 * x + 0.1 * t) + 0.5 * x.roll(1, dims=-1) * torch.cos(0.01 * t)


def fresh(seed):
    """A noise_fn that starts its stream anew."""
    generator = seeded(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)


def run(ddpm, model, x_T, **settings):
    return list(ddpm.sample(model, x_T, **settings))


def last(*arguments, **settings):
    return run(*arguments, **settings)[-1][1]


def close(a, b, tolerance=1e-9):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


# ----------------------------------------------------------------------------------------------------------------------
# The forward process

@pytest.mark.parametrize("T", [1, 2, 50, 1000, 4000])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_tables_are_float64_products(name, T):
    """alpha_bar_t includes alpha_t, and is multiplied in float64: in float32 it is off by 1e-6 at T = 4000."""
    betas = make_betas(name, T)
    ddpm = DDPM(betas)
    assert ddpm.T == T
    for table in (ddpm.betas, ddpm.alphas, ddpm.alpha_bars):
        assert table.shape == (T,) and table.dtype == torch.float64
    close(ddpm.betas, betas, 0)
    close(ddpm.alphas, 1 - betas.numpy(), 0)
    exact = np.cumprod(1 - betas.numpy().astype(np.longdouble))
    np.testing.assert_allclose(ddpm.alpha_bars, exact.astype(np.float64), rtol=1e-12)


def test_tables_stay_float64_when_the_module_is_cast():
    """A .to() of a training script must not round alpha_bar."""
    ddpm = ddpm_of().to(torch.float32)
    assert ddpm.betas.dtype == ddpm.alphas.dtype == ddpm.alpha_bars.dtype == torch.float64


@pytest.mark.parametrize("betas", [[], [0.1, 0.0], [0.1, 1.0], [-0.1], [[0.1, 0.2]], [0.1, math.nan]])
def test_betas_outside_0_to_1_are_refused(betas):
    with pytest.raises(ValueError):
        DDPM(torch.tensor(betas, dtype=torch.float64))


@pytest.mark.parametrize("T", [1, 2, 30])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_q_sample_is_the_forward_step_repeated(name, T):
    """Eq. 2, x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, iterated: eq. 4 has its mean and its variance.

    The chain is followed through its coefficients: what is left of x0, and the squares of what each noise adds.
    """
    ddpm, x0, z = ddpm_of(name, T), images(), randn(5, 1, 4, 4, seed=1)
    of_x0, variance = 1.0, 0.0
    for t, beta in enumerate(ddpm.betas.tolist()):
        of_x0, variance = math.sqrt(1 - beta) * of_x0, (1 - beta) * variance + beta
        x_t = ddpm.q_sample(x0, torch.full((5,), t), z)
        close(x_t, of_x0 * x0 + math.sqrt(variance) * z)


def test_q_sample_takes_each_image_to_its_own_timestep():
    ddpm, x0, z = ddpm_of(), images(4), randn(4, 1, 4, 4, seed=1)
    t = torch.tensor([999, 0, 500, 1])
    a = table_of(ddpm)[t + 1][:, None, None, None]
    close(ddpm.q_sample(x0, t, z), np.sqrt(a) * x0.numpy() + np.sqrt(1 - a) * z.numpy())


@pytest.mark.parametrize("t", [0, 250, 999])
def test_q_sample_moments(t):
    """Of 100,000 noised pixels: mean sqrt(alpha_bar) x0, standard deviation sqrt(1 - alpha_bar), within 5 sigma."""
    ddpm, n = ddpm_of(), 100_000
    x_t = ddpm.q_sample(torch.full((n, 1, 1, 1), 0.6), torch.full((n,), t), randn(n, 1, 1, 1, dtype=torch.float32))
    a = table_of(ddpm)[t + 1]
    assert abs(x_t.mean().item() - math.sqrt(a) * 0.6) < 5 * math.sqrt((1 - a) / n)
    assert x_t.std().item() == pytest.approx(math.sqrt(1 - a), rel=5 / math.sqrt(2 * n))


@pytest.mark.parametrize("name, T", [("linear", 1000), ("linear", 1), ("cosine", 400)])
def test_predictions_undo_q_sample(name, T):
    """At the first, the last and the timesteps between, where alpha_bar is 4e-5 as where it is 0.9999."""
    ddpm, z = ddpm_of(name, T), randn(5, 1, 4, 4, seed=1)
    t, x0 = torch.linspace(0, T - 1, 5).long(), images()
    x_t = ddpm.q_sample(x0, t, z)
    close(ddpm.predict_x0(x_t, t, z), x0)
    close(ddpm.predict_noise(x_t, t, x0), z)


def test_v_is_the_rotation_of_salimans_and_ho():
    """v = alpha noise - sigma x0, orthogonal to x_t's own direction; v and x_t together give back noise and x0."""
    ddpm, x0, z = ddpm_of(), images(), randn(5, 1, 4, 4, seed=1)
    t = torch.tensor([0, 1, 500, 998, 999])
    a = table_of(ddpm)[t + 1][:, None, None, None]
    x_t, v = ddpm.q_sample(x0, t, z), ddpm.velocity(x0, t, z)
    close(v, np.sqrt(a) * z.numpy() - np.sqrt(1 - a) * x0.numpy())
    close(ddpm.noise_from_v(x_t, t, v), z)
    close(ddpm.x0_from_v(x_t, t, v), x0)
    close(v.square() + x_t.square(), x0.square() + z.square())


def test_clipped_noise_from_v():
    """The value is that of the clipped x0_hat; the gradient, d noise / d v = sqrt(alpha_bar), ignores the clip."""
    ddpm, x_t, t = ddpm_of(), randn(5, 1, 4, 4), torch.tensor([0, 1, 500, 998, 999])
    v = (3 * randn(5, 1, 4, 4, seed=1)).requires_grad_()
    a = table_of(ddpm)[t + 1][:, None, None, None]
    x0_hat = np.sqrt(a) * x_t.numpy() - np.sqrt(1 - a) * v.detach().numpy()
    assert 0.2 < (np.abs(x0_hat) > 1).mean() < 0.9
    noise = ddpm.clipped_noise_from_v(x_t, t, v)
    close(noise.detach(), (x_t.numpy() - np.sqrt(a) * np.clip(x0_hat, -1, 1)) / np.sqrt(1 - a))
    noise.sum().backward()
    close(v.grad, np.broadcast_to(np.sqrt(a), v.shape))


# ----------------------------------------------------------------------------------------------------------------------
# The posterior

@pytest.mark.parametrize("name, T", [("linear", 1000), ("linear", 2), ("cosine", 50)])
def test_posterior_is_bayes_rule(name, T):
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add, means are weighted with them."""
    ddpm, x0, x_t = ddpm_of(name, T), images(), randn(5, 1, 4, 4, seed=1)
    a = table_of(ddpm)
    for t in sorted({1, T // 2, T - 2, T - 1} - {0}):
        mean, variance = ddpm.posterior(x0, x_t, torch.full((5,), t))
        beta, before = ddpm.betas[t].item(), a[t]
        prior_mean, prior_variance = math.sqrt(before) * x0.numpy(), 1 - before
        # as a function of x_{t-1}, N(x_t; sqrt(1-beta) x_{t-1}, beta) is a Gaussian about x_t / sqrt(1-beta)
        seen_mean, seen_variance = x_t.numpy() / math.sqrt(1 - beta), beta / (1 - beta)
        precision = 1 / prior_variance + 1 / seen_variance
        close(mean, (prior_mean / prior_variance + seen_mean / seen_variance) / precision)
        close(variance.expand(5, 1, 1, 1), np.full((5, 1, 1, 1), 1 / precision), 1e-12)


@pytest.mark.parametrize("T", [1, 2, 1000])
def test_posterior_at_0_is_x0_itself(T):
    mean, variance = ddpm_of(T=T).posterior(images(), randn(5, 1, 4, 4, seed=1), torch.zeros(5, dtype=torch.long))
    close(mean, images(), 1e-12)
    assert (variance == 0).all()


def test_posterior_reads_each_images_timestep():
    ddpm, x0, x_t, t = ddpm_of(), images(4), randn(4, 1, 4, 4, seed=1), torch.tensor([7, 999, 0, 300])
    mean, variance = ddpm.posterior(x0, x_t, t)
    for i in range(4):
        one_mean, one_variance = ddpm.posterior(x0[i:i + 1], x_t[i:i + 1], t[i:i + 1])
        close(mean[i:i + 1], one_mean, 0)
        close(variance[i:i + 1], one_variance, 0)


# ----------------------------------------------------------------------------------------------------------------------
# The loss

def test_loss_is_the_mean_squared_error_of_each_image():
    """Eq. 14 in numpy; the model sees x_t of eq. 4 and t as it was given."""
    ddpm, x0, z, t = ddpm_of(), images(), randn(5, 1, 4, 4, seed=1), torch.tensor([0, 1, 500, 998, 999])
    seen = []

    def model(x_t, t):
        seen.append((x_t, t))
        return wave(x_t, t)

    loss = ddpm.loss(model, x0, t, z)
    assert len(seen) == 1 and torch.equal(seen[0][1], t) and seen[0][1].dtype == torch.long
    a = table_of(ddpm)[t + 1][:, None, None, None]
    x_t = np.sqrt(a) * x0.numpy() + np.sqrt(1 - a) * z.numpy()
    close(seen[0][0], x_t)
    error = z.numpy() - wave(torch.tensor(x_t), t).numpy()
    assert loss.shape == (5,)
    close(loss, [np.mean(e ** 2) for e in error])


def test_loss_is_0_for_the_true_noise_and_1_for_no_guess():
    ddpm, x0, z, t = ddpm_of(), images(64), randn(64, 1, 4, 4, seed=1), torch.arange(64) * 15
    assert (ddpm.loss(lambda x_t, t: z, x0, t, z) == 0).all()
    close(ddpm.loss(lambda x_t, t: torch.zeros_like(x_t), x0, t, z), z.square().mean(dim=(1, 2, 3)))


def test_gradients_of_the_loss_reach_the_model():
    """d/dw of (noise - w x_t)^2, by hand."""
    ddpm, x0, z, t = ddpm_of(), images(), randn(5, 1, 4, 4, seed=1), torch.tensor([0, 1, 500, 998, 999])
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ddpm.loss(lambda x_t, t: w * x_t, x0, t, z).mean().backward()
    x_t = ddpm.q_sample(x0, t, z)
    close(w.grad, (-2 * x_t * (z - 0.3 * x_t)).mean())


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


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
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
        else:  # Lu et al. 2022, arXiv 2211.01095, algorithm 2
            h = lam(s) - lam(t)
            d = wanted_x0
            if before is not None:
                r = (lam(t) - lam(visited[k - 1])) / h
                d = (1 + 1 / (2 * r)) * wanted_x0 - 1 / (2 * r) * before
            wanted = math.sqrt((1 - a_s) / (1 - a_t)) * x - math.sqrt(a_s) * (math.exp(-h) - 1) * d
        close(new, wanted, 1e-8)
        x, before = new, wanted_x0
    assert np.mean(clipped) > 0.3, "these inputs do not trigger the clip"


# ----------------------------------------------------------------------------------------------------------------------
# What the samplers promise

@pytest.mark.parametrize("T", [50, 7, 1])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_number_of_steps(sampler, T):
    """1, 2, 7, 20, T-1 and T: one call of the model for each, t falling from T-1, noise-free at the end."""
    ddpm, x_T = ddpm_of(T=T), randn(2, 1, 3, 3)
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
        assert len(draws) == (n - 1 if sampler == "ddpm" else 0), "noise at the last step, or at none"
        assert torch.equal(yielded[-1][1], yielded[-1][2]), "the sample is not the last x0_hat"
        assert all(x.shape == x0_hat.shape == x_T.shape and x.isfinite().all() for _, x, x0_hat in yielded)


@pytest.mark.parametrize("sampler, spacing", [("ddpm", "trailing"), ("ddim", "trailing"), ("dpm++", "logsnr")])
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
# Gaussian data N(mu, s^2): the best prediction of the noise is known, so samplers run with no training

def best_noise(ddpm, mu, s):
    """E[noise | x_t] for pixels from N(mu, s^2): linear in x_t."""
    a = torch.tensor(table_of(ddpm)[1:])

    def model(x, t):
        a_t = a[t].view(-1, 1, 1, 1)
        return (1 - a_t).sqrt() * (x - a_t.sqrt() * mu) / (a_t * s ** 2 + 1 - a_t)
    return model


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
              ("cosine", 50, 50)]


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


# ----------------------------------------------------------------------------------------------------------------------
# Bits per dimension

def sigma2_of(ddpm, t, variance):
    a, beta = table_of(ddpm), ddpm.betas.numpy()
    if variance == "beta" or ddpm.T == 1:
        return beta[t]
    t = max(t, 1)
    return beta[t] * (1 - a[t]) / (1 - a[t + 1])


def reverse_mean(ddpm, x_t, t, guess, clip):
    """mu_theta(x_t, t) from the (clipped) x0_hat, in numpy, by Bayes' rule; at t = 0 it is x0_hat."""
    a, beta = table_of(ddpm), ddpm.betas.numpy()
    x0_hat = (x_t - math.sqrt(1 - a[t + 1]) * guess) / math.sqrt(a[t + 1])
    if clip:
        x0_hat = np.clip(x0_hat, -1, 1)
    return bayes(a[t], beta[t], x0_hat, x_t)[0] if t else x0_hat


def bayes(before, beta, x0, x_t):
    precision = 1 / (1 - before) + (1 - beta) / beta
    return (math.sqrt(before) / (1 - before) * x0 + math.sqrt(1 - beta) / beta * x_t) / precision, 1 / precision


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_bound_term_is_the_kl_divergence(t, variance, clip):
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) by torch.distributions, summed over pixels, in bits per pixel."""
    ddpm, x0, z = ddpm_of(), images(), randn(5, 1, 4, 4, seed=1)
    a = table_of(ddpm)
    term = ddpm.bound_term(wave, x0, torch.full((5,), t), z, clip=clip, variance=variance)
    x_t = math.sqrt(a[t + 1]) * x0.numpy() + math.sqrt(1 - a[t + 1]) * z.numpy()
    guess = wave(torch.tensor(x_t), torch.full((5,), t)).numpy()
    true_mean, true_variance = bayes(a[t], ddpm.betas[t].item(), x0.numpy(), x_t)
    mean, sigma2 = reverse_mean(ddpm, x_t, t, guess, clip), sigma2_of(ddpm, t, variance)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(torch.tensor(true_mean), math.sqrt(true_variance)),
                                           normal(torch.tensor(mean), math.sqrt(sigma2)))
    assert term.shape == (5,)
    close(term, kl.flatten(1).sum(1) / 16 / math.log(2), 1e-7)
    assert (term > 0).all()


@pytest.mark.parametrize("variance", VARIANCES)
def test_bound_term_of_a_perfect_network(variance):
    """The means agree: what is left is the price of another variance than the posterior's."""
    ddpm, x0, z = ddpm_of(), images(), randn(5, 1, 4, 4, seed=1)
    a = table_of(ddpm)
    for t in (1, 500, 999):
        term = ddpm.bound_term(lambda x, t: z, x0, torch.full((5,), t), z, variance=variance)
        ratio = 1 if variance == "posterior" else (1 - a[t]) / (1 - a[t + 1])
        close(term, np.full(5, (ratio - 1 - math.log(ratio)) / 2 / math.log(2)))


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("T", [1, 2, 1000])
def test_decoder_is_the_gaussian_mass_of_the_bin(T, variance):
    """Section 3.3 by scipy: from x - 1/255 to x + 1/255, black reaching to -infinity and white to infinity."""
    norm = pytest.importorskip("scipy.stats").norm
    ddpm, x0, z = ddpm_of(T=T), images(), 0.8 * randn(5, 1, 4, 4, seed=1)
    t, a = torch.zeros(5, dtype=torch.long), table_of(ddpm)
    term = ddpm.bound_term(wave, x0, t, z, variance=variance)
    x_0 = math.sqrt(a[1]) * x0.numpy() + math.sqrt(1 - a[1]) * z.numpy()
    mean = reverse_mean(ddpm, x_0, 0, wave(torch.tensor(x_0), t).numpy(), clip=True)
    sigma, x = math.sqrt(sigma2_of(ddpm, 0, variance)), x0.numpy()
    low = np.where(x < -0.999, -np.inf, x - 1 / 255)
    high = np.where(x > 0.999, np.inf, x + 1 / 255)
    # difference of the distribution functions, from whichever tail they are small in
    mass = np.where(low > mean, norm.sf(low, mean, sigma) - norm.sf(high, mean, sigma),
                    norm.cdf(high, mean, sigma) - norm.cdf(low, mean, sigma))
    assert (mass > 0).all()
    close(term, -np.log(mass).reshape(5, -1).mean(1) / math.log(2), 1e-7)


@pytest.mark.parametrize("x0_hat", [-1.0, -0.5, 0.003, 0.98, 1.0])
@pytest.mark.parametrize("T", [1, 1000])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_decoder_probabilities_of_all_grey_levels_sum_to_1(T, x0_hat, dtype, tolerance):
    """A model that sees x0_hat whatever is there, asked for each of the 256 levels in turn."""
    ddpm, t = ddpm_of(T=T), torch.zeros(256, dtype=torch.long)
    x0 = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(256, 1, 1, 1).to(dtype)
    bits = ddpm.bound_term(lambda x, t: ddpm.predict_noise(x, t, torch.full_like(x, x0_hat)), x0, t,
                           torch.zeros_like(x0))
    probability = 2 ** -bits.double()
    assert probability.sum().item() == pytest.approx(1, abs=tolerance)
    if T == 1000:
        assert probability.argmax() == round((x0_hat + 1) * 127.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoder_stays_finite_far_from_the_mean(dtype):
    """Where the network sees white and the pixel is black, cdf differences round to 0; the logarithm has a value."""
    ddpm, x0 = ddpm_of(), torch.tensor([-1, -0.2, 1], dtype=dtype).view(3, 1, 1, 1)
    wrong = torch.tensor([1, 1, -1], dtype=dtype).view(3, 1, 1, 1)
    bits = ddpm.bound_term(lambda x, t: ddpm.predict_noise(x, t, wrong), x0, torch.zeros(3, dtype=torch.long),
                           torch.zeros_like(x0))
    sigma = math.sqrt(sigma2_of(ddpm, 0, "posterior"))
    # in the far tail -log mass is d^2 / 2 + log(d sqrt(2 pi)) up to 1 / d^2, d the distance of the bin's nearer edge
    for value, distance in zip(bits.tolist(), [2 - 1 / 255, 1.2 - 1 / 255, 2 - 1 / 255]):
        d = distance / sigma
        assert value == pytest.approx((d ** 2 / 2 + math.log(d * math.sqrt(2 * math.pi))) / math.log(2), rel=1e-4)


def test_bound_term_reads_each_images_timestep():
    """A batch of mixed t, 0 among them, is the batch of its parts."""
    ddpm, x0, z, t = ddpm_of(), images(), randn(5, 1, 4, 4, seed=1), torch.tensor([0, 999, 1, 0, 300])
    together = ddpm.bound_term(wave, x0, t, z)
    assert together.isfinite().all()
    close(together, torch.cat([ddpm.bound_term(wave, x0[i:i + 1], t[i:i + 1], z[i:i + 1]) for i in range(5)]))


@pytest.mark.parametrize("name, T", [("linear", 1000), ("cosine", 100), ("linear", 1)])
def test_prior_is_the_kl_to_pure_noise(name, T):
    ddpm, x0 = ddpm_of(name, T), images()
    a = table_of(ddpm)[-1]
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(math.sqrt(a) * x0, math.sqrt(1 - a)), normal(0.0, 1.0))
    bits = ddpm.prior_bits(x0)
    assert bits.shape == (5,)
    np.testing.assert_allclose(bits, kl.flatten(1).mean(1) / math.log(2), rtol=1e-6)


def test_prior_keeps_its_digits_in_float32():
    """alpha_bar_T is 4e-5 and the bound of 1e-5: differences of numbers near 1 must not be taken in float32."""
    ddpm = ddpm_of()
    np.testing.assert_allclose(ddpm.prior_bits(images(dtype=torch.float32)), ddpm.prior_bits(images()), rtol=1e-4)


@pytest.mark.parametrize("T", [1, 12])
def test_bits_per_dim_is_the_sum_of_its_terms(T):
    """One network call per timestep, and total = prior + decoder + KLs, each as bound_term has it."""
    ddpm, x0, supply = ddpm_of(T=T), images(3), [randn(3, 1, 4, 4, seed=s) for s in range(T)]
    calls, draws = [], iter(supply)

    def model(x, t):
        calls.append(t[0].item())
        return wave(x, t)

    bits = ddpm.bits_per_dim(model, x0, noise_fn=lambda x: next(draws))
    assert sorted(calls) == list(range(T)), "a timestep is missing, or counted twice"
    assert bits["terms"].shape == (3, T) and bits["total"].shape == bits["prior"].shape == (3,)
    close(bits["prior"], ddpm.prior_bits(x0), 1e-12)
    close(bits["total"], bits["prior"] + bits["terms"].sum(dim=1), 1e-12)
    for k, t in enumerate(calls):
        close(bits["terms"][:, t], ddpm.bound_term(wave, x0, torch.full((3,), t), supply[k]), 1e-12)


@pytest.mark.parametrize("variance", VARIANCES)
def test_bits_per_dim_takes_the_clip_and_the_variance(variance):
    ddpm, x0 = ddpm_of(T=8), images(3)
    results = {clip: ddpm.bits_per_dim(wave, x0, noise_fn=fresh(1), clip=clip, variance=variance)["terms"]
               for clip in (True, False)}
    z = fresh(1)
    for t in range(8):
        noise = z(x0)
        for clip in (True, False):
            close(results[clip][:, t], ddpm.bound_term(wave, x0, torch.full((3,), t), noise, clip=clip,
                                                       variance=variance), 1e-12)


@pytest.mark.parametrize("variance", VARIANCES)
def test_the_whole_bound_of_gaussian_data(variance):
    """Prior, every KL and the decoder in closed form, in expectation over x0 ~ N(mu, s^2) and the noise.

    The terms are quadratic in x0 and noise, so four points with the right first and second moments give the
    expectation: no Monte Carlo. Only the decoder is not quite quadratic, and very nearly where sigma spans many bins.
    """
    T, mu, s, bit = 20, 0.1, 0.3, math.log(2)
    ddpm = ddpm_of(T=T)
    a, beta = table_of(ddpm), ddpm.betas.numpy()
    sign = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    x0, z = (mu + s * sign[:, 0]).view(4, 1, 1, 1), sign[:, 1].view(4, 1, 1, 1)
    bits = ddpm.bits_per_dim(best_noise(ddpm, mu, s), x0, noise_fn=lambda x: z, clip=False, variance=variance)

    wanted = []
    for t in range(T):
        error = s ** 2 * (1 - a[t + 1]) / (a[t + 1] * s ** 2 + 1 - a[t + 1])  # Var[x0 | x_t]
        sigma2 = sigma2_of(ddpm, t, variance)
        if t == 0:  # -log of density times bin width
            nats = math.log(2 * math.pi * sigma2) / 2 + error / (2 * sigma2) - math.log(2 / 255)
        else:       # the two means differ by this multiple of the error of x0_hat
            of_x0 = math.sqrt(a[t]) * beta[t] / (1 - a[t + 1])
            ratio = beta[t] * (1 - a[t]) / (1 - a[t + 1]) / sigma2
            nats = (ratio - 1 - math.log(ratio) + of_x0 ** 2 * error / sigma2) / 2
        wanted.append(nats / bit)
    prior = (a[-1] * (mu ** 2 + s ** 2) - a[-1] - math.log1p(-a[-1])) / 2 / bit
    np.testing.assert_allclose(bits["terms"].mean(dim=0)[1:], wanted[1:], rtol=1e-8)
    np.testing.assert_allclose(bits["terms"].mean(dim=0)[0], wanted[0], rtol=5e-3)
    np.testing.assert_allclose(bits["prior"].mean(), prior, rtol=1e-6)
    entropy = (math.log(2 * math.pi * math.e * s ** 2) / 2 - math.log(2 / 255)) / bit
    assert bits["total"].mean() > entropy, "a bound below the entropy is none"


def test_likelihoods_leave_no_graph():
    """Neither through the network's weights nor through the images: T terms of it would fill the memory."""
    w = torch.nn.Parameter(torch.ones(()))
    ddpm, x0 = ddpm_of(T=5), images(2, dtype=torch.float32).requires_grad_()

    def model(x, t):
        return w * wave(x, t)

    term = ddpm.bound_term(model, x0, torch.tensor([0, 3]), torch.zeros_like(x0))
    assert not any(value.requires_grad for value in [term, *ddpm.bits_per_dim(model, x0).values()])


# ----------------------------------------------------------------------------------------------------------------------
# Types and devices

@pytest.mark.parametrize("dtype", DTYPES)
def test_results_have_the_type_of_the_images(dtype):
    ddpm, x0, z, t = ddpm_of(T=9), images(dtype=dtype), randn(5, 1, 4, 4, dtype=dtype), torch.tensor([0, 2, 4, 6, 8])
    formulas = [ddpm.q_sample, ddpm.predict_x0, ddpm.predict_noise, ddpm.velocity, ddpm.noise_from_v, ddpm.x0_from_v,
                ddpm.clipped_noise_from_v]
    results = [formula(x0, t, z) for formula in formulas] + [
        *ddpm.posterior(x0, z, t), ddpm.loss(wave, x0, t, z), ddpm.bound_term(wave, x0, t, z), ddpm.prior_bits(x0),
        *ddpm.bits_per_dim(wave, x0).values()]
    for sampler in SAMPLERS:
        for _, x, x0_hat in ddpm.sample(wave, z, sampler=sampler, steps=4):
            results += [x, x0_hat]
    assert {result.dtype for result in results} == {dtype}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_float32_follows_float64(sampler):
    """Coefficients are computed in float64 and cast once: along all of T = 4000 float32 loses only its own rounding."""
    ddpm, x_T = ddpm_of(T=4000), randn(2, 1, 3, 3)
    model = best_noise(ddpm, 0.0, 0.5)
    exact = last(ddpm, model, x_T, sampler=sampler, noise_fn=fresh(1))
    single = last(ddpm, lambda x, t: model(x.double(), t).float(), x_T.float(), sampler=sampler, noise_fn=fresh(1))
    assert single.dtype == torch.float32
    close(single, exact, 1e-4)


def test_colour_images_and_the_shapes_of_other_data():
    """Nothing here is about 28 x 28 grey pixels."""
    ddpm = ddpm_of(T=6)
    for shape in [(2, 3, 5, 7), (2, 9)]:
        x0, z, t = randn(*shape), randn(*shape, seed=1), torch.tensor([0, 5])
        assert ddpm.q_sample(x0, t, z).shape == shape and ddpm.posterior(x0, z, t)[0].shape == shape
        assert ddpm.loss(wave, x0, t, z).shape == (2,) and ddpm.bound_term(wave, x0, t, z).shape == (2,)
        assert last(ddpm, wave, z, steps=3).shape == shape


@pytest.fixture
def fake_cuda():
    """(ddpm, x0, t, noise): tensors that believe they live on a GPU, and a DDPM made before anyone mentioned one."""
    ddpm = ddpm_of(T=6)
    with FakeTensorMode(allow_non_fake_inputs=True):  # the tables of ddpm are real, and stay so
        yield (ddpm, torch.empty(5, 1, 4, 4, device="cuda"), torch.empty(5, dtype=torch.long, device="cuda"),
               torch.empty(5, 1, 4, 4, device="cuda"))


@pytest.mark.parametrize("name", ["q_sample", "predict_x0", "predict_noise", "velocity", "noise_from_v", "x0_from_v",
                                  "clipped_noise_from_v", "posterior", "loss", "bound_term", "prior_bits",
                                  "bits_per_dim"])
def test_formulas_stay_on_the_device_of_the_images(fake_cuda, name):
    ddpm, x0, t, noise = fake_cuda
    arguments = {"posterior": (x0, noise, t), "loss": (wave, x0, t, noise), "bound_term": (wave, x0, t, noise),
                 "prior_bits": (x0,), "bits_per_dim": (wave, x0)}.get(name, (x0, t, noise))
    result = getattr(ddpm, name)(*arguments)
    results = list(result.values()) if isinstance(result, dict) else result if isinstance(result, tuple) else [result]
    assert {r.device.type for r in results} == {"cuda"}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_stay_on_the_device_of_the_noise(fake_cuda, sampler):
    ddpm, _, _, x_T = fake_cuda

    def model(x, t):
        assert t.device == x.device
        return wave(x, t)

    for _, x, x0_hat in ddpm.sample(model, x_T, sampler=sampler, steps=4, noise_fn=ImageNoise(0, range(5))):
        assert x.device.type == x0_hat.device.type == "cuda"


def test_a_mix_up_of_devices_would_raise(fake_cuda):
    """The control: without it the tests above could pass by not noticing."""
    ddpm, x0, t, noise = fake_cuda
    with pytest.raises(RuntimeError):
        ddpm.q_sample(x0, t, torch.empty(5, 1, 4, 4))
