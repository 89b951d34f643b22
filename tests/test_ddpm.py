"""The mathematics, from the papers and not from ddpm.py: numpy, closed forms, Bayes' rule and scipy. The samplers have
a file of their own, test_samplers.py.

Most of it runs in float64, where an agreement to 1e-9 leaves a wrong coefficient no place to hide.
"""
import math

import numpy as np
import pytest
import torch

import train
from ddpm import DDPM, SAMPLERS, WEIGHTINGS, ImageNoise
from diffusion_schedules import make_betas
from fake_device import pretend
from helpers import seeded

VARIANCES = ["posterior", "beta"]
DTYPES = [torch.float32, torch.float64]


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


def best_noise(ddpm, mu, s):
    """The best model of pixels from N(mu, s^2), E[noise | x_t]: it is linear in x_t, and needs no training."""
    a = torch.tensor(table_of(ddpm)[1:])

    def model(x, t):
        a_t = a[t].view(-1, 1, 1, 1)
        return (1 - a_t).sqrt() * (x - a_t.sqrt() * mu) / (a_t * s ** 2 + 1 - a_t)
    return model


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


@pytest.mark.parametrize("betas", [[], [0.1, 0.0], [0.1, 1.0], [-0.1], [[0.1, 0.2]], [0.1, math.nan], [0.9] * 13])
def test_betas_that_cannot_be_computed_with_are_refused(betas):
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


def velocity(ddpm, x0, t, z):
    """Salimans & Ho 2022, section 4: v = alpha noise - sigma x0."""
    a = torch.tensor(table_of(ddpm)[t + 1][:, None, None, None])
    return a.sqrt() * z - (1 - a).sqrt() * x0


def test_the_true_v_gives_back_the_noise():
    ddpm, x0, z, t = ddpm_of(), images(), randn(5, 1, 4, 4, seed=1), torch.tensor([0, 1, 500, 998, 999])
    close(ddpm.clipped_noise_from_v(ddpm.q_sample(x0, t, z), t, velocity(ddpm, x0, t, z)), z)


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
# The objective: L = E over x0, t ~ p and noise of w(t) || noise - noise_theta(x_t, t) ||^2

@pytest.mark.parametrize("name, of_p, of_noise, of_w", [("simple", 0, 0, 0), ("balanced", 0, 0, -0.5),
                                                        ("v", 0.25, 0, -1), ("medium", 0.25, 0.25, -1)])
def test_weightings_are_powers_of_alpha_bar_and_of_what_is_left(name, of_p, of_noise, of_w):
    ddpm = ddpm_of()
    a = table_of(ddpm)[1:]
    drawn = a ** of_p * (1 - a) ** of_noise
    p, w, importance = train.objective(ddpm, name, torch.device("cpu"))
    assert (p.dtype, w.dtype, importance.dtype) == (torch.float64, torch.float32, torch.float32)
    close(p, drawn / drawn.sum())
    close(w, a ** of_w, 1e-6)
    close(importance, drawn.mean() / drawn, 1e-6)


def test_the_weight_of_v_makes_the_error_of_v():
    """Salimans & Ho 2022, section 4: ||v - v_hat||^2 = ||noise - noise_hat||^2 / alpha_bar_t."""
    ddpm, x0, z, t = ddpm_of(), images(), randn(5, 1, 4, 4, seed=1), torch.tensor([0, 1, 500, 998, 999])
    a, x0_hat, w = torch.tensor(table_of(ddpm)[t + 1][:, None, None, None]), images(seed=2), WEIGHTINGS["v"][1]
    v_hat = (a.sqrt() * ddpm.q_sample(x0, t, z) - x0_hat) / (1 - a).sqrt()  # that of x0_hat, which needs no clip
    loss = ddpm.loss(lambda x_t, t: ddpm.clipped_noise_from_v(x_t, t, v_hat), x0, t, z)
    close(w(ddpm.alpha_bars)[t] * loss, (velocity(ddpm, x0, t, z) - v_hat).square().mean(dim=(1, 2, 3)), 1e-7)


