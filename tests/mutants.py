"""Mutants: does the test suite notice, if a line breaks?

    python tests/mutants.py                      # all of them: some 35 minutes on two cores
    python tests/mutants.py --module ddpm        # those of one module
    python tests/mutants.py --only 12,40-45      # some, by their numbers
    python tests/mutants.py --check              # only: do all of them still apply?

MUTANTS lists mistakes that a maintainer could make, each of them as a change of a line or two. One at a time they are
made in a copy of the repository, where the tests run until one fails: in the module's own test file first, then in all
others that import it; in each first the tests that come by the lines changed, and of those first the ones that noticed
the last mutants, then the quickest. Before that the suite must pass without a change, and who comes by where is noted.
A mutant that no test notices is a test that is missing, unless MUTANTS gives a reason (then only the module's own test
file is run). Rows that begin with "classic" are the bugs that diffusion codebases had again and again. (One of that
list has no place here: a moving average that forgets the network's buffers. The network has none.)

It is no part of the suite: pytest does not collect it. It needs os.fork, and so no Windows.
"""
import argparse
import ast
import collections
import concurrent.futures
import contextlib
import importlib
import itertools
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ENOUGH = 0.95  # share of the mutants that must be noticed
# Where a module's mutants are most likely noticed. The other test files that import it follow.
FIRST = {
    "diffusion_schedules": ["test_schedules"],
    "ddpm": ["test_ddpm"],
    "diffusion_model": ["test_model"],
    "data": ["test_data"],
    "checkpoint": ["test_checkpoint", "test_hostile"],
    "cli": ["test_cli", "test_sample"],
    "train": ["test_train"],
    "muon": ["test_muon"],
    "benchmark": ["test_benchmark"],
    "sample": ["test_sample"],
    "evaluate": ["test_evaluate"],
}

