"""The beta tables and the timesteps of short samplers: against closed forms, high-precision sums and diffusers."""
import math

import numpy as np
import pytest
import torch

import train
from ddpm import DDPM
from diffusion_schedules import (SCHEDULES, check_betas, cosine_betas, linear_betas, logsnr_betas, make_betas,
                                 sampling_timesteps)
from helpers import FLAGS, assert_one_line, call, seeded

EVERY_T = [*range(1, 65), 100, 250, 400, 999, 1000, 4000]
COUNTS = [(T, steps) for T in (1, 2, 3, 7, 20, 50, 100, 400, 1000, 4000)
          for steps in sorted({1, 2, 3, 7, 10, 15, 16, 20, 50, T // 2, T - 2, T - 1, T}) if 1 <= steps <= T]
SPACINGS = ["trailing", "logsnr", "signal"]


def alpha_bars_of(betas):
    """Products of 1 - beta in the longest float of this machine."""
    return np.cumprod(1 - np.asarray(betas, dtype=np.longdouble))


def logsnr_of(betas):
    alpha_bars = alpha_bars_of(betas)
    return np.asarray(np.log(alpha_bars / (1 - alpha_bars)), dtype=np.float64)


def visit(T, steps, spacing, betas=None):
    betas = linear_betas(T) if betas is None else betas
    return sampling_timesteps(T, steps, spacing=spacing, alpha_bars=torch.cumprod(1 - betas, 0))


# ----------------------------------------------------------------------------------------------------------------------
# Betas

@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_every_T_gives_a_float64_table_that_ends_in_noise(name):
    for T in EVERY_T:
        betas = SCHEDULES[name](T)
        assert betas.shape == (T,) and betas.dtype == torch.float64, T
        assert ((betas > 0) & (betas < 1)).all(), T
        # logsnr's first step goes from clear to the first noise level, the others from one to the next
        assert (betas.diff()[name == "logsnr":] >= 0).all(), f"T={T}: beta falls with t"
        alpha_bars = alpha_bars_of(betas)
        assert (np.diff(alpha_bars) < 0).all(), T
        # 0.001 is one step clipped at beta = 0.999, which is all that T = 1 allows
        assert alpha_bars[-1] <= 1.0001e-3, f"T={T}: alpha_bar_T = {alpha_bars[-1]:.2g} is no noise"
        if T >= 50:
            assert alpha_bars[-1] < 5e-5, f"T={T}: alpha_bar_T = {alpha_bars[-1]:.2g} is no noise"
            assert alpha_bars[0] > 0.99, f"T={T}: the first step already removes the image"


def test_linear_at_T_1000_is_the_papers():
    """Ho et al. 2020, section 4: 1e-4 to 0.02, and L_T of about 1e-5 bits per dimension."""
    betas = linear_betas(1000)
    np.testing.assert_allclose(betas, [1e-4 + (0.02 - 1e-4) * k / 999 for k in range(1000)], rtol=1e-12)
    a = float(alpha_bars_of(betas)[-1])
    assert a == pytest.approx(4.0358e-5, rel=1e-4)
    bits = (a * 0.25 - a - math.log1p(-a)) / 2 / math.log(2)  # pixels of mean square 0.25
    assert 1e-6 < bits < 3e-5


@pytest.mark.parametrize("T", [2, 7, 100, 1000, 4000])
def test_logsnr_is_linear_in_the_log_of_signal_over_noise(T):
    """From 13.3, where the noise is a sixth of a grey level, to -10."""
    logsnr = logsnr_of(make_betas("logsnr", T))
    np.testing.assert_allclose(logsnr, [13.3 - 23.3 * k / (T - 1) for k in range(T)], atol=1e-6)
    noise = math.exp(-logsnr[0] / 2) * 255 / 2  # in grey levels
    assert 1 / 7 < noise < 1 / 5


@pytest.mark.parametrize("T", [2, 7, 20, 21, 50, 100, 400, 999, 4000])
def test_linear_at_another_T_is_scaled(T):
    """Both ends times 1000 / T, straight in between, clipped below 1."""
    wanted = np.linspace(0.1 / T, 20 / T, T)
    np.testing.assert_allclose(linear_betas(T), np.minimum(wanted, 0.999), rtol=1e-12)


@pytest.mark.parametrize("T", [20, 50, 100, 400, 1000, 4000])
def test_cosine_alpha_bars_follow_the_squared_cosine(T):
    """Nichol & Dhariwal 2021, eq. 17, wherever the clip of beta at 0.999 has not bitten."""
    betas = cosine_betas(T)
    f = [math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(T + 1)]
    unclipped = betas < 0.999
    assert unclipped.sum() >= T - 1 and float(betas[-1]) == 0.999
    closed = np.array(f[1:]) / f[0]
    np.testing.assert_allclose(alpha_bars_of(betas)[unclipped], closed[unclipped], rtol=1e-10)


@pytest.mark.parametrize("T", [21, 50, 400, 1000, 4000])
@pytest.mark.parametrize("name, theirs", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_betas_agree_with_diffusers(name, theirs, T):
    schedulers = pytest.importorskip("diffusers.schedulers")
    ends = {"beta_start": 0.1 / T, "beta_end": 20 / T}
    peer = schedulers.DDPMScheduler(num_train_timesteps=T, beta_schedule=theirs, **ends)
    np.testing.assert_allclose(make_betas(name, T), peer.betas, rtol=1e-6)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_make_betas_finds_each_schedule_by_name(name):
    assert torch.equal(make_betas(name, 40), SCHEDULES[name](40))
    known = {"linear": linear_betas, "cosine": cosine_betas, "logsnr": logsnr_betas}
    assert torch.equal(make_betas(name, 40), known.get(name, SCHEDULES[name])(40))


def test_unknown_schedule_lists_the_known_ones():
    with pytest.raises(ValueError) as error:
        make_betas("sigmoidal", 100)
    assert all(word in str(error.value) for word in ("sigmoidal", "linear", "cosine"))


@pytest.mark.parametrize("T", [0, -1])
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_T_below_1_is_refused(name, T):
    with pytest.raises(ValueError):
        make_betas(name, T)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_tables_that_leave_nothing_of_the_image_are_refused(name):
    """Where alpha_bar_T is below 1e-12: linear ones of some 10 steps, which are clipped at 0.999 again and again."""
    refused = [T for T in EVERY_T if alpha_bars_of(SCHEDULES[name](T))[-1] < 1e-12]
    assert refused == {"linear": list(range(5, 19))}.get(name, [])
    for T in EVERY_T:
        if T in refused:
            with pytest.raises(ValueError, match=f"{name} schedule with T = {T}: alpha_bar falls to"):
                make_betas(name, T)
        else:
            assert torch.equal(make_betas(name, T), SCHEDULES[name](T)), T


@pytest.mark.parametrize("betas, words", [
    ([], "non-empty"), ([[0.1, 0.2]], "non-empty"), ([0.1, 0.0], "between 0 and 1"), ([0.1, 1.0], "between 0 and 1"),
    ([-0.1], "between 0 and 1"), ([0.1, math.nan], "between 0 and 1"), ([0.9] * 13, "alpha_bar falls to 1.0e-13"),
    ([1e-13, 0.5], "the first beta is 1.0e-13")], ids=str)
def test_tables_that_cannot_be_computed_with_are_refused(betas, words, monkeypatch):
    """In the one line that all others print, with the name of the schedule."""
    with pytest.raises(ValueError, match=words):
        check_betas(betas)
    monkeypatch.setitem(SCHEDULES, "new", lambda T: betas)
    with pytest.raises(ValueError, match=f"new schedule with T = {len(betas)}.*{words}") as error:
        make_betas("new", len(betas))
    assert "\n" not in str(error.value)


def test_a_new_schedule_is_found_by_its_name(monkeypatch):
    """It may return any list of numbers, as many as there are timesteps."""
    monkeypatch.setitem(SCHEDULES, "new", lambda T: [0.25, 0.5])
    betas = make_betas("new", 2)
    assert betas.dtype == torch.float64 and betas.tolist() == [0.25, 0.5]
    with pytest.raises(ValueError, match="2 betas for T = 3"):
        make_betas("new", 3)


# ----------------------------------------------------------------------------------------------------------------------
# Timesteps

@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_timesteps_fall_strictly_from_the_last(name, spacing):
    for T, steps in COUNTS:
        t = visit(T, steps, spacing, SCHEDULES[name](T))
        assert t.dtype == torch.long and t.shape == (steps,), (T, steps)
        assert t[0] == T - 1, f"T={T}, {steps} steps: sampling starts at {t[0]}, but x_T belongs to {T - 1}"
        assert (t.diff() < 0).all() and t[-1] >= 0, (T, steps, t.tolist())
        if steps == T:
            assert t.tolist() == list(range(T - 1, -1, -1)), T


def test_the_default_spacing_is_trailing():
    assert torch.equal(sampling_timesteps(1000, 10), sampling_timesteps(1000, 10, spacing="trailing"))


def test_trailing_is_uniform_and_counted_from_the_end():
    assert visit(1000, 10, "trailing").tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    for T, steps in COUNTS:
        ideal = T - 1 - np.arange(steps) * (T / steps)
        assert np.abs(visit(T, steps, "trailing").numpy() - ideal).max() <= 0.5 + 1e-9, (T, steps)


@pytest.mark.parametrize("T, steps", [(1000, 1000), (1000, 50), (1000, 7), (1000, 2), (1000, 1), (400, 20), (50, 49)])
def test_trailing_agrees_with_diffusers(T, steps):
    schedulers = pytest.importorskip("diffusers.schedulers")
    peer = schedulers.DDIMScheduler(num_train_timesteps=T, timestep_spacing="trailing")
    peer.set_timesteps(steps)
    assert visit(T, steps, "trailing").tolist() == peer.timesteps.tolist()


def test_logsnr_is_uniform_in_t_where_the_table_is_uniform_in_logsnr():
    T = 101
    alpha_bars = torch.sigmoid(torch.linspace(7, -7, T, dtype=torch.float64))
    assert sampling_timesteps(T, 11, "logsnr", alpha_bars).tolist() == list(range(100, -1, -10))
    assert sampling_timesteps(T, 2, "logsnr", alpha_bars).tolist() == [100, 0]


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_logsnr_is_uniform_in_logsnr_up_to_rounding(name):
    """Uniform from the last timestep to 0, wherever the table is fine enough for it."""
    for T, steps in [(1000, 5), (1000, 20), (4000, 20), (400, 7), (1000, 2), (50, 40)]:
        betas = make_betas(name, T)
        visited, table = visit(T, steps, "logsnr", betas).tolist(), logsnr_of(betas)
        assert visited[-1] == 0, (T, steps)
        for k, (before, t) in enumerate(zip([T] + visited, visited)):
            nearest = np.abs(table - (table[-1] + (table[0] - table[-1]) * k / (steps - 1))).argmin()
            free = min(max(nearest, steps - 1 - k), before - 1)  # below the one before, with room for those to come
            assert abs(t - free) <= 1, (T, steps, k, t, free)    # 1: nearest in t or in log-SNR may differ


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [0, -3, 51])
def test_steps_outside_1_to_T_are_refused(spacing, steps):
    with pytest.raises(ValueError):
        visit(50, steps, spacing)


def test_unknown_spacing_lists_the_known_ones():
    with pytest.raises(ValueError) as error:
        visit(50, 10, "quadratic")
    assert all(word in str(error.value) for word in SPACINGS)


def test_signal_steps_are_longer_by_the_fourth_root_of_alpha_bar():
    """Uniform in the integral of alpha_bar^(1/4) over log-SNR, here as a sum of small pieces."""
    T, steps = 100_001, 12
    logsnr = np.linspace(8, -8, T)
    alpha_bars = 1 / (1 + np.exp(-logsnr))
    pieces = ((alpha_bars[1:] + alpha_bars[:-1]) / 2) ** 0.25 * (16 / (T - 1))
    shares = np.insert(np.cumsum(pieces), 0, 0) / pieces.sum()  # of the way from t = 0 to T-1
    visited = sampling_timesteps(T, steps, "signal", torch.from_numpy(alpha_bars)).numpy()
    np.testing.assert_allclose(shares[visited], np.linspace(1, 0, steps), atol=1e-5)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_signal_ends_at_0_and_takes_steps_from_the_noise(name):
    for T, steps in [(1000, 10), (4000, 23), (400, 7)]:
        betas = make_betas(name, T)
        signal, even = (visit(T, steps, spacing, betas) for spacing in ("signal", "logsnr"))
        assert signal[-1] == 0
        assert (signal[1:-1] <= even[1:-1]).all() and (signal < even).sum() >= steps // 2, (T, steps)


@pytest.mark.parametrize("spacing", ["logsnr", "signal"])
@pytest.mark.parametrize("alpha_bars", [None, torch.linspace(0.9, 0.1, 49)])
def test_a_spacing_without_its_table_is_refused(alpha_bars, spacing):
    with pytest.raises(ValueError, match=f"{spacing} spacing needs the 50 alpha_bars"):
        sampling_timesteps(50, 10, spacing=spacing, alpha_bars=alpha_bars)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_each_function_refuses_no_timesteps_itself(name):
    for T in 0, -1:
        with pytest.raises(ValueError, match="at least 1"):
            SCHEDULES[name](T)


# ----------------------------------------------------------------------------------------------------------------------
# What float32 can hold

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
