"""Numbers only: the noise schedules (beta tables), and which timesteps a short sampler visits.

Everything is float64: alpha_bar is a product of up to thousands of factors near 1, and 1 - alpha_bar at the first
timestep is a small difference of large numbers. ddpm.py casts once, at the point of use.
"""
import math

import torch


def linear_betas(timesteps):
    """Ho et al. 2020, section 4: beta rises linearly from 1e-4 to 0.02 over T = 1000 timesteps.

    For another T both ends are scaled by 1000 / T, so that alpha_bar_T stays near 4e-5 and x_T is noise for every T.
    Below T = 20 the scaled end would pass 1; there beta is clipped at 0.999.

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


def _check_timesteps(timesteps):
    if timesteps < 1:
        raise ValueError(f"timesteps must be at least 1, got {timesteps}")