# module: rows of (bug, old, new) or (bug, old, new, reason). `old` is in the module exactly once; where one bug takes
# two changes, old and new are tuples. The reason is why it is right that no test notices.
#
# Take care what you break: the tests run as whoever you are. No row may weaken what keeps atomic_write from replacing
# /dev/null, or send a signal to anyone.
MUTANTS = {
    "diffusion_schedules": [
        ("linear schedule not scaled with T", "scale = 1000 / timesteps", "scale = 1.0"),
        ("linear schedule ends at 0.01", "scale * 0.02, timesteps", "scale * 0.01, timesteps"),
        ("linear schedule not clipped below 1", "dtype=torch.float64).clamp(max=0.999)", "dtype=torch.float64)"),
        ("linear table in float32", "dtype=torch.float64).clamp(max=0.999)",
         "dtype=torch.float32).double().clamp(max=0.999)"),
        ("with T = 1 the beginning of the line, not its end", "torch.tensor([0.999]", "torch.tensor([0.1]"),
        ("cosine offset s ten times too large", "s = 0.008", "s = 0.08"),
        ("cosine not squared", "math.pi / 2) ** 2", "math.pi / 2)"),
        ("cosine's t/T in float32", "u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps",
         "u = (torch.arange(timesteps + 1) / timesteps).double()"),
        ("cosine's t/T shifted by one", "u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps",
         "u = torch.arange(1, timesteps + 2, dtype=torch.float64) / timesteps"),
        ("cosine clipped at 0.9999", "f[:-1]).clamp(max=0.999)", "f[:-1]).clamp(max=0.9999)"),
        ("beta from alpha_bar instead of its quotient", "(1 - f[1:] / f[:-1])", "(1 - f[1:] / f[0])"),
        ("two names for one schedule", '"cosine": cosine_betas', '"cosine": linear_betas'),
        ("steps == T refused", "if not 1 <= steps <= timesteps", "if not 1 <= steps < timesteps"),
        ("0 steps allowed", "if not 1 <= steps <= timesteps", "if not 0 <= steps <= timesteps"),
        ("leading spacing: sampling does not start at T-1", "round(timesteps - k * timesteps / steps) - 1 for k",
         "round(timesteps - (k + 1) * timesteps / steps) for k"),
        ("trailing cut down instead of rounded", "round(timesteps - k * timesteps / steps) - 1 for k",
         "int(timesteps - k * timesteps / steps) - 1 for k"),
        ("classic: few steps stop at t = 1", "np.linspace(logsnr[-1], logsnr[0], steps)",
         "np.linspace(logsnr[-1], logsnr[min(1, timesteps - 1)], steps)"),
        ("uniform in log alpha_bar instead of log-SNR", "np.log([float(a) / (1 - float(a)) for a in alpha_bars])",
         "np.log([float(a) for a in alpha_bars])"),
        ("no room left for the timesteps to come", "max(round(float(t)), steps - 1 - k)", "round(float(t))"),
        ("a timestep visited twice", "min(before - 1, max", "min(before, max"),
        ("sampling_timesteps forgets the spacing", "spaced_timesteps(timesteps, steps, spacing, alpha_bars))",
         "spaced_timesteps(timesteps, steps, alpha_bars=alpha_bars))"),
        ("another spacing by default", 'def sampling_timesteps(timesteps, steps, spacing="trailing"',
         'def sampling_timesteps(timesteps, steps, spacing="logsnr"'),
        ("alpha_bars of another T allowed", "alpha_bars is None or len(alpha_bars) != timesteps", "alpha_bars is None"),
        ("T = 0 allowed", "if timesteps < 1:", "if timesteps < 0:"),
    ],

    "ddpm": [
        # streams
        ("seed and number added, so that neighbours share a stream", "np.random.SeedSequence(numbers)",
         "np.random.SeedSequence(sum(numbers))"),
        ("only the first number counts", "np.random.SeedSequence(numbers)", "np.random.SeedSequence(numbers[0])"),
        ("one stream for all images", "stream_seed(seed, i)", "stream_seed(seed, 0)"),
        ("noise uniform", "torch.randn(x.shape[1:], generator=generator)",
         "torch.rand(x.shape[1:], generator=generator)"),
        ("noise left on the CPU", "noise.to(x.device, x.dtype)", "noise.to(x.dtype)"),
        ("noise left in float32", "noise.to(x.device, x.dtype)", "noise.to(x.device)"),
        # tables
        ("tables in float32", 'to("cpu", torch.float64)', 'to("cpu", torch.float32)'),
        ("beta = 0 allowed", "(betas > 0)", "(betas >= 0)"),
        ("beta = 1 allowed", "(betas < 1)", "(betas <= 1)"),
        ("no betas allowed", "betas.ndim != 1 or not len(betas) or", "betas.ndim != 1 or"),
        ("classic: float32 cumulative product", "torch.cumprod(self.alphas, dim=0)",
         "torch.cumprod(self.alphas.float(), dim=0).double()"),
        ("classic: alpha_bar shifted by one", "self.alpha_bars = torch.cumprod(self.alphas, dim=0)",
         "self.alpha_bars = torch.cat([torch.ones(1).double(), torch.cumprod(self.alphas, dim=0)[:-1]])"),
        ("sums instead of products", "torch.cumprod(self.alphas, dim=0)", "1 - torch.cumsum(self.betas, dim=0)"),
        ("coefficients in float64, so that images become it", "table.to(x.dtype).to(x.device)[t]",
         "table.to(x.device)[t]"),
        ("coefficients left on the CPU", "table.to(x.dtype).to(x.device)[t]", "table.to(x.dtype)[t]"),
        ("one timestep for the batch", "table.to(x.dtype).to(x.device)[t]", "table.to(x.dtype).to(x.device)[t[:1]]"),
        ("0 before the first alpha_bar", "torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bars[:-1]])",
         "torch.cat([torch.zeros(1, dtype=torch.float64), self.alpha_bars[:-1]])"),
        ("the last alpha_bar before the first", "torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bars[:-1]])",
         "self.alpha_bars.roll(1)"),
        # forward
        ("classic: variance where the standard deviation belongs",
         "* x0 + self._at((1 - self.alpha_bars).sqrt(), x0, t) * noise",
         "* x0 + self._at(1 - self.alpha_bars, x0, t) * noise"),
        ("x_t from alpha_bar instead of its root", "return self._at(self.alpha_bars.sqrt(), x0, t) * x0 +",
         "return self._at(self.alpha_bars, x0, t) * x0 +"),
        ("one step's alpha instead of alpha_bar", "return self._at(self.alpha_bars.sqrt(), x0, t) * x0 +",
         "return self._at(self.alphas.sqrt(), x0, t) * x0 +"),
        ("predict_x0 does not divide", "t) * noise) / self._at(self.alpha_bars.sqrt(), x_t, t)", "t) * noise)"),
        ("predict_noise divides by the variance", "t) * x0) / self._at((1 - self.alpha_bars).sqrt(), x_t, t)",
         "t) * x0) / self._at(1 - self.alpha_bars, x_t, t)"),
        ("posterior mean: alpha_bar_t for alpha_bar_{t-1}", "of_x0 = alpha_bars_before.sqrt()",
         "of_x0 = self.alpha_bars.sqrt()"),
        ("posterior mean: no root of alpha", "of_x_t = self.alphas.sqrt()", "of_x_t = self.alphas"),
        ("posterior mean: x0 and x_t swapped", "self._at(of_x0, x0, t) * x0 + self._at(of_x_t, x0, t) * x_t",
         "self._at(of_x0, x0, t) * x_t + self._at(of_x_t, x0, t) * x0"),
        ("classic: beta in place of the posterior's variance",
         "variance = (1 - alpha_bars_before) / (1 - self.alpha_bars) * self.betas", "variance = self.betas"),
        # loss
        ("classic: t off by one when handed to the network", "(noise - model(x_t, t))", "(noise - model(x_t, t + 1))"),
        ("the network sees the clear image", "(noise - model(x_t, t))", "(noise - model(x0, t))"),
        ("the image as the target", "(noise - model(x_t, t))", "(x0 - model(x_t, t))"),
        ("absolute error", "(noise - model(x_t, t)).square()", "(noise - model(x_t, t)).abs()"),
        ("sum over pixels", "(noise - model(x_t, t)).square().flatten(1).mean(dim=1)",
         "(noise - model(x_t, t)).square().flatten(1).sum(dim=1)"),
        ("mean over the batch as well", "(noise - model(x_t, t)).square().flatten(1).mean(dim=1)",
         "(noise - model(x_t, t)).square().mean().expand(len(x0))"),
        ("forgotten gradient: loss of detached predictions", "(noise - model(x_t, t))",
         "(noise - model(x_t, t).detach())"),
        ("sign of v", "x0, t) * noise - self._at(", "x0, t) * noise + self._at("),
        ("sign of the noise from v", "x_t, t) * v + self._at((", "x_t, t) * v - self._at(("),
        ("sign of x0 from v", "x_t, t) * x_t - self._at((", "x_t, t) * x_t + self._at(("),
        ("forgotten detach: the clip stops the gradient", "x0_hat + (x0_hat.clamp(-1, 1) - x0_hat).detach()",
         "x0_hat.clamp(-1, 1)"),
        ("forgotten clip of v's x0_hat", "x0_hat = x0_hat + (x0_hat.clamp(-1, 1) - x0_hat).detach()", "pass"),
        ("v's x0_hat clipped to [0, 1]", "(x0_hat.clamp(-1, 1) - x0_hat).detach()",
         "(x0_hat.clamp(0, 1) - x0_hat).detach()"),
        ("v's noise is that of before the clip", "return self.predict_noise(x_t, t, x0_hat)",
         "return self.noise_from_v(x_t, t, v)"),
        # samplers
        ("two samplers' spacings swapped", '"ddim": "trailing", "dpm++": "logsnr"',
         '"ddim": "logsnr", "dpm++": "trailing"'),
        ("0 steps are all steps", "self.T if steps is None else steps", "steps or self.T"),
        ("steps ignored", "self.T if steps is None else steps", "self.T"),
        ("unknown variance allowed", 'if variance not in ("posterior", "beta"):', "if variance is None:"),
        ("a timestep given twice allowed", "sorted(set(timesteps), reverse=True)", "sorted(timesteps, reverse=True)"),
        ("t = T allowed", "timesteps[0] >= self.T or", "timesteps[0] > self.T or"),
        ("t = -1 allowed", "timesteps[-1] < 0:", "timesteps[-1] < -1:"),
        ("sampling keeps the graph", "    @torch.no_grad()\n    def _reverse_process", "    def _reverse_process"),
        ("classic: sampling stops at t = 1", "timesteps[1:] + [None])", "timesteps[1:])"),
        ("classic: t off by one when handed to the network, in sampling", "torch.full((len(x),), t, dtype",
         "torch.full((len(x),), t + 1, dtype"),
        ("t left on the CPU", "t, dtype=torch.long, device=x.device)", "t, dtype=torch.long)"),
        ("variance for standard deviation in x0_hat", "(x - math.sqrt(1 - a_t) * noise) / math.sqrt(a_t)",
         "(x - (1 - a_t) * noise) / math.sqrt(a_t)"),
        ("x0_hat not divided by sqrt(alpha_bar)", "(x - math.sqrt(1 - a_t) * noise) / math.sqrt(a_t)",
         "(x - math.sqrt(1 - a_t) * noise)"),
        ("x0_hat clipped to [0, 1]", "                x0_hat = x0_hat.clamp(-1, 1)",
         "                x0_hat = x0_hat.clamp(0, 1)"),
        ("forgotten clip", "                x0_hat = x0_hat.clamp(-1, 1)", "                pass"),
        ("clip cannot be switched off", "            if clip:\n                x0_hat",
         "            if True:\n                x0_hat"),
        ("classic: noise added at the last step", "                x = x0_hat\n",
         "                x = x0_hat + math.sqrt(self.betas[0]) * noise_fn(x)\n"),
        ("one step's alpha between timesteps far apart", "alpha = a_t / a_s", "alpha = self.alphas[t].item()"),
        ("classic: 1/sqrt(alpha) dropped", "mean = (math.sqrt(a_s)", "mean = math.sqrt(alpha) * (math.sqrt(a_s)"),
        ("classic: coefficient (1-alpha)/sqrt(1-alpha_bar) of the noise wrong", "math.sqrt(a_s) * (1 - alpha) * x0_hat",
         "math.sqrt(a_s) * math.sqrt(1 - alpha) * x0_hat"),
        ("mean from alpha_bar_t for alpha_bar_s", "math.sqrt(alpha) * (1 - a_s) * x)",
         "math.sqrt(alpha) * (1 - a_t) * x)"),
        ("classic: beta in place of the posterior's variance, in sampling", 'if variance == "posterior" else 1)',
         "if False else 1)"),
        ("the two variances swapped", 'if variance == "posterior" else 1)', 'if variance == "beta" else 1)'),
        ("classic: variance where the standard deviation belongs, in sampling", "math.sqrt(sigma2) * noise_fn(x)",
         "sigma2 * noise_fn(x)"),
        ("noise_fn ignored", "math.sqrt(sigma2) * noise_fn(x)", "math.sqrt(sigma2) * torch.randn_like(x)"),
        ("classic: x0 clipped, but stale noise used", "noise = (x - math.sqrt(a_t) * x0_hat) / math.sqrt(1 - a_t)",
         "pass"),
        ("ddim: alpha_bar_t for alpha_bar_s", "math.sqrt(1 - a_s) * noise", "math.sqrt(1 - a_t) * noise"),
        ("dpm++: lambda without its 1/2", "(math.log(a_s / (1 - a_s)) - math.log(a_t / (1 - a_t))) / 2",
         "(math.log(a_s / (1 - a_s)) - math.log(a_t / (1 - a_t)))"),
        ("dpm++: r upside down", "h / (2 * h_before)", "h_before / (2 * h)"),
        ("dpm++: sign of the correction", "(x0_hat - x0_hat_before)", "(x0_hat_before - x0_hat)"),
        ("dpm++: first order only", "d = x0_hat if h_before is None else", "d = x0_hat if True else"),
        ("dpm++: h of the step before forgotten", "h_before, h = h, (", "h_before, h = None, ("),
        ("dpm++: sign of h", "math.expm1(-h)", "math.expm1(h)"),
        ("x0_hat handed out is the one before", "yield t, x, x0_hat",
         "yield t, x, x if x0_hat_before is None else x0_hat_before"),
        ("the timestep handed out is the next", "yield t, x, x0_hat", "yield s, x, x0_hat"),
        # bound
        ("the bound keeps the graph", "    @torch.no_grad()\n    def bound_term", "    def bound_term"),
        ("the bound leaves out t = 0", "for t in range(self.T)", "for t in range(1, self.T)"),
        ("the bound takes the mean of its terms", "prior + terms.sum(dim=1)", "prior + terms.mean(dim=1)"),
        ("the bound forgets the prior", '"total": prior + terms.sum(dim=1)', '"total": terms.sum(dim=1)'),
        ("the bound forgets the variance", "clip=clip, variance=variance) for t", "clip=clip) for t"),
        ("the bound forgets clip=False", "clip=clip, variance=variance) for t", "variance=variance) for t"),
        ("prior from the timestep before the last", "a = self.alpha_bars[-1:]", "a = self.alpha_bars[-2:][:1]"),
        ("prior: sign of alpha_bar", "self._at(-a - torch.log1p(-a)", "self._at(a - torch.log1p(-a)"),
        ("prior: not halved", "self._at(a, x0, first) * x0.square()) / 2", "self._at(a, x0, first) * x0.square())"),
        ("prior in float32", "self._at(-a - torch.log1p(-a), x0, first)",
         "(-self._at(a, x0, first) - torch.log(1 - self._at(a, x0, first)))"),
        ("prior in nats", "mean(dim=1) / math.log(2)\n\n    @torch.no_grad()", "mean(dim=1)\n\n    @torch.no_grad()"),
        ("terms in nats", "mean(dim=1) / math.log(2)\n\n    @staticmethod", "mean(dim=1)\n\n    @staticmethod"),
        ("clip forgotten in the bound", "x0_hat = x0_hat.clamp(-1, 1)\n        true_mean", "pass\n        true_mean"),
        ("decoder takes the variance of t = 2", "torch.cat([sigma2[1:2], sigma2[1:]])",
         "torch.cat([sigma2[min(2, self.T - 1):][:1], sigma2[1:]])"),
        ("the bound's posterior variance where T = 1", 'if variance == "posterior" and self.T > 1:',
         'if variance == "posterior":'),
        ("KL: sign of the logarithm", "(ratio - 1 - ratio.log()", "(ratio - 1 + ratio.log()"),
        ("KL the other way round", "ratio = (true_variance / sigma2)", "ratio = (sigma2 / true_variance)"),
        ("KL: means not squared", "(true_mean - mean).square() / sigma2", "(true_mean - mean).abs() / sigma2"),
        ("KL: not halved", "(true_mean - mean).square() / sigma2) / 2", "(true_mean - mean).square() / sigma2)"),
        ("decoder at t = 1 too", "return (t == 0).view", "return (t <= 1).view"),
        ("decoder: black does not reach to infinity", "torch.where(x0 < -1 + 1 / 255, -torch.inf,",
         "torch.where(x0 < -1 - 1 / 255, -torch.inf,"),
        ("decoder: white does not reach to infinity", "torch.where(x0 > 1 - 1 / 255, torch.inf,",
         "torch.where(x0 > 1 + 1 / 255, torch.inf,"),
        ("decoder: bins of half the width", "torch.inf, (x0 + 1 / 255 - mean) / sigma",
         "torch.inf, (x0 - mean) / sigma"),
        ("decoder: not mirrored into the lower tail",
         "low, high = torch.where(low + high > 0, -high, low), torch.where(low + high > 0, -low, high)", "pass"),
        ("decoder: density of a bin", "return log_high + torch.log1p(-torch.exp(log_low - log_high))",
         "return log_high"),
    ],

    "diffusion_model": [
        ("sizes that do not divide by 4 allowed", "image_size < 4 or image_size % 4",
         "image_size < 4 or image_size % 2"),
        ("numbers that make no network allowed", "width < 3 or depth < 1", "width < 3"),
        ("the network does not start at zero", "nn.init.zeros_(self.out.weight)", "pass"),
        ("blocks do not start as the identity", "for layer in self.conv2, self.scale_shift:",
         "for layer in (self.scale_shift,):"),
        ("images of another number of channels allowed",
         "if x_t.shape[1:] != (self.image_channels, self.image_size, self.image_size):",
         "if x_t.shape[2:] != (self.image_size, self.image_size):"),
        ("no label is the last class", "torch.full_like(t, self.classes)", "torch.full_like(t, self.classes - 1)"),
        ("labels ignored", "e = F.silu(self.time(time_features(t)) + self.label(labels))",
         "e = F.silu(self.time(time_features(t)))"),
        ("the timestep ignored", "e = F.silu(self.time(time_features(t)) + self.label(labels))",
         "e = F.silu(self.label(labels))"),
        ("one timestep for the batch", "self.time(time_features(t))", "self.time(time_features(t[:1]))"),
        ("skip connection taken before its block", "skip = x = self.down(x, e)", "skip, x = x, self.down(x, e)"),
        ("middle blocks not told time and label", "            x = block(x, e)",
         "            x = block(x, torch.zeros_like(e))"),
        ("skip connection first", "torch.cat([self.grow(x), skip], dim=1)", "torch.cat([skip, self.grow(x)], dim=1)"),
        ("forgotten norm before the last convolution", "self.out(F.silu(self.norm(x)))", "self.out(F.silu(x))"),
        ("time and label not scaling about 1", "self.norm2(h), 1 + scale)", "self.norm2(h), scale)"),
        ("forgotten residual", "return self.skip(x) + self.conv2", "return self.conv2"),
        ("batch norm, so that images depend on their batch", "nn.GroupNorm(1, channels, affine=False)",
         "nn.BatchNorm2d(channels, affine=False)"),
        ("highest frequency 1/1,000", "-math.log(10_000)", "-math.log(1_000)"),
        ("frequencies one too far apart", "device=t.device) / half)", "device=t.device) / (half - 1))"),
        ("sines and cosines swapped", "torch.cat([angles.sin(), angles.cos()], dim=1)",
         "torch.cat([angles.cos(), angles.sin()], dim=1)"),
        ("time features on the CPU", "torch.arange(half, device=t.device)", "torch.arange(half)"),
        ("classic: labels dropped per batch", "torch.rand(labels.shape, generator", "torch.rand((1,), generator"),
        ("labels kept with the probability of dropping", "< probability", ">= probability"),
        ("generator ignored", "torch.rand(labels.shape, generator=generator,", "torch.rand(labels.shape,"),
        ("dropped labels become class 0", "torch.where(dropped, classes, labels)", "torch.where(dropped, 0, labels)"),
        ("the draw left on the CPU", "generator=generator, device=labels.device)", "generator=generator)"),
        ("classic: guidance off by one", "            scale = guidance\n", "            scale = guidance + 1\n"),
        ("guidance off by one where it is wanted", "torch.where(where[t], guidance, 1.0)",
         "torch.where(where[t], guidance + 1, 1.0)"),
        ("guidance everywhere but where it is wanted", "torch.where(where[t], guidance, 1.0)",
         "torch.where(where[t], 1.0, guidance)"),
        ("the label ignored where no guidance is wanted", "torch.where(where[t], guidance, 1.0)",
         "torch.where(where[t], guidance, 0.0)"),
        ("two calls where no guidance is wanted", "not where[t].any()", "False"),
        ("no guidance where some of the images want none", "not where[t].any()", "not where[t].all()"),
        ("classic: is 1 or 0 none?", "if guidance == 0:\n            return model(x_t, t, None)",
         "if guidance == 0:\n            return model(x_t, t, labels)"),
        ("guidance turned round", "torch.lerp(model(x_t, t, None), with_label, scale)",
         "torch.lerp(with_label, model(x_t, t, None), scale)"),
        ("two calls without guidance", "if guidance == 1 or where", "if where"),
    ],

    "data": [
        ("classic: images left in [0, 1]", "images.to(torch.float32) / 127.5 - 1", "images.to(torch.float32) / 255"),
        ("256 levels by 128", "images.to(torch.float32) / 127.5 - 1", "images.to(torch.float32) / 128 - 1"),
        ("classic: images saved without undoing the scaling", "((x.float() + 1) * 127.5)", "(x.float() * 255)"),
        ("grey levels cut down instead of rounded", ".round().clamp(0, 255)", ".clamp(0, 255)"),
        ("grey levels wrap round", ".round().clamp(0, 255)", ".round()"),
        ("rounded in half precision", "((x.float() + 1) * 127.5)", "((x + 1) * 127.5)"),
        ("unknown data set asked of torchvision", "if name not in DATASETS:", "if not name:"),
        ("training digits for test digits", '"train" if train else "t10k"', '"train"'),
        ("header of the images read as pixels", "dtype=torch.uint8, offset=16)", "dtype=torch.uint8)[:-16]"),
        ("header of the labels one byte too short", "dtype=torch.uint8, offset=8)",
         "dtype=torch.uint8, offset=7)[:-1]"),
        ("classic: digits flipped", ".view(-1, 1, 28, 28)", ".view(-1, 1, 28, 28).flip(3)"),
        ("digits transposed", ".view(-1, 1, 28, 28)", ".view(-1, 1, 28, 28).mT"),
        ("labels of other images", "len(images) == len(labels)", "len(images) >= len(labels)"),
        ("labels above the last class allowed", "labels.max() < CLASSES.get(name, 10)",
         "labels.max() <= CLASSES.get(name, 10)"),
        ("all data sets' labels checked as if digits", "CLASSES.get(name, 10)", "10"),
        ("another split of EMNIST", '"split": "balanced"', '"split": "digits"'),
        ("test images of the others never read", "(root, train=train, download=True",
         "(root, train=True, download=True"),
        ("QMNIST's writers as labels", "labels = labels[:, 0]", "labels = labels[:, 1]"),
        ("classic: digits flipped, in EMNIST", "images = images.transpose(1, 2)",
         "images = images.transpose(1, 2).flip(2)"),
        ("EMNIST lying on its side", "images = images.transpose(1, 2)", "pass"),
        ("a root that cannot be written ends it", "    except OSError:\n        with tempfile",
         "    except PermissionError:\n        with tempfile"),
        ("forgotten check of unpacked files", "and _is_intact(path.read_bytes(), name):", "and path.stat().st_size:"),
        ("forgotten check of shipped files", "        if not _is_intact(content, name):", "        if not content:"),
        ("intact files written again", "            continue\n", "            pass\n"),
        ("a cut archive is a traceback", "except lzma.LZMAError:", "except EOFError:"),
        ("MNIST unpacked in place, not atomically",
         "        with atomic_write(path) as file:\n            file.write(content)",
         "        path.parent.mkdir(parents=True, exist_ok=True)\n        path.write_bytes(content)"),
        ("grid one column short", "columns or math.ceil(math.sqrt(n))", "columns or math.floor(math.sqrt(n))"),
        ("grid's last row dropped", "rows = math.ceil(n / columns)", "rows = max(1, n // columns)"),
        ("columns ignored", "columns = columns or math", "columns = math"),
        ("grid filled column by column",
         "padding + i // columns * (h + padding), padding + i % columns * (w + padding)",
         "padding + i % rows * (h + padding), padding + i // rows * (w + padding)"),
        ("black lines between images", "48, dtype=np.uint8", "0, dtype=np.uint8"),
        ("colour pictures transposed", "canvas.transpose(1, 2, 0)", "canvas.transpose(2, 1, 0)"),
        ("enlarged by tiles", "picture.repeat(factor, axis=0).repeat(factor, axis=1)",
         "np.tile(picture, (factor, factor))"),
        ("GIF durations in seconds", "frame_ms=60, rest_ms=2000", "frame_ms=0.06, rest_ms=2.0"),
        ("no rest on the last frame", "[frame_ms] * (len(frames) - 1) + [rest_ms]", "[frame_ms] * len(frames)"),
        ("GIF of one frame without its rest", "if len(frames) > 1 else rest_ms", "if len(frames) > 1 else frame_ms"),
        ("GIF does not loop", "loop=0", "loop=1"),
        ("GIF optimised", "optimize=False)", "optimize=True)", "Pillow 13.0's optimiser writes all pixels right"),
    ],

    "checkpoint": [
        # Not weakened here: check_target's refusal of devices, see above.
        ("a pipe is replaced by a file", "if path.exists() and not path.is_file():",
         "if path.is_dir() or path.is_char_device() or path.is_block_device():"),
        ("missing folders not made", "path.parent.mkdir(parents=True, exist_ok=True)", "pass"),
        ("a link replaced by a file", "    check_target(path)\n    path = Path(path).resolve()",
         "    check_target(path)\n    path = Path(path)"),
        ("forgotten fsync", "            os.fsync(file.fileno())\n", ""),
        ("fsync before the last bytes have left Python", "            file.flush()\n", ""),
        ("copied instead of renamed", "os.replace(temporary, path)", "path.write_bytes(temporary.read_bytes())"),
        ("forgotten rename: written in place", ('open(temporary, "wb")', "        os.replace(temporary, path)\n"),
         ('open(path, "wb")', "")),
        ("renamed before it is on the disk", "            file.flush()\n",
         "            os.replace(temporary, path)\n            file.flush()\n            os.link(path, temporary)\n"),
        ("renamed although the writer failed", "    finally:\n        temporary.unlink",
         "    finally:\n        temporary.exists() and os.replace(temporary, path)\n        temporary.unlink"),
        ("temporary file on another file system", "return path.parent / f",
         "return Path(os.environ['TMPDIR']) / f"),
        ("temporary file left after a failure", "    finally:\n        temporary.unlink(missing_ok=True)",
         "    finally:\n        pass"),
        ("leftovers of the dead kept", "            stale.unlink(missing_ok=True)", "            pass"),
        ("leftovers of the living removed", "if not _is_running(stale", "if _is_running(stale"),
        ("leftovers of other files removed", "remove_leftovers(path.parent, glob.escape(path.name))",
         'remove_leftovers(path.parent, "*")'),
        ("the wrong part of its name taken for the process", 'split(".")[-2]', 'split(".")[1]'),
        ("a leftover with a huge number is a traceback", "except (ProcessLookupError, OverflowError):",
         "except ProcessLookupError:"),
        ("a lock that several can have", "fcntl.LOCK_EX |", "fcntl.LOCK_SH |"),
        ("lock forgotten before the end",
         '                    f"another run is writing to {folder}; wait for it, or choose another --out") from '
         "None\n        yield",
         '                    f"another run is writing to {folder}; wait for it, or choose another --out") from '
         "None\n    yield"),
        ("checkpoint written in place, not atomically",
         '    with atomic_write(path) as file:\n        torch.save({"format"',
         '    with open(path, "wb") as file:\n        torch.save({"format"'),
        ("format version not saved", '"version": VERSION, **state', "**state"),
        ("a folder taken for a checkpoint",
         '    if not path.is_file():\n        raise ValueError(f"{path} is not a file; --checkpoint',
         '    if path.is_fifo():\n        raise ValueError(f"{path} is not a file; --checkpoint'),
        ("zip bombs: what the archive claims not added up", "claimed > path.stat().st_size or any(", "any("),
        ("zip bombs: compressed entries allowed", " or any(entry.compress_type for entry in archive.infolist())", ""),
        ("checksums not compared", "content = archive.read(entry)",
         "entry.CRC = None; content = archive.open(entry).read()"),
        ("names in the pickle not checked", "                _check_pickle(content)\n", "                pass\n"),
        ("what precedes the archive not looked at", "    if min(entry.header_offset for entry in archive.infolist()):",
         "    if False:"),
        ("torch reads the file, and not what was checked", "torch.load(_checked_copy(archive),",
         "torch.load(_checked_copy(archive) and path,"),
        ("one value in many places", 'raise pickle.UnpicklingError("it has one value', '("it has one value'),
        ("any value in many places, once it has a number", 'simple[value] = before in ("GLOBAL", "BINUNICODE")',
         "simple[value] = True"),
        ("whether a file can be written not tried", "    _temporary(path).touch()\n    _temporary(path).unlink()\n",
         ""),
        ("file names taken for patterns", "glob.escape(path.name))", "path.name)"),
        ("images of two channels believed", '"image_channels": (1, 3)', '"image_channels": (1, 2, 3)'),
        ("names checked in .pkl but not in .PKL", 'entry.filename.lower().endswith(".pkl")',
         'entry.filename.endswith(".pkl")'),
        ("a name too many believed", 'NAMES = {"collections OrderedDict",',
         'NAMES = {"collections OrderedDict", "__builtin__ bytearray",'),
        ("pickles executed", "weights_only=True", "weights_only=False"),
        ("any torch file is a checkpoint", 'or state.get("format") != "ddpm-mnist":', "or not state:"),
        ("any version is read", "if type(version) is not int or version != VERSION:", "if type(version) is not int:"),
        ("a version that is a tensor compared", "if type(version) is not int or version != VERSION:",
         "if version != VERSION:"),
        ("image sizes without end believed", '"image_size": range(4, 513)', '"image_size": range(4, 10**12)'),
        ("0 timesteps believed", '"timesteps": range(1, 100_001)', '"timesteps": range(100_001)'),
        ("depth of the network forgotten", 'names = ("image_size", "image_channels", "classes", "width", "depth")',
         'names = ("image_size", "image_channels", "classes", "width")'),
        ("bf16 forgotten", 'enabled=self.precision == "bf16")', "enabled=False)"),
        ("bf16 always", 'enabled=self.precision == "bf16")', "enabled=True)"),
        ("the denoiser forgets the label", "v = self.network(x_t, t, labels).float()",
         "v = self.network(x_t, t).float()"),
        ("bf16 all the way", "v = self.network(x_t, t, labels).float()", "v = self.network(x_t, t, labels)",
         "the first multiplication, by a coefficient in fp32, makes it fp32 as well"),
        ("v taken for the noise", "return self.ddpm.clipped_noise_from_v(x_t, t, v)", "return v"),
        ("forgotten clip of the network's x0_hat", "return self.ddpm.clipped_noise_from_v(x_t, t, v)",
         "return self.ddpm.noise_from_v(x_t, t, v)"),
        ("classic: sampling with the raw weights", 'weights = state.get("ema" if ema else "model")',
         'weights = state.get("model", state.get("ema"))'),
        ("classic: sampling in train mode", "weights, device).eval()", "weights, device)"),
        ("the schedule of the file ignored", 'make_betas(settings["schedule"], settings["timesteps"])',
         'make_betas("linear", settings["timesteps"])'),
        ("the precision asked for ignored", "settings, precision, steps)\n", "settings, steps=steps)\n"),
        ("steps forgotten on load", "settings, precision, steps)\n", "settings, precision)\n"),
        ("steps of any kind believed", "if steps is not None and (type(steps) is not int or steps < 0):", "if False:"),
        ("negative steps believed", "(type(steps) is not int or steps < 0)", "(type(steps) is not int)"),
        ("steps forgotten in the export", ', "ema": weights, "step": model.steps}', ', "ema": weights}'),
        ("export in full precision", "value.half()", "value"),
        ("raw weights exported", "model = load_model(source)\n", "model = load_model(source, ema=False)\n"),
        ("forgotten check of the settings", "    check_settings(path, settings)\n    weights", "    weights"),
        ("True is a whole number", "if type(value) is not type(known[0]) or",
         "if not isinstance(value, type(known[0])) or"),
        ("the limits themselves refused", "value not in known:", "value not in known[1:-1]:"),
        ("class shares of another number of classes", 'len(shares) != settings["classes"] or', "not"),
        ("negative shares", "0 <= share <= 1 for", "share <= 1 for"),
        ("shares above 1", "0 <= share <= 1 for", "0 <= share for"),
        ("memory for whatever network the file claims", 'with torch.device("meta"):', 'with torch.device("cpu"):'),
        ("weights too many allowed", "weights.keys() != expected.keys()", "not weights.keys() >= expected.keys()"),
        ("a network larger than the file", "or least > os.path.getsize(path)", ""),
        ("a size that no network has is not told with its file", 'raise ValueError(f"{path}: {error}") from None',
         "raise"),
        ("shapes not compared", "or value.shape != shape:", "or not value.shape and shape:"),
        ("weights of any type", "if value.dtype not in FLOATS:", "if False:"),
        ("weights in half precision loaded as such", "value.detach().float().clone()", "value.detach().clone()"),
        ("weights that share their memory", "value.detach().float().clone()", "value.detach().float()"),
        ("infinite weights allowed", "if not torch.isfinite(value).all():", "if torch.isnan(value).any():"),
        ("NaN allowed", "if not torch.isfinite(value).all():", "if torch.isinf(value).any():"),
    ],

    "cli": [
        ("usage errors with exit code 1", "self.exit(2, f", "self.exit(1, f"),
        ("a flag with a newline makes two lines", "{' '.join(message.split())} (see", "{message} (see"),
        ("flags may be cut short", "allow_abbrev=False", "allow_abbrev=True"),
        ("--help shows (default: None)", "if action.default is None or action.nargs == 0 else", "if False else"),
        ("lower bound of whole numbers excluded", "value is None or not low <= value <= high",
         "value is None or not low < value <= high"),
        ("upper bound of whole numbers forgotten", "value is None or not low <= value <= high",
         "value is None or not low <= value"),
        ("1.5 is a whole number", "            value = int(text)", "            value = int(float(text))"),
        ("NaN is a number", "if not low <= value <= high:  # nan fails too", "if value < low or value > high:"),
        ("empty paths allowed", "    if not text:", "    if text is None:"),
        ("a GPU that is not there not noticed", "elif not available[name]():", "elif not available:"),
        ("freed memory goes back at once", "libc.mallopt(-1, (1 << 31) - 1)", "libc.mallopt(-1, 1 << 17)"),
        ("large buffers come from the system", "libc.mallopt(-3, 1 << 30)", "libc.mallopt(-3, 1 << 17)"),
        ("memory is not given back before the end", "atexit.register(libc.malloc_trim, 0)", "pass"),
        ("auto takes the CPU", "name = next(kind for kind in available if available[kind]())", 'name = "cpu"'),
        ("auto takes MPS before CUDA",
         'available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available,',
         'available = {"mps": torch.backends.mps.is_available, "cuda": torch.cuda.is_available,'),
        ("bf16 believed of every CPU", 'return bool(able.get("avx512_bf16") or able.get("amx_bf16"))', "return True"),
        ("bf16 believed of no CPU", 'return bool(able.get("avx512_bf16") or able.get("amx_bf16"))', "return False"),
        ("bf16 believed of every GPU",
         'return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)', "return True"),
        ("another sampler by default in the commands", 'choices=SAMPLERS, default="dpm++"',
         'choices=SAMPLERS, default="ddim"'),
        ("--no-clip turned round", 'dest="clip", action="store_false"', 'dest="clip", action="store_true"'),
        ("classic: sampling with the raw weights, by the flag", 'dest="ema", action="store_false"',
         'dest="ema", action="store_true"'),
        ("a digit, and guidance that ignores it", "if digit is not None and guidance == 0:", "if False:"),
        ("closed stdout", "    if sys.stdout is None:", "    if False:"),
        ("ddpm in few steps by default", 'steps = T if sampler == "ddpm" else min(', "steps = min("),
        ("ddim in as few steps as dpm++", '20 if sampler == "ddim" else 10', "10"),
        ("10 steps of a model that has fewer", 'min(20 if sampler == "ddim" else 10, T)',
         '20 if sampler == "ddim" else 10'),
        ("default guidance off by one", "GUIDANCE, BRIEF_GUIDANCE = 1.3, {", "GUIDANCE, BRIEF_GUIDANCE = 0.3, {"),
        ("guidance by default without classes", "    if not knows_both(model.settings):\n        return 1.0\n", ""),
        ("models trained briefly guided as others", "if model.steps * batch_size < images:", "if False:"),
        ("steps counted for images", "if model.steps * batch_size < images:", "if model.steps < images:"),
        ("models of unknown training guided as those of little", "type(model.steps) is int and ",
         "model.steps is None or "),
        ("any batch size believed", "type(batch_size) is int:", "batch_size:"),
        ("long training begins a step later", "if model.steps * batch_size < images:",
         "if model.steps * batch_size <= images:"),
        ("the most briefly trained models guided as the others", "{32_000: 2.5, 192_000: 1.75,", "{192_000: 1.75,"),
        ("labels that were never trained", 'return 0 if settings.get("label_dropout") == 1 else settings["classes"]',
         'return settings["classes"]'),
        ("guidance of a model that never went without labels",
         'return known_classes(settings) > 0 and settings.get("label_dropout") != 0',
         "return known_classes(settings) > 0"),
        ("guidance that was not trained for allowed", "if guidance != 1 and not knows_both(settings):", "if False:"),
        ("steps == T refused", "    if steps > T:", "    if steps >= T:"),
        ("the digit after the last allowed", "digit >= classes:", "digit > classes:"),
        ("a model without labels said to have been trained with",
         '"with labels only" if classes else', '"with labels only" if not classes else'),
        ("classic: last partial batch dropped", "for start in range(0, n, batch_size):",
         "for start in range(0, max(1, n - batch_size + 1), batch_size):"),
        ("classic: last partial batch filled up", "range(start, min(start + batch_size, n))",
         "range(start, start + batch_size)"),
        ("every batch has the same noise", "noise_fn = ImageNoise(seed, indices)",
         "noise_fn = ImageNoise(seed, range(len(indices)))"),
        ("seed ignored", "noise_fn = ImageNoise(seed, indices)", "noise_fn = ImageNoise(0, indices)"),
        ("the first step adds the noise that it started from", "x_T = noise_fn(", "x_T = ImageNoise(seed, indices)("),
        ("labels by place in the batch", 'label(i, settings["class_shares"])',
         'label(i - start, settings["class_shares"])'),
        ("all classes alike", 'label(i, settings["class_shares"])', 'i % settings["classes"]'),
        ("the digit asked for ignored", "if digit is None else digit for i in indices", "for i in indices"),
        ("labels left on the CPU", "labels.to(device), guidance, where)", "labels, guidance, where)"),
        ("guidance forgotten", "labels.to(device), guidance, where)", "labels.to(device))"),
        ("the interval forgotten", "labels.to(device), guidance, where)", "labels.to(device), guidance)"),
        ("the interval left on the CPU", "torch.tensor(where, device=device)", "torch.tensor(where)"),
        ("the interval in alpha_bar", "math.sqrt((1 - alpha_bar) / alpha_bar)", "alpha_bar"),
        ("the interval in squared noise levels", "math.sqrt((1 - alpha_bar) / alpha_bar)",
         "(1 - alpha_bar) / alpha_bar"),
        ("the interval without its lower end", "[low <= sigma(", "[low < sigma("),
        ("the interval without its upper end", "sigma(alpha_bar) <= high for", "sigma(alpha_bar) < high for"),
        ("an interval without a step", "        if guidance_interval:\n            raise",
         "        if False:\n            raise"),
        ("guidance lost between the steps", "        low, high = EVERYWHERE\n", ""),
        ("an interval that is of no use refused", "    if guidance not in (0, 1) and not any(", "    if not any("),
        ("the interval by default is everything", "guidance_interval or GUIDANCE_INTERVAL",
         "guidance_interval or EVERYWHERE"),
        ("the interval asked for ignored", "guidance_interval or GUIDANCE_INTERVAL", "GUIDANCE_INTERVAL"),
        ("another interval by default", "GUIDANCE_INTERVAL = 1.3, 35.0", "GUIDANCE_INTERVAL = 1.2, 35.0"),
        ("ends of the interval of any kind", "type=number(*EVERYWHERE), nargs=2", "type=float, nargs=2"),
        ("noise drawn on the CPU only", "torch.empty(len(indices), *shape, device=device)",
         "torch.empty(len(indices), *shape)"),
        ("noise_fn forgotten", "steps=steps, noise_fn=noise_fn, clip=clip)", "steps=steps, clip=clip)"),
        ("clip forgotten", "steps=steps, noise_fn=noise_fn, clip=clip)", "steps=steps, noise_fn=noise_fn)"),
        ("sampler forgotten", "sampler=sampler, steps=steps, noise_fn", 'sampler="dpm++", steps=steps, noise_fn'),
        ("height and width of another size", 'settings["image_size"], settings["image_size"]\n\n    def',
         "28, 28\n\n    def"),
        ("labels in order", "u = i * (math.sqrt(5) - 1) / 2 % 1", "u = i * 0.5 % 1"),
        ("class shares taken to add up to 1", " % 1 * sum(shares)", " % 1"),
        ("a class without images drawn", "if u < end)", "if u <= end)"),
        ("a name that cannot be printed ends it", 'sys.stdout.reconfigure(errors="backslashreplace")', "pass"),
        ("Ctrl-C with exit code 1", '_fail("interrupted", 128 + signal.SIGINT)', '_fail("interrupted", 1)'),
        ("a reader that left is noticed too late", "        main()\n        sys.stdout.flush()\n", "        main()\n"),
        ("a reader that left makes Python complain",
         "        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())\n", ""),
        ("TRACEBACK ignored", 'if os.environ.get("TRACEBACK"):', 'if os.environ.get("DEBUG"):'),
        ("the file that failed is not named", 'where = f"{error.filename}: " if error.filename else ""', 'where = ""'),
        ("torch's own words for it not known", '"not enough memory", "allocate memory"', '"not enough memory"'),
        ("numpy's out of memory not explained", "if isinstance(error, MemoryError) or any(", "if any("),
        ("out of memory not explained", "if isinstance(error, MemoryError) or any(", "if False and any("),
        ("messages of several lines", '_fail(" ".join(text.split()),', "_fail(text,"),
        ("bad usage with exit code 1", "2 if isinstance(error, UsageError) else 1)", "1)"),
        ("failures on stdout", "file=sys.stderr)", "file=sys.stdout)"),
        ("failures with exit code 0", "    sys.exit(code)", "    sys.exit(0)"),
    ],

    "train": [
        # settings
        ("other epochs by default than the shipped model's", '"epochs": (45,', '"epochs": (4,'),
        ("learning rate ten times too small by default", '"lr": (5e-3,', '"lr": (5e-4,'),
        ("EMA of another length by default", '"ema": (0.999,', '"ema": (0.99,'),
        ("labels never dropped by default", '"label_dropout": (0.1,', '"label_dropout": (0.0,'),
        ("other timesteps by default", '"timesteps": (1000,', '"timesteps": (100,'),
        ("EMA of 1 allowed", "number(0, 0.999999)", "number(0, 1)"),
        ("the learning rate may change on resume", 'MAY_CHANGE = {"epochs", "minutes", "report_every"}',
         'MAY_CHANGE = {"epochs", "minutes", "report_every", "lr"}'),
        ("the length may not change on resume", 'MAY_CHANGE = {"epochs", "minutes", "report_every"}',
         'MAY_CHANGE = {"report_every"}'),
        ("--minutes and --epochs together", '("epochs" in given or flags.max_steps)', "flags.max_steps"),
        ("--minutes and --max-steps together", '("epochs" in given or flags.max_steps)', '"epochs" in given'),
        ("--resume and --overwrite together", "if flags.resume and flags.overwrite:", "if False:"),
        ("settings given on resume not compared", "if value != settings[name] and name not in MAY_CHANGE:",
         "if False:"),
        ("settings of a checkpoint not checked", "if not valid or name not in settings:", "if name not in settings:"),
        ("a run of minutes cannot go on by epochs", '        settings["minutes"] = None\n', "        pass\n"),
        ("models trained that cannot be loaded", '    check_settings(settings["dataset"], settings)', "    pass"),
        ("progress of a checkpoint not checked", "        check_progress(checkpoint, state)\n", ""),
        ("negative steps believed", "not 0 <= step <= 10**12 or", "step > 10**12 or",
         "the steps since the last report would be negative too, which is refused below"),
        ("sums of a checkpoint not checked", "or not all(map(count, sums))", ""),
        ("moments of another network believed", "moments.keys() != set(range(len(weights) if step else 0))",
         "not moments"),
        ("squares below 0 believed",
         'if any((restored[i][name] < 0).any() for name in ("step", "exp_avg_sq") if name in shapes):', "if False:"),
        ("an optimizer that is not there believed", " or len(saved) != len(optimizers):", ":"),
        ("moments of another optimizer believed", "moments[i].keys() != shapes.keys():",
         "not moments[i].keys() & shapes.keys():"),
        # main
        ("a run overwritten unasked", "if checkpoint.exists() and not flags.resume and not flags.overwrite:",
         "if False:"),
        ("--overwrite ignored", "and not flags.resume and not flags.overwrite:", "and not flags.resume:"),
        ("half-written grids of a killed run stay", '        remove_leftovers(out / "samples", "step_*.png")\n', ""),
        ("what others keep beside the grids goes too", 'remove_leftovers(out / "samples", "step_*.png")',
         'remove_leftovers(out / "samples", "*")'),
        ("reports are not part of the budget",
         "                seconds = time.monotonic() - start  # the report's are part of the budget too\n", ""),
        ("a network that never had labels is judged with them", "        if not known_classes(settings):\n",
         "        if False:\n"),
        ("forgotten lock", "with lock_folder(out):",
         "with contextlib.nullcontext(out.mkdir(parents=True, exist_ok=True)):"),
        ("default folder not that of the data set", 'Path("runs") / settings["dataset"].lower()',
         'Path("runs") / "run"'),
        # batches
        ("classic: last partial batch dropped", "epoch, index = position // len(images), position % len(images)",
         "whole = max(1, len(images) // batch_size) * batch_size; epoch, index = position // whole, position % "
         "whole % len(images)"),
        ("classic: last partial batch repeats the epoch it began in",
         "epoch, index = position // len(images), position % len(images)",
         "epoch, index = position // len(images), position % len(images); epoch = epoch[:1].expand(batch_size)"),
        ("classic: data order restarted each epoch", "shuffled(seed, e, len(images))",
         "shuffled(seed, 0, len(images))"),
        ("images not shuffled",
         "return torch.randperm(n, generator=torch.Generator().manual_seed(stream_seed(seed, epoch, 0)))",
         "return torch.arange(n)"),
        ("an epoch's order and a step's noise from one stream", "stream_seed(seed, step, 1)",
         "stream_seed(seed, step, 0)"),
        ("the same noise at each step", "stream_seed(seed, step, 1)", "stream_seed(seed, 1)"),
        ("the same noise for each seed", "stream_seed(seed, step, 1)", "stream_seed(step, 1)"),
        ("classic: digits flipped, in training", "x0 = to_float(images[chosen])",
         "x0 = to_float(images[chosen]).flip(3)"),
        ("classic: images left in [0, 1], in training", "x0 = to_float(images[chosen])",
         "x0 = images[chosen].float() / 255"),
        ("labels of other images", "drop_labels(labels[chosen],", "drop_labels(labels[index],"),
        ("labels never dropped", 'settings["label_dropout"], settings["classes"], generator)',
         '0.0, settings["classes"], generator)'),
        ("labels dropped by the global generator", 'settings["classes"], generator)', 'settings["classes"])'),
        ("classic: t sampled from 1", 'right=True).clamp(max=settings["timesteps"] - 1)',
         'right=True).clamp(min=1, max=settings["timesteps"] - 1)'),
        ("classic: t sampled to T-1 exclusive", 'right=True).clamp(max=settings["timesteps"] - 1)',
         'right=True).clamp(max=settings["timesteps"] - 2)'),
        ("t = T where the draw rounds up", 'right=True).clamp(max=settings["timesteps"] - 1)', "right=True)"),
        ("one timestep for the batch", "sums.float().to(device), u, right=True",
         "sums.float().to(device), u[:1].repeat(batch_size), right=True"),
        ("timesteps drawn by the shares and not their sums", 'settings["weighting"]).cumsum(0)',
         'settings["weighting"]).flip(0)'),
        ("the timestep after the one drawn", "sums.float().to(device), u, right=True)",
         "sums.float().to(device), u, right=True).add(1)"),
        ("all timesteps drawn alike", "** WEIGHTINGS[weighting][0]", "** 0"),
        ("shares that do not sum to 1", "return shares / shares.sum()", "return shares"),
        ("noisy timesteps drawn more often", '"v": (0.25, -1)', '"v": (-0.25, -1)'),
        ("clear timesteps drawn more often", '"v": (0.25, -1)', '"v": (0.5, -1)'),
        ("rare timesteps count no more in the loss that is reported", "rarity = 1 / (ddpm.T * shares)",
         "rarity = torch.ones(ddpm.T)"),
        ("the loss reported is not that of the steps", "(rarity[t] * losses.detach()).mean()",
         "losses.detach().mean()"),
        ("reports are guided as after a long run", "        average_model.steps = step\n", ""),
        ("timesteps without a random part", "device=device) + within) / batch_size",
         "device=device) + 0.5) / batch_size"),
        ("noise uniform", "noise = torch.randn(x0.shape, generator=generator, device=device)",
         "noise = torch.rand(x0.shape, generator=generator, device=device)"),
        ("noise by the global generator, so that a resume repeats it",
         "noise = torch.randn(x0.shape, generator=generator, device=device)",
         "noise = torch.randn(x0.shape, device=device)"),
        ("noise drawn on the CPU only", "noise = torch.randn(x0.shape, generator=generator, device=device)",
         "noise = torch.randn(x0.shape, generator=generator)"),
        # validation and reports
        ("learning rate falls by a quarter of a cosine", "(1 + math.cos(math.pi * progress)) / 2",
         "math.cos(math.pi / 2 * progress)"),
        ("validation on training images", 'load_dataset(settings["dataset"], root, train=False)',
         'load_dataset(settings["dataset"], root)'),
        ("validation leaves out the last timesteps", '* settings["timesteps"] // n',
         '* (settings["timesteps"] // 2) // n'),
        ("validation at other timesteps each time", "device=device) * settings",
         "device=device)[torch.randperm(n)] * settings"),
        ("validation keeps the graph", "    @torch.no_grad()\n    def losses", "    def losses"),
        ("validation noise new each time", "generator = torch.Generator().manual_seed(0)\n        losses",
         "generator = None\n        losses"),
        ("validation without labels", "model.denoiser(x_t, t, y), to_float(x)", "model.denoiser(x_t, t), to_float(x)"),
        ("validation of images in [0, 1]", "y), to_float(x), t", "y), x / 255, t"),
        ("metrics.csv has the last report only", "writer.writerows(history)", "writer.writerow(history[-1])"),
        ("metrics.csv without names", "    writer.writeheader()\n", ""),
        ("metrics.csv written in place, not atomically", 'with atomic_write(out / "metrics.csv") as file',
         'with open(out / "metrics.csv", "wb") as file'),
        ("classic: sample grid saved without undoing the scaling", "make_grid(to_uint8(x)), 2)",
         "make_grid((x * 255).to(torch.uint8)), 2)"),
        ("64 times the same digit in the reports", "generate(model, 64, batch_size=64)",
         "generate(model, 64, batch_size=64, digit=0)"),
        ("training loss plotted as validation loss", 'left.plot(steps, [row["validation_loss"]',
         'left.plot(steps, [row["train_loss"]'),
        ("quarters of the validation loss off by one", 'row[f"validation_loss_q{i}"]',
         'row[f"validation_loss_q{max(1, i - 1)}"]'),
        # signals
        ("a second Ctrl-C waits for the step", "        self.signal = number\n        self.__exit__()",
         "        self.signal = number"),
        ("SIGTERM ends a step half done", "for number in (signal.SIGINT, signal.SIGTERM)}",
         "for number in (signal.SIGINT,)}"),
        ("signal handlers never restored", "            signal.signal(which, handler)\n", "            pass\n"),
        # set-up
        ("class shares all alike", '"class_shares": shares.tolist()',
         '"class_shares": [1 / len(shares)] * len(shares)'),
        ("class shares as counts", "torch.bincount(labels.cpu()) / len(labels)", "torch.bincount(labels.cpu()) * 1.0"),
        ("a checkpoint for sampling resumed", "        if missing:", "        if False:"),
        ("EMA restarted from the raw weights on resume", 'for name in ("model", "ema"))',
         'for name in ("model", "model"))'),
        ("weights not from the seed", '        torch.manual_seed(settings["seed"])\n', ""),
        ("EMA and network are one", "average = copy.deepcopy(network)", "average = network"),
        ("AdamW's second beta", "betas=(0.9, 0.99)", "betas=(0.9, 0.999)"),
        ("AdamW's first beta", "betas=(0.9, 0.99)", "betas=(0.99, 0.99)"),
        ("weight decay forgotten", '"weight_decay": settings["weight_decay"]}', '"weight_decay": 0.0}'),
        ("Muon for the layers at the ends too",
         '                and not name.startswith(("stem.", "out.", "time.", "label."))}', "                }"),
        ("another learning rate for --optimizer adamw", 'settings["lr"] = LR_ADAMW', "pass"),
        ("few minutes train a large network", 'given.get("minutes", math.inf) <= FEW_MINUTES', "False"),
        ("any minutes train a small network", 'given.get("minutes", math.inf) <= FEW_MINUTES', '"minutes" in given'),
        ("a GPU trains a small network", 'device.type == "cpu" and given.get("minutes"', 'given.get("minutes"'),
        ("few minutes overrule --width", "        settings |= SMALL\n    settings |= given\n",
         "        given |= SMALL\n    settings |= given\n"),
        ("--optimizer adamw ignored", 'if settings["optimizer"] == "muon" and p.ndim > 1', "if p.ndim > 1"),
        ("what Muon should train is not trained", "        optimizers.append(Muon(", "        (Muon("),
        ("Muon's learning rate does not follow",
         '        for optimizer in optimizers:\n            optimizer.param_groups[0]["lr"]',
         '        for optimizer in optimizers[:1]:\n            optimizer.param_groups[0]["lr"]'),
        ("Muon takes no steps", "            for optimizer in optimizers:\n                optimizer.step()",
         "            for optimizer in optimizers[:1]:\n                optimizer.step()"),
        ("Muon's momentum not saved", "[optimizer.state_dict() for optimizer in optimizers]",
         "[optimizer.state_dict() for optimizer in optimizers[:1]]"),
        ("another schedule than the settings'", 'ddpm = DDPM(make_betas(settings["schedule"], settings["timesteps"]))',
         'ddpm = DDPM(make_betas("linear", settings["timesteps"]))'),
        ("precision of the settings ignored", 'Model(network, ddpm, settings, settings["precision"])',
         "Model(network, ddpm, settings)"),
        ("weighting by 1/alpha_bar", '"balanced": (0, -0.5)', '"balanced": (0, -1)'),
        ("weightings swapped", '"balanced": (0, -0.5), "simple": (0, 0)', '"balanced": (0, 0), "simple": (0, -0.5)'),
        ("v weighted halfway", '"v": (0.25, -1)', '"v": (0.25, -0.5)'),
        ("the optimiser starts anew on resume",
         '        restore_optimizers(checkpoint, optimizers, state["optimizer"], state["step"])\n', ""),
        ("classic: learning rate and data order restarted on resume",
         'step, seconds, history, recent = (state[name] for name in ("step", "seconds", "history", "recent"))\n'
         "    sums", 'seconds, history, recent = (state[name] for name in ("seconds", "history", "recent"))\n    sums'),
        ("sums since the last report forgotten on resume", 'sums = torch.tensor(recent["sums"]',
         "sums = torch.tensor([0.0, 0.0]"),
        ("classic: last partial batch dropped from the length",
         'math.ceil(settings["epochs"] * len(images) / batch_size)',
         'settings["epochs"] * (len(images) // batch_size)'),
        ("--max-steps ignored", "last = min(total, flags.max_steps or math.inf)", "last = total"),
        ("--max-steps lengthens a run", "last = min(total, flags.max_steps or math.inf)",
         "last = flags.max_steps or total"),
        ("reports of a run that is thrown away stay", "    if not state:  # what", "    if False:  # what"),
        ("its checkpoint stays", "for stale in checkpoint, out", "for stale in out"),
        ("reports thrown away on resume", "    if not state:  # what", "    if True:  # what"),
        ("--precision auto refused on resume", 'if given.get("precision") == "auto":', "if False:"),
        ("a folder made for --resume where there is no run", "if flags.resume and not checkpoint.exists():",
         "if False:"),
        ("learning rate beyond the end of a shortened run", "min(1, (step - 1) / total)", "(step - 1) / total"),
        ("the command to sample without quotes",
         "shlex.join(['python', 'sample.py', '--checkpoint', str(checkpoint), '--n', '64', '--gif'])",
         "' '.join(['python', 'sample.py', '--checkpoint', str(checkpoint), '--n', '64', '--gif'])"),
        # loop
        ("NaN not looked for before saving", "    def save():\n        check()\n", "    def save():\n"),
        ("NaN not looked for before reporting", "        check()  # the sums, which would tell, are cleared below\n",
         ""),
        ("infinity taken for a number", "if not torch.isfinite(sums).all():", "if torch.isnan(sums).any():"),
        ("NaN looked for at the end only", 'if device.type == "cpu" or step % 100 == 0:', "if False:"),
        ("sums of a report not saved", '        recent["sums"] = sums.tolist()\n', ""),
        ("raw weights saved as the average", '"ema": average.state_dict()', '"ema": network.state_dict()'),
        ("validation of the raw weights", "quarters = validation.losses(average_model)",
         "quarters = validation.losses(model)"),
        ("classic: sampling with the raw weights, in reports", "write_report(out, history, average_model)",
         "write_report(out, history, model)"),
        ("sums not cleared after a report", "        sums.zero_()\n", ""),
        ("steps not cleared after a report", '        sums.zero_()\n        recent = {"steps": 0,',
         '        sums.zero_()\n        recent = {"steps": recent["steps"],'),
        ("epochs counted in steps", '"epoch": step * batch_size / len(images)', '"epoch": step / len(images)'),
        ("validation loss is its last quarter", '"validation_loss": sum(quarters) / 4',
         '"validation_loss": quarters[-1]'),
        ("images per second are steps", 'recent["steps"] * batch_size / recent["seconds"]',
         'recent["steps"] / recent["seconds"]'),
        ("time before a resume does not count", "start = time.monotonic() - seconds", "start = time.monotonic()"),
        ("a signal does not stop the run", "while step < last and not stop.signal:", "while step < last:"),
        ("one step too many", "while step < last and not stop.signal:", "while step <= last and not stop.signal:"),
        ("minutes counted as hours", "(began - start) / (60 * minutes)", "(began - start) / (3600 * minutes)"),
        ("learning rate follows --max-steps", "if minutes else step / total", "if minutes else step / last"),
        ("learning rate does not fall", " * cosine(progress)\n", "\n"),
        ("warm-up starts at 0", 'min(1, (step + 1) / max(1, settings["warmup"]))',
         'min(1, step / max(1, settings["warmup"]))'),
        ("learning rate rises on after the warm-up", 'min(1, (step + 1) / max(1, settings["warmup"]))',
         '((step + 1) / max(1, settings["warmup"]))'),
        ("no warm-up divides by 0", 'max(1, settings["warmup"])', 'settings["warmup"]'),
        ("gradients add up over steps", "            network.zero_grad(set_to_none=True)\n", ""),
        ("labels forgotten in training", "model.denoiser(x_t, t, y), x0, t, noise)  #",
         "model.denoiser(x_t, t), x0, t, noise)  #"),
        ("weighting forgotten", "(weights[t] * losses).mean().backward()", "losses.mean().backward()"),
        ("sum over the batch", "(weights[t] * losses).mean().backward()", "(weights[t] * losses).sum().backward()"),
        ("gradients not clipped", 'clip_grad_norm_(network.parameters(), settings["clip_norm"])',
         "clip_grad_norm_(network.parameters(), math.inf)"),
        ("clipped at 1, whatever the setting", 'clip_grad_norm_(network.parameters(), settings["clip_norm"])',
         "clip_grad_norm_(network.parameters(), 1.0)"),
        ("forgotten detach: every step's graph is kept", "(rarity[t] * losses.detach()).mean()",
         "(rarity[t] * losses).mean()"),
        ("classic: EMA updated before the optimizer step",
         ("            for optimizer in optimizers:\n                optimizer.step()\n",
          "list(network.parameters()), None)\n"),

         ("",
          "list(network.parameters()), None)\n            for optimizer in optimizers:\n"
          "                optimizer.step()\n")),
        ("learning rate of a report after a crash another", "    if step:  # that of", "    if False:  # that of"),
        ("EMA without warm-up", 'decay = min(settings["ema"], (1 + step) / (10 + step))', 'decay = settings["ema"]'),
        ("EMA's warm-up off by one", "(1 + step) / (10 + step)", "(2 + step) / (11 + step)"),
        ("EMA never slower than its warm-up", 'min(settings["ema"], (1 + step) / (10 + step))',
         "(1 + step) / (10 + step)"),
        ("EMA turned round", "list(average.parameters()), list(network.parameters()), None)",
         "list(network.parameters()), list(average.parameters()), None)"),
        ("forgotten EMA", "get_ema_multi_avg_fn(decay)(", "get_ema_multi_avg_fn(1.0)("),
        ("--report-every off by one", 'if step % settings["report_every"] == 0:',
         'if (step + 1) % settings["report_every"] == 0:'),
        ("--save-every ignored", "            if step % flags.save_every == 0:\n", "            if False:\n"),
        ("not saved at the end", "        save()\n        if stop.signal is None", "        if stop.signal is None"),
        ("last report forgotten", 'if stop.signal is None and recent["steps"]:', "if False:"),
        ("a report of no steps at the end", 'if stop.signal is None and recent["steps"]:', "if stop.signal is None:"),
        ("a report although it was stopped", 'if stop.signal is None and recent["steps"]:', 'if recent["steps"]:'),
        ("stopped with exit code 1", "sys.exit(128 + stop.signal)", "sys.exit(1)"),
        ("the command to go on starts anew", 'shlex.join(["python", *arguments, "--resume"])',
         'shlex.join(["python", *arguments])'),
        ("the command to go on asks for --overwrite too", 'not in ("--overwrite", "--resume")', 'not in ("--resume",)'),
        ("the command to go on without quotes", 'shlex.join(["python", *arguments, "--resume"])',
         '" ".join(["python", *arguments, "--resume"])'),
    ],

    "muon": [
        ("Nesterov's look ahead forgotten", "torch._foreach_lerp(gradients, momenta, mu)", "momenta"),
        ("momentum and gradient swapped", "torch._foreach_lerp_(momenta, gradients, 1 - mu)",
         "torch._foreach_lerp_(momenta, gradients, mu)"),
        ("momentum not kept", 'if "momentum" not in self.state[p]:', "if True:"),
        ("step scaled by the shorter side", "0.2 * math.sqrt(max(shape))", "0.2 * math.sqrt(min(shape))"),
        ("step five times too large", "scale = 0.2 * math.sqrt", "scale = math.sqrt"),
        ("weight decay without the learning rate", '1 - group["lr"] * group["weight_decay"]',
         '1 - group["weight_decay"]'),
        ("weight decay forgotten", '                    p.mul_(1 - group["lr"] * group["weight_decay"])\n', ""),
        ("uphill", 'alpha=-group["lr"] * scale', 'alpha=group["lr"] * scale'),
        ("vectors allowed", "if p.ndim < 2:", "if p.ndim < 1:"),
        ("wide matrices come back tall",
         "    x = product @ x\n    return x.mT if matrices.shape[1] > matrices.shape[2] else x\n",
         "    return product @ x\n"),
        ("the Gram matrix of the step before", "p @ gram @ p\n", "p @ gram\n"),
        ("the last iteration only", "product, gram = p @ product, ", "product, gram = p, "),
        ("a I forgotten", "        p.diagonal(dim1=1, dim2=2).add_(3.4445)\n", ""),
        ("one norm for all matrices", "dim=(1, 2), keepdim=True)", "dim=(0, 1, 2), keepdim=True)"),
        ("0 / 0 for a gradient of zeros", ".clamp(min=1e-7)", ""),
        ("four iterations", "for _ in range(5):", "for _ in range(4):"),
        ("a coefficient's last digits", "beta=-4.7750", "beta=-4.7"),
        ("sign of a coefficient", "alpha=2.0315", "alpha=-2.0315"),
    ],

    "benchmark": [
        ("modes together", "modes = parser.add_mutually_exclusive_group()", "modes = parser"),
        ("first calls count", "    function(), function()\n", ""),
        ("the sum of all times", "return median(times)", "return sum(times)"),
        ("the worse of two rates", "return max(2 * 2048", "return min(2 * 2048"),
        ("operations forward only", "network(x, t).square().mean().backward()", "network(x, t).square().mean()"),
        ("operations of a batch", "return counter.get_total_flops() / BATCH\n\n\ndef train",
         "return counter.get_total_flops()\n\n\ndef train"),
        ("kilobytes taken for bytes", "int(peak) * (1 if", "int(peak) // (1 if"),
        ("a command that failed is measured", "    if done.returncode:\n", "    if done.returncode and False:\n"),
        ("calls of one batch for those of two", "sum(seen) / (2 * BATCH)", "sum(seen) / BATCH"),
        ("calls left out of the ratio", "ratio * calls / PEER_STEPS", "ratio"),
        ("the first batch counts", "generate(model, n + BATCH, batch_size", "generate(model, n, batch_size"),
        ("times since the clock began", "return [t - times[0] for t in times]", "return times"),
        ("the first report, in which everything is warmed up, counts", "median(rates[1:])", "median(rates)"),
        ("both precisions measured by one", '"--precision", precision, "--device"', '"--device"'),
        ("the peer only before ours", "zip(*peers, peer_rates())", "zip(*peers)"),
        ("the memory of the last precision only", "max(peaks)", "peaks[-1]"),
        ("limits of one minute for five", '5: ("at most 0.5", "at least 0.98")', '5: ("at most 2", "")'),
        ("the peer over ours", "training[name, precision] / peer_training",
         "peer_training / training[name, precision]"),
        ("the large network's operations for both", "training[name, precision] * flops[name]",
         "training[name, precision] * flops[\"\"]"),
        ("the small network trained twice", "networks[name].settings)\n        machine", "settings)\n        machine"),
        ("the large network sampled twice", "sampling_clock(networks[name], 256)", "sampling_clock(model, 256)"),
        ("the small network trained with the batch of the large one", '"--batch-size", settings["batch_size"])',
         '"--batch-size", BATCH)'),
        ("the last three quarters over the first", "sum(runs[-quarter:])", "sum(runs[quarter:])"),
        ("10 steps over 40", "forty / ten", "ten / forty"),
        ("the raw weights' folder evaluated, not its checkpoint", '"--checkpoint", folder / "run" / "checkpoint.pt"',
         '"--checkpoint", folder / "run"'),
    ],

    "sample": [
        ("film even in t: noise for half of the time",
         "np.interp(np.linspace(levels[0], 1, GIF_FRAMES), levels, range(len(levels)))",
         "np.linspace(0, len(levels) - 1, GIF_FRAMES)"),
        ("film begins after the noise", "np.linspace(levels[0], 1, GIF_FRAMES)",
         "np.linspace(levels[1], 1, GIF_FRAMES)"),
        ("film ends before the digit", "np.linspace(levels[0], 1, GIF_FRAMES)",
         "np.linspace(levels[0], 1, GIF_FRAMES, endpoint=False)"),
        ("film past its end", "min(before + 1, len(states) - 1)", "before + 1"),
        ("film's grey levels cut down", "share).round().to(torch.uint8)", "share).to(torch.uint8)"),
        ("unwritable files found out after the work", "        check_target(target)  #", "        pass  #"),
        ("device forgotten", "pick_device(flags.device), flags.ema", '"cpu", flags.ema'),
        ("--no-ema ignored", "flags.ema, flags.precision)", "True, flags.precision)"),
        ("--precision ignored", "flags.ema, flags.precision)", "flags.ema)"),
        ("--sampler ignored", "sampler=flags.sampler, steps", 'sampler="dpm++", steps'),
        ("--steps ignored", "steps=flags.steps, guidance", "steps=None, guidance"),
        ("--guidance ignored", "guidance=flags.guidance,", "guidance=None,"),
        ("--seed ignored", "seed=flags.seed, batch_size", "seed=0, batch_size"),
        ("--batch-size ignored", "batch_size=flags.batch_size", "batch_size=64"),
        ("--guidance-interval ignored", "guidance_interval=flags.guidance_interval, ", ""),
        ("--no-clip ignored", "clip=flags.clip, digit", "clip=True, digit"),
        ("--digit ignored", "digit=flags.digit)", "digit=None)"),
        ("batches counted for images", "            first += len(x)\n", "            first += 1\n"),
        ("film of more images than it has room for", "min(flags.batch_size, GIF_IMAGES - first)",
         "min(flags.batch_size, GIF_IMAGES)"),
        ("film without the noise it starts from",
         "                        states.append(to_uint8(again(x[:filmed])).cpu())\n",
         "                        states.append(to_uint8(x[:filmed]).cpu())\n"),
        ("each batch's film starts from the first one's noise", "range(first, first + len(x[:filmed]))",
         "range(len(x[:filmed]))"),
        ("classic: film saved without undoing the scaling", "states.append(to_uint8(x[:filmed]).cpu())",
         "states.append((x[:filmed] * 255).to(torch.uint8))"),
        ("film even in alpha_bar", "model.ddpm.alpha_bars[t].sqrt().item()", "model.ddpm.alpha_bars[t].item()"),
        ("NaN saved", "if not torch.isfinite(x).all():", "if False:"),
        ("classic: images saved without undoing the scaling", "images = to_uint8(x).cpu()",
         "images = (x * 255).to(torch.uint8)"),
        ("no labels are class 0", "torch.full((len(x),), -1)", "torch.full((len(x),), 0)"),
        ("film of one batch only", "films.append(film(states, levels + [1.0]))",
         "films[:] = [film(states, levels + [1.0])]"),
        ("grid of the last images", "if first < GRID_IMAGES:", "if first >= flags.n - GRID_IMAGES:"),
        ("grid of the first batch", "if first < GRID_IMAGES:", "if first == 0:"),
        ("grid of more images than it says", "torch.cat(shown)[:GRID_IMAGES]", "torch.cat(shown)"),
        ("grey arrays with an axis for the channel", "if channels == 1 else", "if channels == 0 else"),
        ("colour arrays are half a grey one", "(flags.n, channels, size, size)", "(flags.n, size, size)"),
        ("labels of the last batch only", "np.concatenate(all_labels)", "all_labels[-1]"),
        ("all arrays kept in memory", "array.write(images.numpy().tobytes())",
         "array.write(images.numpy().tobytes()), write.__dict__.setdefault('kept', []).append(images.numpy().copy())"),
        ("arrays written in place, not atomically", "with atomic_write(path) as file,",
         'with open(path, "wb") as file,'),
    ],

    "evaluate": [
        # the classifier
        ("classifier sees black as -1", "self.body((x + 1).contiguous", "self.body(x.contiguous"),
        ("gradients add up over steps", "                optimizer.zero_grad()\n", ""),
        ("same order in each epoch, and none that is random",
         "order = torch.randperm(len(images), generator=generator).to(images.device)",
         "order = torch.arange(len(images), device=images.device)"),
        ("augmentation forgotten", "x = change(x, generator)", "change(x, generator)"),
        ("a classifier left in train mode after training",
         "    return net.eval().requires_grad_(False)\n\n\ndef random_affine",
         "    return net.requires_grad_(False)\n\n\ndef random_affine"),
        ("learning rate never scheduled", "                schedule.step()\n", ""),
        ("what comes in from outside is grey", "F.grid_sample(x + 1, grid, align_corners=False) - 1",
         "F.grid_sample(x, grid, align_corners=False)"),
        ("one random transformation for all images", "torch.rand(6, len(x), generator=generator)",
         "torch.rand(6, 1, generator=generator).expand(6, len(x))"),
        ("moved by up to 4 pixels", "u[4] * 2 / 14", "u[4] * 4 / 14"),
        ("forgotten check of the classifier's checksum", "if hashlib.sha256(content).hexdigest() != checksum:",
         "if not content:"),
        ("classifier in train mode", "return net.eval().requires_grad_(False).to(device)",
         "return net.requires_grad_(False).to(device)"),
        ("images not scaled for the classifier", "classifier(to_float(images[part].to(device)))",
         "classifier(images[part].to(device).float() / 255)"),
        ("softmax over the batch", "logits.softmax(dim=1)", "logits.softmax(dim=0)"),
        ("logits taken for probabilities", "logits.softmax(dim=1).cpu()", "logits.cpu()"),
        # distances
        ("Frechet: distance of the means not squared", "(mean_a - mean_b).square().sum()", "(mean_a - mean_b).norm()"),
        ("Frechet: covariance term once", "cov_b.trace() - 2 * cross", "cov_b.trace() - cross"),
        ("Frechet: root of the product forgotten", "_root(cov_a) @ _root(cov_b)", "cov_a @ cov_b"),
        ("Frechet: trace for the sum of singular values", "torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()",
         "(_root(cov_a) @ _root(cov_b)).trace()"),
        ("roots of negative zeros", "values.clamp(min=0).sqrt()", "values.sqrt()"),
        ("jackknife over what is left out, not what is kept", "statistic(~g)", "statistic(g)"),
        ("jackknife without its factor", "* math.sqrt(GROUPS - 1))", "/ math.sqrt(GROUPS))"),
        ("jackknife off by one", "* math.sqrt(GROUPS - 1))", "* math.sqrt(GROUPS))"),
        ("groups not at random",
         "x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))].tensor_split(GROUPS)",
         "x.tensor_split(GROUPS)"),
        ("kernel not divided by D", "dots / features_a.shape[1] + 1", "dots + 1"),
        ("kernel of second degree", "return base * base * base", "return base * base"),
        ("KID with bias: pairs of a sample and itself kept", "    sums -= torch.tensor([kernel(x.square()",
         "    torch.tensor([kernel(x.square()"),
        ("KID with bias: n^2 pairs", "sum() / (n * (n - 1)) +", "sum() / (n * n) +"),
        ("KID: cross term once", "(within - 2 * ab[keep]", "(within - ab[keep]"),
        ("squared distances below 0", "- 2 * (a @ b.T)).clamp(min=0)", "- 2 * (a @ b.T))"),
        # manifold
        ("precision with k = 5", "precision += (d <= real_reach3)", "precision += (d <= real_reach5)"),
        ("density with k = 3", "density += (d <= real_reach5)", "density += (d <= real_reach3)"),
        ("recall with the reach of real digits", "recalled |= (d <= reach[:, None])", "recalled |= (d <= real_reach3)"),
        ("coverage with k = 3", "(nearest_fake <= real_reach5)", "(nearest_fake <= real_reach3)"),
        ("density not divided by k", "density / (5 * len(fake))", "density / len(fake)"),
        ("a point is its own neighbour", "= torch.inf  # not itself", "+= 0"),
        ("k off by one", "return nearest[:, 2], nearest[:, 4]", "return nearest[:, 3], nearest[:, 4]"),
        ("distances not squared where reaches are", "d = squared_distances(part, real)",
         "d = squared_distances(part, real).sqrt()"),
        ("precision and recall swapped", "manifold_figures(test.features[:n], samples.features[:n]",
         "manifold_figures(samples.features[:n], test.features[:n]"),
        ("Frechet of however few samples", 'if n >= FEWEST["frechet"]:\n        figures["frechet"]',
         'if n > 1:\n        figures["frechet"]'),
        ("more samples than test digits", "n = min(n, len(test.features))", "pass"),
        ("the floor's sets are one", "line[k * n:(k + 1) * n]", "line[:n]"),
        ("the floor's sets overlap", "line[k * n:(k + 1) * n]", "line[k * (n // 2):k * (n // 2) + n]"),
        ("the floor's digits are the first ones", "shuffled = torch.randperm(len(labels), generator=generator)",
         "shuffled = torch.arange(len(labels))"),
        ("the floor's classes at random", "line = stands.argsort(stable=True)", "line = shuffled"),
        ("the floor's classes in a fixed order", "[torch.randperm(n, generator=generator)]", ""),
        ("a floor of one set more than there are", "min(FLOOR_SETS, len(labels) // n)",
         "min(FLOOR_SETS, len(labels) // n + 1)"),
        ("reach of other test digits", "_reach(test.features[:n]) if n", "_reach(test.features[-n:]) if n"),
        # single figures
        ("entropy in nats", "sum().item() / math.log(10) + 0.0", "sum().item() + 0.0"),
        ("confident from 0.5", "amax(dim=1) > 0.9)", "amax(dim=1) > 0.5)"),
        ("label agreement turned round", "(classes == samples.labels)", "(classes != samples.labels)"),
        ("faint up to 11", "share[1:13]", "share[1:12]"),
        ("black is faint", "share[1:13]", "share[0:13]"),
        ("total variation not halved", "(share - reference).abs().sum().item() / 2",
         "(share - reference).abs().sum().item()"),
        ("nearest by the wrong sign", "(norms - 2 * (part @ pool.T)).argmin(dim=1)",
         "(norms + 2 * (part @ pool.T)).argmin(dim=1)"),
        ("nearest by the scalar product", "(norms - 2 * (part @ pool.T)).argmin(dim=1)",
         "(part @ pool.T).argmax(dim=1)"),
        ("distances of pixels from 0 to 255", "difference.square().sum(dim=1).double().sqrt() / 255, indices",
         "difference.square().sum(dim=1).double().sqrt(), indices"),
        ("distances of uint8 that wrap round", "images.flatten(1).cpu().int() - others.flatten(1).cpu()[indices].int()",
         "(images.flatten(1).cpu() - others.flatten(1).cpu()[indices]).int()"),
        ("memorisation upside down", "ratio = (distances.mean() / test_distances.mean()).item()",
         "ratio = (test_distances.mean() / distances.mean()).item()"),
        ("copied: nearer than the mean test digit", "(distances < test_distances.min())",
         "(distances < test_distances.mean())"),
        ("its error added, not in squares", "ratio * math.sqrt(sum(relative))", "ratio * sum(relative)"),
        ("classifier test scored on what it was trained on", "held_out = torch.cat([x[half:] for x in mixed])",
         "held_out = torch.cat([x[:n - half] for x in mixed])"),
        ("classifier test: sets of different sizes", "generator=generator)[:n]].to(device) for x in (images, others)]",
         "generator=generator)].to(device) for x in (images, others)]"),
        ("classifier test changes the global generator",
         "    with torch.random.fork_rng(devices=[]):\n        torch.manual_seed(seed)\n        net = DigitNet(16, 2)",
         "    if True:\n        torch.manual_seed(seed)\n        net = DigitNet(16, 2)"),
        ("classifier test not from the seed", "        torch.manual_seed(seed)\n        net = DigitNet(16, 2)",
         "        net = DigitNet(16, 2)"),
        ("interval of 90 %", "z=1.96", "z=1.645"),
        ("interval not about the middle", "p + z * z / (2 * n), z *", "p, z *"),
        ("interval past 1", "min(1.0, (middle + reach) / (1 + z * z / n))",
         "(middle + reach) / (1 + z * z / n) + 1e-9"),
        # bits
        ("a stratum stands for one timestep", "terms.append((end - first) * model.ddpm", "terms.append(model.ddpm"),
        ("always the first timestep of a stratum", "torch.randint(first, end, (len(x0),), generator=generator)",
         "torch.full((len(x0),), first)"),
        ("the bits' timesteps not from the seed", "torch.randint(first, end, (len(x0),), generator=generator)",
         "torch.randint(first, end, (len(x0),))"),
        ("the last timestep left out", "strata_edges = list(range(T + 1))", "strata_edges = list(range(T))"),
        ("the strata do not begin at 0", "sorted({0} | {round", "sorted({round"),
        ("decoder counted twice", "terms[:, 1:].sum(dim=1), terms[:, 0]]", "terms.sum(dim=1), terms[:, 0]]"),
        ("prior and diffusion swapped", "prior, diffusion, decoder = parts", "diffusion, prior, decoder = parts"),
        ("deviation for standard error", "(parts.sum(dim=1).std() / math.sqrt(len(parts)))", "parts.sum(dim=1).std()"),
        # files
        ("a pipe is waited for", '    if not path.is_file():\n        raise ValueError(f"{path} is not a file; --npz',
         '    if path.is_dir():\n        raise ValueError(f"{path} is not a file; --npz'),
        ("floats taken for grey levels", "if images.dtype != np.uint8:", 'if images.dtype.kind == "O":'),
        ("channels dropped", "if images.ndim == 4 and images.shape[1] == 1:", "if images.ndim == 4:"),
        ("images of any size", "if images.ndim != 3 or images.shape[1:] != (28, 28):", "if images.ndim != 3:"),
        ("no images at all", "    if not len(images):\n", "    if images is None:\n"),
        ("labels of floats", 'labels.dtype.kind not in "iu" or', ""),
        ("labels too few", " or labels.shape != (len(images),):", ":"),
        ("-1 is a digit", "    if (labels == -1).all():\n", "    if labels is None:\n"),
        ("10 is a digit", "(labels <= 9)).all():", "(labels <= 10)).all():"),
        ("compression that unpacks to gigabytes",
         "if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):", "if False:"),
        ("archives of twice the size", "if 0 <= size <= LARGEST_ARCHIVE * 28 * 28:",
         "if 0 <= size <= LARGEST_ARCHIVE * 28 * 28 * 2:"),
        ("a header longer than its file", "if size > entry.file_size:", "if size > 10**12:"),
        ("pickles in arrays", ("dtype.hasobject or dtype.names", "allow_pickle=False"),
         ("dtype.names", "allow_pickle=True")),
        ("samples taken in the order they came",
         "order = sorted(range(len(images)), key=lambda i: images[i].numpy().tobytes())",
         "order = list(range(len(images)))"),
        ("samples picked in their order",
         "shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]",
         "shuffled = torch.arange(len(images))[:n]"),
        ("labels of other samples", "None if labels is None else labels[chosen]",
         "None if labels is None else labels[shuffled]"),
        ("NaN measured", "            if not torch.isfinite(x).all():\n", "            if False:\n"),
        ("classic: samples measured without undoing the scaling", "images.append(to_uint8(x).cpu())",
         "images.append((x * 255).to(torch.uint8))"),
        ("models of other data sets measured", '!= (1, 28) or dataset != "MNIST":', "!= (1, 28):"),
        # the whole
        ("test labels not shuffled with their images", "test_images[order], test_labels[order]",
         "test_images[order], test_labels"),
        ("noise of another generator", "torch.randn(images.shape, generator=generator)", "torch.randn(images.shape)"),
        ("uniform noise", "torch.randn(images.shape, generator=generator)",
         "2 * torch.rand(images.shape, generator=generator) - 1"),
        ("the floor from one set only",
         "float(np.mean([real[key] for real in each])) for key in each[0]}\n    if figures",
         "each[0][key] for key in each[0]}\n    if figures"),
        ("ratio to the floor upside down", 'figures["frechet"] / floors["frechet"]',
         'floors["frechet"] / figures["frechet"]'),
        ("ceiling of the ratio forgotten", 'ceilings["frechet"] / floors["frechet"]', 'ceilings["frechet"]'),
        ("the spread of the floor without ddof", "each], ddof=1)) if len", "each])) if len"),
        ("pixel floor of the test digits themselves", "pixel_figures(train_images[draws[0]], test_images)",
         "pixel_figures(test_images, test_images)"),
        ("class figures of noise for the floor", "class_figures(Digits(*(of[:n] for of in test)))",
         "class_figures(noise)"),
        ("class figures of another number", "class_figures(Digits(*(of[:n] for of in test)))", "class_figures(test)"),
        ("entropy of test digits for the floor",
         '    floors["class_entropy"] = class_figures(stand_ins[0])["class_entropy"]\n', ""),
        ("neighbours among the test digits", "nearest_neighbours(images, train_images, device)",
         "nearest_neighbours(images, test_images, device)"),
        ("memorisation floor against itself", "memorisation_figures(test_distances[:half], test_distances[half:])",
         "memorisation_figures(test_distances, test_distances)"),
        ("memorisation floor of another number", "half = min(n, len(test_distances) // 2)",
         "half = len(test_distances) // 2"),
        ("two-sample floor of test against test",
         "two_sample_figures(train_images[draws[0]], test_images, device, seed)",
         "two_sample_figures(test_images, test_images, device, seed)"),
        ("picture of the farthest", "distances.argsort()[:PAIRS]", "distances.argsort(descending=True)[:PAIRS]"),
        ("picture beside other digits", "train_images[nearest[closest]]", "train_images[closest]"),
        ("no warning that samples are few", "    if n < 10_000:\n", "    if n < 0:\n"),
        ("figures left out are not named", "[name for name, fewest in FEWEST.items() if n < fewest]", "[]"),
        ("floors for ceilings", '("_floor", floors), ("_ceiling", ceilings)',
         '("_floor", floors), ("_ceiling", floors)'),
        ("spread of the floors forgotten", 'if place != "_ceiling":', 'if place == "":'),
        ("table: floor and ceiling swapped", 'cell(key, "_floor"), cell(key, "_ceiling"), note)',
         'cell(key, "_ceiling"), cell(key, "_floor"), note)'),
        ("table: 0 printed as no figure", "        if value is None:\n", "        if not value:\n"),
        # sweep and command
        ("sweep: calls of a batch counted once", 'seen["images"] + len(out)', 'seen["images"] + 1'),
        ("sweep: calls of all runs together", '        seen["images"] = 0\n', '        seen.setdefault("images", 0)\n'),
        ("sweep: --guidance-interval ignored", "guidance_interval=flags.guidance_interval or EVERYWHERE",
         "guidance_interval=EVERYWHERE"),
        ("sweep: guided in the middle only", "guidance_interval=flags.guidance_interval or EVERYWHERE",
         "guidance_interval=flags.guidance_interval"),
        ("an interval of no guidance", "            if guidance not in (0, 1):\n                settings",
         "            if True:\n                settings"),
        ("--guidance-interval ignored", "guidance=flags.guidance, guidance_interval=flags.guidance_interval,\n",
         "guidance=flags.guidance,\n"),
        ("--npz with --guidance-interval", '"guidance", "guidance_interval", "batch_size"', '"guidance", "batch_size"'),
        ("sweep: more steps than the model has", "for s in steps[sampler] if s <= T]",
         "for s in steps[sampler] if s <= 2 * T + 999]"),
        ("sweep: steps == T left out", "for s in steps[sampler] if s <= T]", "for s in steps[sampler] if s < T]"),
        ("sweep: seconds for all", "(time.perf_counter() - start) * 1000 / n", "(time.perf_counter() - start)"),
        ("sweep: guidance swept at the default guidance",
         "runs += [(flags.sampler, default_steps, w) for w in guidance]",
         "runs += [(flags.sampler, default_steps, default_guidance) for w in guidance]"),
        ("--npz with --exact", '"precision", "exact")', '"precision")'),
        ("--npz with --checkpoint", 'needs_model = ("checkpoint", ', "needs_model = ("),
        ("--sweep with --exact", '"sweep": ("npz", "exact", "pairs")', '"sweep": ("npz", "pairs")'),
        ("--train-classifier with --json", '("npz", "sweep", "json", "pairs", "n"', '("npz", "sweep", "pairs", "n"'),
        ("--train-classifier with --n", '("npz", "sweep", "json", "pairs", "n"', '("npz", "sweep", "json", "pairs"'),
        ("sweep writes no JSON", "write_json(flags.json, sweep(", "write_json(None, sweep("),
        ("sweep of guidance without both predictions", "if knows_both(model.settings):",
         "if known_classes(model.settings):"),
        ("bits without labels of a model that had them always", 'if model.settings.get("label_dropout") != 0:',
         "if True:"),
        ("the file after the table",
         "        write_json(flags.json, figures)\n    finally:\n        print_table(figures)",
         "        print_table(figures)\n        write_json(flags.json, figures)\n    finally:\n        pass"),
        ("no table where the file cannot be written",
         "        write_json(flags.json, figures)\n    finally:\n        print_table(figures)",
         "        write_json(flags.json, figures)\n        print_table(figures)\n    finally:\n        pass"),
        ("sweep makes a folder for pairs", "pairs = None if flags.sweep or flags.train_classifier else flags.pairs",
         "pairs = flags.pairs"),
        ("sweep of however few samples", '            raise UsageError(f"--n {n} is too few',
         '            UsageError(f"--n {n} is too few'),
        ("--clip forgotten", "clip=flags.clip, seed=flags.seed, sampler=flags.sampler, steps",
         "seed=flags.seed, sampler=flags.sampler, steps"),
        ("--seed forgotten in sampling", "clip=flags.clip, seed=flags.seed, sampler=flags.sampler, steps",
         "clip=flags.clip, sampler=flags.sampler, steps"),
        ("--seed forgotten in measuring", "evaluate(images, labels, seed=flags.seed, device",
         "evaluate(images, labels, device"),
        ("--exact forgotten", "bits_figures(model, test_images, flags.seed, flags.exact)",
         "bits_figures(model, test_images, flags.seed)"),
        ("bits of training digits", 'test_images, _ = load_dataset("MNIST", train=False)',
         'test_images, _ = load_dataset("MNIST", train=True)'),
        ("unwritable files found out after the work", "        check_target(target)  #", "        pass  #"),
    ],
}