def test_a_row_of_any_two_functions_trains(monkeypatch):
    """t is drawn as often as the first says, and its error counts what the second says: the gradient vanishes where the
    weighted objective has its minimum, and not where L_simple has its own."""
    monkeypatch.setitem(WEIGHTINGS, "new", (lambda a: 0.1 + (1 - a) ** 2, lambda a: 1 + torch.log(a).square()))
    ddpm, n, grey = ddpm_of(T=20), 6000, 0.6
    a = table_of(ddpm)[1:]
    wanted_p, wanted_w = 0.1 + (1 - a) ** 2, 1 + np.log(a) ** 2
    wanted_p /= wanted_p.sum()
    p, w, importance = train.objective(ddpm, "new", torch.device("cpu"))
    close(p, wanted_p)
    close(w, wanted_w, 1e-6)
    errors = randn(20).exp()
    close((p * importance * errors).sum(), errors.mean(), 1e-6)

    settings = {"seed": 0, "batch_size": n, "label_dropout": 0.1, "classes": 10}
    pictures = torch.full((50, 1, 4, 4), round((grey + 1) * 127.5), dtype=torch.uint8)
    x0, _, t, z = train.draw_batch(0, pictures, torch.zeros(50, dtype=torch.long), settings, p)
    assert (torch.bincount(t, minlength=20) - n * p).abs().max() < 2
    # The model c x_t of grey images: E noise x_t = sqrt(1 - a) and E x_t^2 = a grey^2 + 1 - a, pixel by pixel.
    slopes = []
    for share in wanted_p * wanted_w, np.ones(20):
        c = (share * np.sqrt(1 - a)).sum() / (share * (a * grey ** 2 + 1 - a)).sum()
        c = torch.tensor(c, dtype=torch.float32, requires_grad=True)
        (w[t] * ddpm.loss(lambda x_t, t: c * x_t, x0, t, z)).mean().backward()
        slopes.append(abs(c.grad.item()))
    assert slopes[0] < 0.02 * slopes[1], slopes


# ----------------------------------------------------------------------------------------------------------------------
# Bits per dimension

def sigma2_of(ddpm, t, variance):
    a, beta = table_of(ddpm), ddpm.betas.numpy()
    if variance == "beta":
        return beta[t]
    if t == 0:  # of x_0 = (x_t - noise sqrt(1 - alpha_bar)) / sqrt(alpha_bar), of which only x_t is known
        return (1 - a[1]) / a[1]
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
@pytest.mark.parametrize("name, T", [("linear", 1), ("linear", 2), ("linear", 1000), ("cosine", 20)])
def test_decoder_is_the_gaussian_mass_of_the_bin(name, T, variance):
    """Section 3.3 by scipy: from x - 1/255 to x + 1/255, black reaching to -infinity and white to infinity."""
    norm = pytest.importorskip("scipy.stats").norm
    ddpm, x0, z = ddpm_of(name, T), images(), 0.8 * randn(5, 1, 4, 4, seed=1)
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


@pytest.mark.parametrize("clip", [True, False])
def test_on_logsnr_the_bound_is_l_simple_up_to_a_factor(clip):
    """Kingma et al. 2021, eq. 17, with a step of log-SNR of 23.3 / (T - 1): L_t = (exp(step) - 1) / 2 L_simple."""
    ddpm, x0, z = ddpm_of("logsnr"), images(), randn(5, 1, 4, 4, seed=1)
    for t in 1, 100, 500, 999:
        t = torch.full((5,), t)
        guess = z + 0.1 * randn(5, 1, 4, 4, seed=2) * (0 if clip else 1)
        term = ddpm.bound_term(lambda x, t: guess, x0, t, z, clip=clip)
        close(term, math.expm1(23.3 / 999) / 2 / math.log(2) * ddpm.loss(lambda x, t: guess, x0, t, z), 1e-7)


def test_the_decoder_of_logsnr_by_the_error_function():
    """Where the noise is a sixth of a grey level: bits of a pixel whose mean is off by 0, 1/4 and 3/4 of a level."""
    ddpm, off = ddpm_of("logsnr"), torch.tensor([0, 0.25, 0.75], dtype=torch.float64).view(3, 1, 1, 1) / 127.5
    x0 = torch.full_like(off, 40 / 127.5)
    bits = ddpm.bound_term(lambda x, t: ddpm.predict_noise(x, t, x0 + off), x0, torch.zeros(3, dtype=torch.long),
                           torch.zeros_like(x0))
    sigma = math.exp(-13.3 / 2)
    for value, d in zip(bits.tolist(), off.flatten().tolist()):
        tails = math.erfc((1 / 255 - d) / sigma / math.sqrt(2)) / 2, math.erfc((1 / 255 + d) / sigma / math.sqrt(2)) / 2
        assert value == pytest.approx(-math.log2(1 - sum(tails)), rel=1e-6)


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


@pytest.mark.parametrize("T", [1, 20])
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
    ddpm, x0 = ddpm_of("cosine", 8), images(3)
    results = {clip: ddpm.bits_per_dim(wave, x0, noise_fn=fresh(1), clip=clip, variance=variance)["terms"]
               for clip in (True, False)}
    z = fresh(1)
    for t in range(8):
        noise = z(x0)
        for clip in (True, False):
            close(results[clip][:, t], ddpm.bound_term(wave, x0, torch.full((3,), t), noise, clip=clip,
                                                       variance=variance), 1e-12)


