"""The mathematics of DDPM: Ho, Jain & Abbeel 2020, "Denoising Diffusion Probabilistic Models" (arXiv 2006.11239).

Equation and algorithm numbers are that paper's unless another is named. Its symbols, as this whole repo spells them:
    x0          a clean image, float [B, C, H, W] in [-1, 1]
    t           timestep, LongTensor [B] in 0..T-1 (the paper's t minus 1)
    x_t         the image after t + 1 noising steps; at t = T-1 it is all but pure noise
    noise       epsilon, standard normal, same shape as x0
    betas       beta_t: variance of the noise that one step adds
    alphas      alpha_t = 1 - beta_t
    alpha_bars  alpha_bar_t = alpha_0 * ... * alpha_t: the share of x0's variance that is left in x_t
    x0_hat      the estimate of x0 that a noise prediction implies
    noise_theta the model's prediction of the noise
    x_T         the pure noise that sampling starts from, used as x_t at t = T-1
    z           fresh standard normal noise
    || . ||^2   the mean of the squares over an image's pixels (the paper: their sum)

This file knows nothing of networks, data sets or files. A network comes in as a callable  model(x_t, t) -> noise.
"""
import functools
import math
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch import nn

from diffusion_schedules import check_betas, sampling_timesteps


# ----------------------------------------------------------------------------------------------------------------------
# Weightings: the objective is  L = E over x0, t ~ p and noise of  w(t) || noise - noise_theta(x_t, t) ||^2

# name: (p, w), functions of alpha_bars [T]: how often each t is drawn (up to a factor), and how much its error counts.
# Timestep t counts p(t) w(t) in all. With w = 1 / alpha_bar_t the error is that of v, which our networks
# return. The power 1/4 of "medium" is a compromise between good shapes and few bits per dimension: EXPERIMENTS.md,
# The clear end.
WEIGHTINGS = {
    "medium": (lambda alpha_bars: (alpha_bars * (1 - alpha_bars)) ** 0.25, lambda alpha_bars: alpha_bars ** -1),
    "v": (lambda alpha_bars: alpha_bars ** 0.25, lambda alpha_bars: alpha_bars ** -1),
    "balanced": (torch.ones_like, lambda alpha_bars: alpha_bars ** -0.5),
    "simple": (torch.ones_like, torch.ones_like),  # L_simple, eq. 14
}


# ----------------------------------------------------------------------------------------------------------------------
# Samplers: one step each. DDPM.sample is the loop around them.

class Sampler(NamedTuple):
    """A sampler: one step, from x_t to x_s with s < t, and which timesteps it visits by default.

    Args:
        step: callable (x, x0_hat, a_t, a_s, before, noise_fn) -> x_s, float [B, C, H, W], where
            x, x0_hat are x_t and the model's estimate of x0, clipped if asked,
            a_t, a_s are alpha_bar_t and alpha_bar_s as Python floats: each coefficient is float64 until it meets x,
            before is (alpha_bar, x0_hat) of the step before, for multistep methods, and None at the first,
            noise_fn(x) is standard normal noise like x.
        spacing: see sampling_timesteps.
        steps: how many timesteps the commands visit by default; None: all.
    """
    step: Callable
    spacing: str
    steps: int | None


def ddpm_step(x, x0_hat, a_t, a_s, before, noise_fn, variance="posterior"):
    """Algorithm 2, the ancestral step: a draw from the posterior that x0_hat implies, eqs. 6 and 7."""
    # DDPM.posterior for any s < t. Without the clip it is line 4 of algorithm 2,
    #   x_{t-1} = 1/sqrt(alpha_t) (x_t - (1 - alpha_t) / sqrt(1 - alpha_bar_t) noise_theta) + sigma_t z
    # with s for t-1. When steps are skipped, alpha_t means alpha_bar_t / alpha_bar_s, and beta_t means 1 - alpha_t.
    alpha = a_t / a_s
    # mean_t = (sqrt(alpha_bar_s) (1 - alpha_t) x0_hat + sqrt(alpha_t) (1 - alpha_bar_s) x_t) / (1 - alpha_bar_t)
    mean = (math.sqrt(a_s) * (1 - alpha) * x0_hat + math.sqrt(alpha) * (1 - a_s) * x) / (1 - a_t)
    # sigma_t^2 = beta~_t = (1 - alpha_bar_s) / (1 - alpha_bar_t) beta_t, or beta_t
    sigma2 = (1 - alpha) * ((1 - a_s) / (1 - a_t) if variance == "posterior" else 1)
    return mean + math.sqrt(sigma2) * noise_fn(x)