class Mutant(NamedTuple):
    """A row of MUTANTS, with its number in all of them."""
    number: int
    module: str
    bug: str
    old: tuple
    new: tuple
    reason: str

    def lines(self, source):
        """The numbers of the lines that change."""
        for old in self.old:
            first = source[:source.index(old)].count("\n") + 1
            yield from range(first, first + old.rstrip("\n").count("\n") + 1)

    def applied(self, source):
        """The module's source with the bug in it. Raises ValueError unless it has a place, and one only."""
        for old, new in zip(self.old, self.new, strict=True):
            if source.count(old) != 1:
                raise ValueError(f"{source.count(old)} places for {old!r}")
            source = source.replace(old, new)
        return source


class Verdict(NamedTuple):
    """What became of a mutant: "killed", "time-out", "collection error", "ERROR" (of pytest's own) or "SURVIVED"; by
    what; in how many seconds."""
    mutant: Mutant
    what: str
    by: str
    seconds: float

    @property
    def noticed(self):
        """A suite that cannot even be collected has noticed nothing in particular."""
        return self.what in ("killed", "time-out")


def mutants():
    """All rows of MUTANTS, numbered from 1."""
    numbers = itertools.count(1)
    for module, rows in MUTANTS.items():
        for bug, old, new, *reason in rows:
            old, new = ((x,) if isinstance(x, str) else x for x in (old, new))
            yield Mutant(next(numbers), module, bug, old, new, *reason or [""])


