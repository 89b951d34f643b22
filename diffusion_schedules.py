"""Numbers only: the noise schedules (beta tables), and which timesteps a short sampler visits.

Everything is float64: alpha_bar is a product of up to thousands of factors near 1, and 1 - alpha_bar at the first
timestep is a small difference of large numbers. ddpm.py casts once, at the point of use.
"""
import math

import numpy as np
import torch


def linear_betas(timesteps):
    """Ho et al. 2020, section 4: beta rises linearly from 1e-4 to 0.02 over T = 1000 timesteps.

    For another T both ends are scaled by 1000 / T, so that x_T is noise for every T: alpha_bar_T is 4e-5 at T = 1000,
    2e-5 at T = 100 and smaller below, but for 1e-3 at T = 1 and 2. From T = 20 down the scaled end would reach 1; there
    beta is clipped at 0.999.

    Args:
        timesteps: T >= 1.
    Returns:
        betas, float64 [T], each in (0, 1).
    Raises:
        ValueError: T < 1.
    """
    _check_timesteps(timesteps)
    scale = 1000 / timesteps
    if timesteps == 1:  # one step has to go all the way: it takes the end, not the beginning, of the line
        return torch.tensor([0.999], dtype=torch.float64)
    return torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64).clamp(max=0.999)


def cosine_betas(timesteps):
    """Nichol & Dhariwal 2021, eq. 17: alpha_bar follows a squared cosine, betas are clipped at 0.999.

    Args:
        timesteps: T >= 1.
    Returns:
        betas, float64 [T], each in (0, 1).
    Raises:
        ValueError: T < 1.
    """
    _check_timesteps(timesteps)
    s = 0.008  # the paper's offset: keeps beta from vanishing at t = 0
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    # alpha_bar_t = f(t) / f(0),  f(t) = cos^2((t/T + s) / (1 + s) * pi/2)
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    # beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


def make_betas(name, timesteps):
    """The beta table of a schedule by its name, float64 [T].

    Raises:
        ValueError: unknown name (the known ones are listed), or T < 1.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name](timesteps)


def sampling_timesteps(timesteps, steps, spacing="trailing", alpha_bars=None):
    """Which timesteps a sampler of fewer steps visits.

    Args:
        timesteps: T.
        steps: how many to visit, 1..T.
        spacing:
            "trailing"  uniform in t and counted from the end, so that the first is T-1, where x_T belongs (Lin et al.
                        2023, arXiv 2305.08891, table 2).
            "logsnr"    uniform in log(alpha_bar / (1 - alpha_bar)), from T-1 down to 0 (Lu et al. 2022, arXiv
                        2206.00927, section 3.3), each rounded to a timestep of its own.
        alpha_bars: [T], needed for "logsnr".
    Returns:
        LongTensor [steps]: strictly decreasing, the first T-1; with steps == T every timestep.
    Raises:
        ValueError: steps outside 1..T, unknown spacing, or "logsnr" without alpha_bars [T].
    """
    return torch.tensor(spaced_timesteps(timesteps, steps, spacing, alpha_bars))


def spaced_timesteps(timesteps, steps, spacing="trailing", alpha_bars=None):
    """`sampling_timesteps` as a list of ints, from alpha_bars as a list of floats."""
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps must lie in 1..{timesteps}, the number of timesteps, got {steps}")
    if spacing == "trailing":
        wanted = [round(timesteps - k * timesteps / steps) - 1 for k in range(steps)]
    elif spacing == "logsnr":
        if alpha_bars is None or len(alpha_bars) != timesteps:
            raise ValueError(f"logsnr spacing needs the {timesteps} alpha_bars")
        logsnr = np.log([float(a) / (1 - float(a)) for a in alpha_bars])  # falls with t
        wanted = np.interp(-np.linspace(logsnr[-1], logsnr[0], steps), -logsnr, np.arange(timesteps))
    else:
        raise ValueError(f"unknown spacing {spacing!r}; choose trailing or logsnr")
    # Rounded, then pushed apart where two fell on one timestep: each below the one before, with room for those to come.
    visited, before = [], timesteps
    for k, t in enumerate(wanted):
        before = min(before - 1, max(round(float(t)), steps - 1 - k))
        visited.append(before)
    return visited


def _check_timesteps(timesteps):
    if timesteps < 1:
        raise ValueError(f"timesteps must be at least 1, got {timesteps}")