def ddim_step(x, x0_hat, a_t, a_s, before, noise_fn):
    """DDIM, Song, Meng & Ermon 2021 (arXiv 2010.02502), eq. 12 with sigma = 0: deterministic, first order."""
    # The noise that x0_hat leaves in x_t. After a clip it is no longer the model's own.
    noise = (x - math.sqrt(a_t) * x0_hat) / math.sqrt(1 - a_t)
    # x_s = sqrt(alpha_bar_s) x0_hat + sqrt(1 - alpha_bar_s) noise  (their alpha is DDPM's alpha_bar)
    return math.sqrt(a_s) * x0_hat + math.sqrt(1 - a_s) * noise


def dpmpp_step(x, x0_hat, a_t, a_s, before, noise_fn):
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2: deterministic, second order."""
    h = _lambda_step(a_t, a_s)
    d = _extrapolated(x0_hat, a_t, h, before)
    # x_s = sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) x_t - sqrt(alpha_bar_s) (exp(-h) - 1) D
    return math.sqrt((1 - a_s) / (1 - a_t)) * x - math.sqrt(a_s) * math.expm1(-h) * d


def dpmpp_sde_step(x, x0_hat, a_t, a_s, before, noise_fn):
    """SDE-DPM-Solver++(2M), Lu et al. 2022, section 5: also second-order, but stochastic. Like "ddpm" it adds noise,
    which corrects the errors of earlier steps."""
    h = _lambda_step(a_t, a_s)
    d = _extrapolated(x0_hat, a_t, h, before)
    # x_s = sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t)) exp(-h) x_t + sqrt(alpha_bar_s) (1 - exp(-2h)) D
    #       + sqrt(1 - alpha_bar_s) sqrt(1 - exp(-2h)) z
    new = -math.expm1(-2 * h)  # the share of the noise's variance that is drawn anew
    return (math.sqrt((1 - a_s) / (1 - a_t)) * math.exp(-h) * x + math.sqrt(a_s) * new * d
            + math.sqrt((1 - a_s) * new) * noise_fn(x))


def _lambda_step(a_t, a_s):
    # h = lambda_s - lambda_t,  lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar))
    return (math.log(a_s / (1 - a_s)) - math.log(a_t / (1 - a_t))) / 2


def _extrapolated(x0_hat, a_t, h, before):
    """x0_hat extrapolated from its last two values to the middle of the coming step; at the first step, as it is."""
    if not before:
        return x0_hat
    a_before, x0_hat_before = before
    # D = (1 + 1/(2r)) x0_hat - 1/(2r) x0_hat_before,  r = h_before / h
    return x0_hat + h / (2 * _lambda_step(a_before, a_t)) * (x0_hat - x0_hat_before)


# Spacing and default steps were measured: EXPERIMENTS.md, Samplers, The clear end. To add a sampler: a step and a row.
SAMPLERS = {
    "ddpm": Sampler(ddpm_step, "trailing", None),
    "ddim": Sampler(ddim_step, "trailing", 20),
    "dpm++": Sampler(dpmpp_step, "logsnr", 10),
    "dpm++sde": Sampler(dpmpp_sde_step, "signal", 24),
}


class ReverseProcess:
    """An iterator of (t, x, x0_hat), one for each of `timesteps`, that also knows the noise it starts from, `x_T`."""

    def __init__(self, x_T, timesteps, steps):
        self.x_T, self.timesteps, self._steps = x_T, timesteps, steps

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._steps)


# ----------------------------------------------------------------------------------------------------------------------

class DDPM(nn.Module):
    """The forward process, the losses and the reverse process for one table of betas.

    Args:
        betas: [T], each in (0, 1), as check_betas wants them.
    Attributes:
        T: number of timesteps.
        betas, alphas, alpha_bars: float64 [T], on the CPU. They are plain attributes, not buffers, so that
            .to(device) leaves them there: MPS has no float64.
    Raises:
        ValueError: as check_betas.
    """

    def __init__(self, betas):
        super().__init__()
        self.betas = betas = check_betas(betas)
        self.T = len(betas)
        self.alphas = 1 - betas
        self.alpha_bars = torch.cumprod(self.alphas, dim=0)

        # alpha_bar_{t-1}, which is 1 at t = 0: the clean image.
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bars[:-1]])
        self.tables = {
            "sqrt_alpha_bars": self.alpha_bars.sqrt(),
            "sqrt_one_minus_alpha_bars": (1 - self.alpha_bars).sqrt(),
            # Eq. 7: mean_t = sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t) x_0
            #               + sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) x_t
            "posterior_mean_x0": previous.sqrt() * self.betas / (1 - self.alpha_bars),
            "posterior_mean_x_t": self.alphas.sqrt() * (1 - previous) / (1 - self.alpha_bars),
            # beta~_t = (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t) beta_t
            "variance_posterior": (1 - previous) / (1 - self.alpha_bars) * self.betas,
            "variance_beta": self.betas,
        }
        self._cast = {}  # the tables that were used, by name, type and device

    def _at(self, name, x, t):
        """The entries of a table at timesteps t [B], in x's type, shaped to multiply x [B, C, H, W]."""
        key = name, x.dtype, x.device
        if key not in self._cast:  # kept: copying it to a GPU at each step would stall it
            self._cast[key] = self.tables[name].to(x.dtype).to(x.device)
        return self._cast[key][t].view(-1, *[1] * (x.ndim - 1))

    # ------------------------------------------------------------------------------------------------------------------
    # Forward process

    def q_sample(self, x0, t, noise):
        """Noises x0 in one go to timestep t: eq. 4. Returns x_t, shaped like x0."""
        # q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)
        return self._at("sqrt_alpha_bars", x0, t) * x0 + self._at("sqrt_one_minus_alpha_bars", x0, t) * noise

    def predict_x0(self, x_t, t, noise):
        """Eq. 15, which is eq. 4 solved for x_0: the clean image that x_t comes from if it holds `noise`."""
        # x_0 = (x_t - sqrt(1 - alpha_bar_t) noise) / sqrt(alpha_bar_t)
        return (x_t - self._at("sqrt_one_minus_alpha_bars", x_t, t) * noise) / self._at("sqrt_alpha_bars", x_t, t)

    def predict_noise(self, x_t, t, x0):
        """Eq. 4 solved for the noise: what is in x_t if it comes from x0."""
        # noise = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t)
        return (x_t - self._at("sqrt_alpha_bars", x_t, t) * x0) / self._at("sqrt_one_minus_alpha_bars", x_t, t)

    def posterior(self, x0, x_t, t):
        """The reverse step if x0 were known, q(x_{t-1} | x_t, x_0): eqs. 6 and 7.

        Returns:
            mean, shaped like x0, and variance [B, 1, 1, 1]. At t = 0 they are x0 and 0.
        """
        # mean_t = c_t x_0 + d_t x_t, with c and d of eq. 7, as __init__ has them
        mean = self._at("posterior_mean_x0", x0, t) * x0 + self._at("posterior_mean_x_t", x0, t) * x_t
        return mean, self._at("variance_posterior", x0, t)

    # ------------------------------------------------------------------------------------------------------------------
    # Training

    def loss(self, model, x0, t, noise):
        """L_simple, eq. 14: how far off the model's noise is. Returns the mean over the pixels of each image, [B].

        t and noise are passed in, so that the caller controls the randomness.
        """
        x_t = self.q_sample(x0, t, noise)
        # L_simple = E || noise - noise_theta(x_t, t) ||^2
        return (noise - model(x_t, t)).square().flatten(1).mean(dim=1)

    def clipped_noise_from_v(self, x_t, t, v):
        """The noise that a prediction of v amounts to, once its x0_hat is clipped to [-1, 1]: what our networks are
        trained and sampled with.

        v is that of Salimans & Ho 2022 (arXiv 2202.00512), section 4. Near t = 0 it is the noise, near t = T-1 it is
        -x_0, and in between a rotation of the two: always what x_t does not show yet.

        The samplers clip x0_hat, so the loss should judge the clipped one too: then a UNet that predicts v may say
        "below -1" where it is sure of black, and need not hit -1 exactly (EXPERIMENTS.md, Clip).
        The gradient goes straight through the clip (a straight-through estimator: Bengio et al. 2013, arXiv
        1308.3432), so that a prediction outside is pulled back where the truth is inside.
        """
        # v = sqrt(alpha_bar_t) noise - sqrt(1 - alpha_bar_t) x_0,  and with eq. 4
        # x_0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v
        x0_hat = self._at("sqrt_alpha_bars", x_t, t) * x_t - self._at("sqrt_one_minus_alpha_bars", x_t, t) * v
        x0_hat = x0_hat + (x0_hat.clamp(-1, 1) - x0_hat).detach()
        return self.predict_noise(x_t, t, x0_hat)

    # ------------------------------------------------------------------------------------------------------------------
    # Reverse process

    def sample(self, model, x_T, *, sampler="ddpm", steps=None, noise_fn=torch.randn_like, clip=True,
               variance="posterior", timesteps=None):
        """Runs the process backwards, from noise to an image, one visited timestep at a time.

        Args:
            model: callable (x_t [B, C, H, W], t LongTensor [B]) -> noise, shaped like x_t.
            x_T: standard normal noise, float [B, C, H, W]; with `timesteps`, x_t at the first of them.
            sampler: one of SAMPLERS.
            steps: number of timesteps to visit, 1..T, each one call of the model. None: all T.
            noise_fn: noise_fn(x) -> standard normal noise like x, called once per step that adds noise.
            clip: clip x0_hat to [-1, 1], and let the step follow from the clipped one.
            variance: of "ddpm" only. "posterior": sigma_t^2 = beta~_t, the variance of q(x_{t-1} | x_t, x_0), optimal
                if the data were a single point; "beta": sigma_t^2 = beta_t, optimal if they were white noise.
            timesteps: the timesteps to visit, strictly decreasing. They override `steps` and the sampler's own spacing.
        Returns:
            an iterator of (t, x, x0_hat), one for each step: t (int) is the timestep just left, x the new, less noisy
            image and x0_hat the clean image predicted from the old one. The last x is the sample. The iterator's
            attributes x_T and timesteps are the noise it starts from and the list of timesteps that it visits.
        Raises:
            ValueError: unknown sampler or variance, steps outside 1..T, timesteps not decreasing or outside 0..T-1.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS)}")
        check_variance(variance)
        step, spacing, _ = SAMPLERS[sampler]
        if step is ddpm_step:
            step = functools.partial(step, variance=variance)
        if timesteps is None:
            timesteps = sampling_timesteps(self.T, self.T if steps is None else steps, spacing, self.alpha_bars)
        timesteps = [int(t) for t in timesteps]
        if not timesteps or sorted(set(timesteps), reverse=True) != timesteps:
            raise ValueError("timesteps must be a strictly decreasing list of at least one")
        if timesteps[0] >= self.T or timesteps[-1] < 0:
            raise ValueError(f"timesteps must lie in 0..{self.T - 1}, got {timesteps[0]}..{timesteps[-1]}")
        return ReverseProcess(x_T, timesteps, self._reverse_process(model, x_T, step, timesteps, noise_fn, clip))

    @torch.no_grad()
    def _reverse_process(self, model, x, step, timesteps, noise_fn, clip):
        alpha_bars, before = self.alpha_bars.tolist(), None
        for t, s in zip(timesteps, timesteps[1:] + [None]):  # from x_t to x_s, or, from the last timestep, to x_0
            a_t, x0_hat = alpha_bars[t], self._x0_hat(model, x, t, clip)
            # The last step ends at x0_hat: with alpha_bar_s = 1 that is the mean, and no noise is added (z = 0).
            x = x0_hat if s is None else step(x, x0_hat, a_t, alpha_bars[s], before, noise_fn)
            before = a_t, x0_hat
            yield t, x, x0_hat

    def _x0_hat(self, model, x, t, clip):
        if not isinstance(t, torch.Tensor):  # one for all
            t = torch.full((len(x),), t, dtype=torch.long, device=x.device)
        x0_hat = self.predict_x0(x, t, model(x, t))
        return x0_hat.clamp(-1, 1) if clip else x0_hat

    @torch.no_grad()
    def inpaint(self, model, x_T, x0, known, *, timesteps, rounds, noise_fn=torch.randn_like, clip=True):
        """Fills in the unknown part of images: RePaint, Lugmayr et al. 2022 (arXiv 2201.09865), algorithm 1.

        Args:
            model, x_T, timesteps, noise_fn, clip: as in `sample`.
            x0: float [B, C, H, W] in [-1, 1].
            known: bool, broadcastable to x0: where x0 is kept.
            rounds: how many times each step but the last is made. In between, noise is added again, so that the known
                and the filled-in part come to match.
        Returns:
            an iterator of (t, x, x0_hat), one for each timestep. The last x is x0 where that is known.
        """
        timesteps, x = [int(t) for t in timesteps], x_T
        alpha_bars = self.alpha_bars[timesteps].tolist() + [1.0]
        for t, a_t, a_s in zip(timesteps, alpha_bars, alpha_bars[1:]):
            for left in reversed(range(rounds if a_s < 1 else 1)):
                x0_hat = self._x0_hat(model, x, t, clip)
                # Their eq. 8, but with alpha_bar_s, as x_s is what is made here (m: known):
                # x_s = m (sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s) z) + (1 - m) (a step)
                step = ddpm_step(x, x0_hat, a_t, a_s, None, noise_fn)
                x = torch.where(known, math.sqrt(a_s) * x0 + math.sqrt(1 - a_s) * noise_fn(x), step)
                if left:  # x_t = sqrt(alpha_bar_t / alpha_bar_s) x_s + sqrt(1 - alpha_bar_t / alpha_bar_s) z
                    x = math.sqrt(a_t / a_s) * x + math.sqrt(1 - a_t / a_s) * noise_fn(x)
            yield t, x, x0_hat

    @torch.no_grad()
    def invert(self, model, x, *, timesteps, clip=True):
        """DDIM inversion (Song, Meng & Ermon 2021, section 4.3): the noise from which "ddim" would make x. It takes x
        for the x_t at the last of `timesteps` and returns the one at the first. They decrease as in `sample`."""
        visited = [int(t) for t in timesteps][::-1]
        for t, s in zip(visited, visited[1:]):
            x = ddim_step(x, self._x0_hat(model, x, t, clip), self.alpha_bars[t].item(), self.alpha_bars[s].item(),
                          None, None)
        return x

    # ------------------------------------------------------------------------------------------------------------------
    # Likelihood

    @torch.no_grad()
    def bits_per_dim(self, model, x0, *, noise_fn=torch.randn_like, clip=True, variance="posterior"):
        """The variational bound on -log p(x0), eq. 5, term by term: T calls of the model.

        Args:
            x0: float [B, C, H, W], grey levels as utils.data.to_float makes them (bins of width 2/255).
        Returns:
            dict of float tensors, in bits per dimension: "total" [B], and what it is the sum of: "prior" [B] (L_T) and
            "terms" [B, T] (L_0, the decoder, at t = 0, and L_t for the others).
        Raises:
            ValueError: unknown variance.
        """
        prior = self.prior_bits(x0)
        terms = torch.stack([
            self.bound_term(model, x0, torch.full((len(x0),), t, dtype=torch.long, device=x0.device), noise_fn(x0),
                            clip=clip, variance=variance) for t in range(self.T)], dim=1)
        return {"total": prior + terms.sum(dim=1), "prior": prior, "terms": terms}

    def prior_bits(self, x0):
        """L_T = KL(q(x_T | x_0) || N(0, I)) in bits per dimension, [B]: how much of the image is left at t = T-1."""
        a = self.alpha_bars[-1].item()
        # KL(N(m, s^2) || N(0, 1)) = (s^2 - 1 - log s^2 + m^2) / 2,  m^2 = a x_0^2,  s^2 = 1 - a
        nats = (-a - math.log1p(-a) + a * x0.square()) / 2
        return nats.flatten(1).mean(dim=1) / math.log(2)

    @torch.no_grad()
    def bound_term(self, model, x0, t, noise, *, clip=True, variance="posterior"):
        """One term of the bound for each image, in bits per dimension, [B]: L_t at t > 0, the decoder L_0 at t = 0.

        Args:
            variance: sigma_t^2 of the reverse process, as in `sample`. The posterior variance is 0 at t = 0; there the
                decoder takes the variance of x_0 given x_t alone.
        Raises:
            ValueError: unknown variance.
        """
        check_variance(variance)
        x_t = self.q_sample(x0, t, noise)
        x0_hat = self._x0_hat(model, x_t, t, clip)
        true_mean, true_variance = self.posterior(x0, x_t, t)
        mean, _ = self.posterior(x0_hat, x_t, t)
        sigma2 = self._at(f"variance_{variance}", x0, t)

        # L_t: KL(N(m1, v1) || N(m2, v2)) = (log(v2 / v1) + v1 / v2 - 1 + (m1 - m2)^2 / v2) / 2
        ratio = true_variance / sigma2  # meaningless at t = 0, where the decoder takes over
        kl = (ratio - 1 - ratio.log() + (true_mean - mean).square() / sigma2) / 2
        at_zero = (t == 0).view(-1, *[1] * (x0.ndim - 1))
        # The decoder: sigma^2 = (1 - alpha_bar_0) / alpha_bar_0, what x_t alone leaves open about x_0, or beta_0
        decoder_sigma2 = self.betas[0].item() / (self.alphas[0].item() if variance == "posterior" else 1)
        nats = torch.where(at_zero, -_log_decoder(x0, mean, math.sqrt(decoder_sigma2)), kl)
        return nats.flatten(1).mean(dim=1) / math.log(2)


def check_variance(variance):
    """Raises ValueError for a variance of the reverse process that there is not."""
    if variance not in ("posterior", "beta"):
        raise ValueError(f"unknown variance {variance!r}; choose posterior or beta")


def _log_decoder(x0, mean, sigma):
    """log p(x_0 | x_1), eq. 13, where x_1 is our x_t at t = 0: the Gaussian's mass in each grey level's bin, nats."""
    # integral of N(x; mean, sigma^2) from x_0 - 1/255 to x_0 + 1/255; the outermost bins reach to infinity
    low = torch.where(x0 < -1 + 1 / 255, -torch.inf, (x0 - 1 / 255 - mean) / sigma)
    high = torch.where(x0 > 1 - 1 / 255, torch.inf, (x0 + 1 / 255 - mean) / sigma)
    upper = low + high > 0  # mirrored into the lower tail, where the cumulative distribution does not round to 1
    low, high = torch.where(upper, -high, low), torch.where(upper, -low, high)
    log_low, log_high = _log_ndtr(low), _log_ndtr(high)
    # log(exp(log_high) - exp(log_low))
    return log_high + torch.log1p(-torch.exp(log_low - log_high))


def _log_ndtr(x):
    """log of the standard normal's cumulative distribution. MPS does not have it, and gets the CPU's."""
    return torch.special.log_ndtr(x.cpu() if x.device.type == "mps" else x).to(x.device)


# ----------------------------------------------------------------------------------------------------------------------
# Randomness by number, and what differs between devices

def fold_in(*numbers):
    """One seed for a random stream from several whole numbers in 0..2**32-1, mixed so that neighbouring numbers give
    unrelated streams. Zeros at the end do not count: (s, i) and (s, i, 0) are one stream. On the CPU torch keeps 32
    bits of the seed, so among some 80,000 streams two are likely to be the same.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def to_device(x, device):
    """A CPU tensor on the device. CUDA gets it from pinned memory, so that nothing waits for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def exact_dtype(device):
    """float64, for sums of many numbers, or float32 on MPS, which lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


class ImageNoise:
    """A noise_fn with one random stream per image, so that image i depends on (seed, i) and never on its batch.

    Args:
        seed: whole number, 0..2**32-1.
        indices: the numbers i of the images in the batch, each in 0..2**32-1.
    """

    def __init__(self, seed, indices):
        self.generators = [torch.Generator().manual_seed(fold_in(seed, i)) for i in indices]

    def __call__(self, x):
        """Standard normal noise shaped like x [B, ...], of its type and on its device. It is drawn on the CPU, so that
        every device gets the same."""
        noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for generator in self.generators])
        return to_device(noise, x.device).to(x.dtype)