def stale(chosen):
    """The rows that do not apply to the modules as they are, or leave no Python behind: a list of lines."""
    lines, sources = [], {module: (ROOT / f"{module}.py").read_text() for module in MUTANTS}
    trees = {module: ast.dump(ast.parse(source)) for module, source in sources.items()}
    for mutant in chosen:
        place = f"{mutant.number} {mutant.module}: {mutant.bug}"
        try:
            changed = ast.parse(mutant.applied(sources[mutant.module]))
        except (ValueError, SyntaxError) as error:
            lines.append(f"{place}: {error}")
        else:
            if ast.dump(changed) == trees[mutant.module]:
                lines.append(f"{place}: changes nothing")
    return lines


class Plugin:
    """For pytest in a copy: the tests in order, and notes of what failed.

    Args:
        notes: a file for lines of JSON.
        ranks: of the tests, as far as they are known: the lowest come first.
        traced: note too which lines of the modules each test comes by (in this process and its main thread).
    """

    def __init__(self, notes, ranks, traced=False):
        self.notes, self.ranks, self.traced = notes, ranks, traced
        self.modules = {str(Path(f"{module}.py").resolve()): module for module in MUTANTS}
        self.lines = set()  # (module, number) of the test at hand

    def pytest_configure(self):
        """A mutant that asks for all of the memory does not get it."""
        with contextlib.suppress(ImportError):
            import resource
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (12 << 30 if hard == resource.RLIM_INFINITY else hard, hard))

    def pytest_collection_modifyitems(self, items):
        """In each file the lowest ranks first."""
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: (files.index(item.path), self.ranks.get(item.nodeid, 0)))

    def pytest_runtest_logstart(self, nodeid):
        """Before the test is set up."""
        self.lines = set()
        if self.traced:
            sys.settrace(self._trace)

    def _trace(self, frame, event, argument):
        module = self.modules.get(frame.f_code.co_filename)
        if module is None:
            return None  # nothing of ours: not traced line by line
        self.lines.add((module, frame.f_lineno))
        return self._trace

    def pytest_runtest_logreport(self, report):
        """After the set-up, the test and the tear-down."""
        self._note(test=report.nodeid, failed=report.failed, seconds=report.duration, lines=sorted(self.lines))

    def pytest_collectreport(self, report):
        if report.failed:
            self._note(collecting=report.nodeid)

    def _note(self, **what):
        self.notes.write(json.dumps(what) + "\n")
        self.notes.flush()