def test_the_bound_refuses_an_unknown_variance():
    ddpm, x0 = ddpm_of(T=3), images()
    for bound in (lambda: ddpm.bits_per_dim(wave, x0, variance="learned"),
                  lambda: ddpm.bound_term(wave, x0, torch.zeros(5, dtype=torch.long), x0, variance="learned")):
        with pytest.raises(ValueError, match="unknown variance 'learned'; choose posterior or beta"):
            bound()


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
    ddpm, x0 = ddpm_of("cosine", 5), images(2, dtype=torch.float32).requires_grad_()

    def model(x, t):
        return w * wave(x, t)

    term = ddpm.bound_term(model, x0, torch.tensor([0, 3]), torch.zeros_like(x0))
    assert not any(value.requires_grad for value in [term, *ddpm.bits_per_dim(model, x0).values()])


# ----------------------------------------------------------------------------------------------------------------------
# Types and devices

def everything(ddpm, x0, t, noise):
    """All that a DDPM computes, name -> tensor."""
    made = {formula.__name__: formula(x0, t, noise) for formula in (
        ddpm.q_sample, ddpm.predict_x0, ddpm.predict_noise, ddpm.clipped_noise_from_v)}
    made["mean"], made["variance"] = ddpm.posterior(x0, noise, t)
    made |= {"loss": ddpm.loss(wave, x0, t, noise), "bound_term": ddpm.bound_term(wave, x0, t, noise),
             **ddpm.bits_per_dim(wave, x0, noise_fn=lambda x: noise)}
    for sampler in SAMPLERS:
        for step, x, x0_hat in ddpm.sample(wave, noise, sampler=sampler, steps=4, noise_fn=ImageNoise(0, range(5))):
            made |= {f"x of {sampler} after {step}": x, f"x0_hat of {sampler} at {step}": x0_hat}
    return made


def inputs(dtype=torch.float32):
    return images(dtype=dtype), torch.tensor([0, 2, 4, 6, 8]), randn(5, 1, 4, 4, seed=1, dtype=dtype)


def test_results_have_the_type_of_the_images():
    """And the digits of that type, whichever was asked for first: tables that were cast are not cast back."""
    ddpm = ddpm_of("cosine", 9)
    for dtype in torch.float64, torch.float32, torch.float64:
        made = everything(ddpm, *inputs(dtype))
        assert {x.dtype for x in made.values()} == {dtype}
        for name, x in everything(ddpm_of("cosine", 9), *inputs(dtype)).items():
            assert torch.equal(made[name], x), f"{name} in {dtype}"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_results_are_on_the_device_of_the_images(device):
    """Of a DDPM that was used on the CPU before, and is after: the same numbers on each."""
    ddpm = ddpm_of("cosine", 9)
    here = everything(ddpm, *inputs())
    with pretend(device) as home:
        there = everything(ddpm, *(x.to(home) for x in inputs()))
        assert {name: x.device.type for name, x in there.items()} == dict.fromkeys(here, device)
        there = {name: x.cpu() for name, x in there.items()}
        with pytest.raises(RuntimeError, match="same device"):  # the control: a mix-up would be noticed
            ddpm.q_sample(inputs()[0].to(home), *inputs()[1:])
    again = everything(ddpm, *inputs())
    for name, x in here.items():
        assert torch.equal(there[name], x) and torch.equal(again[name], x), name


def test_a_process_that_sampled_in_inference_mode_can_train():
    """Autograd refuses tensors that inference mode has made; none of them may be left in the process."""
    used, (x0, t, z) = ddpm_of("cosine", 9), inputs()
    with torch.inference_mode():
        everything(used, x0, t, z)
    gradients = []
    for ddpm in used, ddpm_of("cosine", 9):
        v = wave(x0, t).requires_grad_()
        ddpm.loss(lambda x_t, t: ddpm.clipped_noise_from_v(x_t, t, v), x0, t, z).mean().backward()
        gradients.append(v.grad)
    assert gradients[0].abs().max() > 0
    close(*gradients, 0)


def test_colour_images_and_the_shapes_of_other_data():
    """Nothing here is about 28 x 28 grey pixels."""
    ddpm = ddpm_of("cosine", 6)
    for shape in [(2, 3, 5, 7), (2, 9)]:
        x0, z, t = randn(*shape), randn(*shape, seed=1), torch.tensor([0, 5])
        assert ddpm.q_sample(x0, t, z).shape == shape and ddpm.posterior(x0, z, t)[0].shape == shape
        assert ddpm.loss(wave, x0, t, z).shape == (2,) and ddpm.bound_term(wave, x0, t, z).shape == (2,)
        assert last(ddpm, wave, z, steps=3).shape == shape