# ----------------------------------------------------------------------------------------------------------------------
# Copies of the repository, and the tests in them

class Workshop:
    """Context: a sound copy of the repository, in which mutants are made.

    Args:
        jobs: how many can be judged at a time.
        python: the interpreter that runs the tests.
    """

    def __init__(self, jobs=2, python=sys.executable):
        self.jobs, self.python = jobs, python
        self.seconds = {}  # of each test that passed in the sound copy
        self.passers = collections.defaultdict(set)  # (module, line) -> the tests that come by it there
        self.limits = {}  # seconds that a test file may take in a mutant, known once it passed in the sound copy
        self.noticed = collections.deque(maxlen=8)  # the tests that noticed the last mutants, and may notice the next
        self.servers, self.idle = [], queue.SimpleQueue()

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="mutants-"))
        listing = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                                 check=True, capture_output=True, text=True).stdout
        for name in filter(None, listing.split("\0")):
            if (ROOT / name).is_file():
                (self.folder / "sound" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / "sound" / name)
        known = {path.stem: path for folder in ("sound", "sound/tests") for path in (self.folder / folder).glob("*.py")}
        self.imported = {name: _imported(name, known) for name in known if name.startswith("test_")}
        for _ in range(self.jobs):
            self.servers.append(Server(self.python))
            self.idle.put(self.servers[-1])
        return self

    def __exit__(self, *exception):
        for server in self.servers:
            server.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def tests_of(self, module):
        """Two lists of test files: where the module's mutants are most likely noticed, and all others that import it,
        directly or not, those that take less time first."""
        rest = [name for name, modules in self.imported.items() if module in modules and name not in FIRST[module]]
        return FIRST[module], sorted(rest, key=lambda name: (self.limits.get(name, 0), name))

    def control(self, name):
        """Runs a test file in the sound copy, and learns how long its tests take.

        Raises:
            RuntimeError: it does not pass without any mutation.
        """
        start = time.monotonic()
        code, notes, output = self.run(self.folder / "sound", [name], limit=1800, traced=True)
        if code != 0:
            raise RuntimeError(f"{name} fails without any mutation, exit code {code}:\n{output[-3000:]}")
        for note in notes:
            self.seconds[note["test"]] = self.seconds.get(note["test"], 0) + note["seconds"]
            for module, line in note["lines"]:
                self.passers[module, line].add(note["test"])
        self.limits[name] = 60 + 4 * (time.monotonic() - start)

    def judge(self, mutant, first_only=False):
        """Makes a mutant and runs the tests that might notice: a Verdict."""
        start = time.monotonic()
        copy = self.folder / f"mutant-{mutant.number}"
        shutil.copytree(self.folder / "sound", copy)
        source = copy / f"{mutant.module}.py"
        # What was compiled from the original would be taken for the mutant, if both had the same size and second.
        for compiled in (copy / "__pycache__").glob(f"{mutant.module}.*"):
            compiled.unlink()
        passers = set().union(*(self.passers[mutant.module, line] for line in mutant.lines(source.read_text())))
        source.write_text(mutant.applied(source.read_text()))
        first, rest = self.tests_of(mutant.module)
        try:
            for names in (first[:1],) if mutant.reason else (first,) if first_only else (first, rest):
                what, by = self._stage(copy, names, passers) if names else ("SURVIVED", "")
                if what != "SURVIVED":
                    break
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        return Verdict(mutant, what, by, time.monotonic() - start)

    def _stage(self, copy, names, passers):
        code, notes, output = self.run(copy, names, sum(self.limits[name] for name in names), passers)
        if code is None:
            return "time-out", f"{', '.join(names)} took too long"
        if code == 0:
            return "SURVIVED", ""
        for note in notes:
            if note.get("failed"):
                self.noticed.append(note["test"])
                return "killed", note["test"].removeprefix("tests/")
            if "collecting" in note:
                return "collection error", note["collecting"]
        if code in (1, 3, 4, 5):
            return "ERROR", f"pytest ended with exit code {code} and no failed test:\n{output[-3000:]}"
        # By a signal, or by a KeyboardInterrupt that came through.
        return "killed", f"the end of pytest itself, with exit code {code}"

    def run(self, copy, names, limit, passers=(), traced=False):
        """Runs pytest on test files in a copy, the `passers` among their tests first: exit code (None: it took longer
        than `limit` seconds), what the plugin noted, and what pytest said."""
        beside = Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))
        for name in "notes", "output":
            (beside / name).touch()
        # The quickest first; before them, unless they take long, those that noticed the last mutants.
        ranks = {test: s for test, s in self.seconds.items() if Path(test.split("::")[0]).stem in names}
        ranks |= {test: -place for place, test in enumerate(self.noticed, 1) if ranks.get(test, math.inf) < 3}
        ranks |= {test: ranks[test] - 1e6 for test in ranks.keys() & passers}
        server = self.idle.get()
        try:
            code = server.ask(copy=str(copy), beside=str(beside), limit=limit, ranks=ranks, traced=traced,
                              files=[f"tests/{name}.py" for name in names])
            if not Path(os.devnull).is_char_device():
                raise RuntimeError(f"{os.devnull} is no device any more, and no verdict is worth anything: put it back")
            notes = [json.loads(line) for line in (beside / "notes").read_text().splitlines()]
            return code, notes, (beside / "output").read_text(errors="replace")
        finally:
            self.idle.put(server)
            shutil.rmtree(beside, ignore_errors=True)


class Server:
    """A process that has imported what takes seconds, torch above all, and runs pytest in forks of itself.

    Args:
        python: its interpreter.
    """

    def __init__(self, python):
        # One thread: a fork would not have the others.
        self.process = subprocess.Popen([python, __file__, "--serve"], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                        start_new_session=True)

    def ask(self, **request):
        """What `tests_in_a_fork` returns for the request."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("a server has ended")
        return json.loads(answer)

    def end(self):
        """Ends it, and the tests that it runs."""
        self.process.terminate()
        self.process.communicate()


def serve():
    """The server's side: a request a line on stdin, an answer a line on stdout."""
    sys.path = [entry for entry in sys.path if not Path(entry).resolve().is_relative_to(ROOT)]  # copies have their own
    for name in ("pytest", "torch", "torchvision.datasets", "matplotlib.figure", "imageio.v3", "PIL.Image", "tqdm",
                 "torch._subclasses.fake_tensor", "scipy.stats", "scipy.linalg", "diffusers.schedulers"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(tests_in_a_fork(**json.loads(line))), flush=True)


def tests_in_a_fork(copy, beside, limit, ranks, traced, files):
    """Runs pytest on test files, from the folder `copy`: its exit code, or None if it took longer than `limit` seconds.

    Args:
        beside: a folder for what it says (output) and what the plugin notes (notes).
        ranks, traced: see Plugin.
    """
    start, child = time.monotonic(), os.fork()
    if child == 0:
        try:
            os.setsid()  # so that what a test started can be ended with it
            output = os.open(f"{beside}/output", os.O_WRONLY)
            for descriptor, source in (0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output):
                os.dup2(source, descriptor)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.chdir(copy)
            os.mkdir(f"{beside}/temporary")
            os.environ["TMPDIR"], tempfile.tempdir = f"{beside}/temporary", None
            with open(f"{beside}/notes", "w") as notes:
                plugin = Plugin(notes, ranks, traced)
                arguments = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={beside}/pytest", *files]
                code = importlib.import_module("pytest").main(arguments, plugins=[plugin])
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            traceback.print_exc()
            code = 3
        os._exit(code)

    def end(*signal_and_frame):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if signal_and_frame:
            os._exit(1)

    signal.signal(signal.SIGTERM, end)
    while time.monotonic() - start < limit:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            end()  # what it left behind
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    end()
    os.waitpid(child, 0)
    return None


def _imported(name, known):
    """The names of all modules in `known` (name -> path) that one of them imports, directly or not, itself included."""
    found, waiting = set(), [name]
    while waiting:
        name = waiting.pop()
        if name in known and name not in found:
            found.add(name)
            for node in ast.walk(ast.parse(known[name].read_text())):
                if isinstance(node, ast.Import):
                    waiting += [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    waiting.append(node.module)
    return found


# ----------------------------------------------------------------------------------------------------------------------

def ranges(text):
    """An argparse type: "3,10-12" -> {3, 10, 11, 12}."""
    numbers = set()
    for part in text.split(","):
        low, _, high = part.partition("-")
        numbers |= set(range(int(low), int(high or low) + 1))
    return numbers


def print_verdict(verdict):
    """One line: number, module, bug, what became of it."""
    mutant, what, by, seconds = verdict
    by = f"{what} by {by}" if what == "killed" else f"{what} {by}".strip()
    print(f"{mutant.number:4} {mutant.module}: {mutant.bug}: {by} in {seconds:.0f} s", flush=True)


def print_summary(verdicts):
    """Per module how many were noticed, and which were not. Returns the share that was, of all."""
    print(f"\n{'module':<22}mutants  noticed")
    for module, rows in itertools.groupby(sorted(verdicts, key=lambda v: v.mutant.number), lambda v: v.mutant.module):
        rows = list(rows)
        print(f"{module:<22}{len(rows):7}{sum(v.noticed for v in rows):9}")
        for v in rows:
            if not v.noticed:
                print(f"    {v.mutant.number} {v.mutant.bug}: {v.what}", v.by, v.mutant.reason)
    share = sum(v.noticed for v in verdicts) / len(verdicts)
    counts = collections.Counter(v.what for v in verdicts)
    print(f"{'all':<22}{len(verdicts):7}{sum(v.noticed for v in verdicts):9}  {share:.1%}: "
          + ", ".join(f"{count} {what}" for what, count in counts.most_common()))
    return share


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", choices=FIRST, help="mutants of this module only")
    parser.add_argument("--only", type=ranges, metavar="N,N-N", help="mutants with these numbers only")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="how many at a time; default: 2")
    parser.add_argument("--first", action="store_true",
                        help="run the module's own tests only: what survives them may fall to others")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help="run nothing: only see whether all of them still apply")
    flags = parser.parse_args()
    if flags.serve:
        return serve()

    chosen = [mutant for mutant in mutants() if flags.module in (None, mutant.module)
              and (flags.only is None or mutant.number in flags.only)]
    lines = stale(chosen)
    if lines or not chosen:
        print("\n".join(["these mutants do not apply; mend their rows in MUTANTS:", *lines] if lines
                        else ["no such mutant"]), file=sys.stderr)
        return 2
    if flags.check:
        print(f"all {len(chosen)} mutants apply")
        return 0

    start = time.monotonic()
    with Workshop(flags.jobs) as shop, concurrent.futures.ThreadPoolExecutor(flags.jobs) as pool:
        try:
            needed = {name for mutant in chosen for names in shop.tests_of(mutant.module)[:1 if flags.first else 2]
                      for name in names}
            list(pool.map(shop.control, sorted(needed)))
            seconds = time.monotonic() - start
            print(f"without a mutation all {len(shop.seconds)} tests pass, in {seconds:.0f} s", flush=True)
            verdicts = []
            for future in concurrent.futures.as_completed(
                    [pool.submit(shop.judge, mutant, flags.first) for mutant in chosen]):
                verdicts.append(future.result())
                print_verdict(verdicts[-1])
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            shop.__exit__()
            if not isinstance(error, RuntimeError):
                raise
            print(error, file=sys.stderr)
            return 2
    share = print_summary(verdicts)
    print(f"in {(time.monotonic() - start) / 60:.1f} minutes")
    return 0 if share >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
