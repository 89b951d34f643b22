"""Numbers only: the noise schedules (beta tables), and which timesteps a few-step sampler visits.

Everything is float64: alpha_bar is a product of up to thousands of factors near 1, and 1 - alpha_bar at the first
timestep is a small difference of nearly equal numbers. ddpm.py casts once, at the point of use.
"""
import math

import numpy as np
import torch


def linear_betas(T):
    """Ho et al. 2020, section 4: beta rises linearly from 1e-4 to 0.02 over T = 1000 timesteps.

    For another T both ends are scaled by 1000 / T, so that the last x_t is noise. At T = 20 or less the scaled end
    would reach 1, so beta is clipped at 0.999. (With T from 5 to 18 that leaves nothing of the image, and make_betas
    refuses it. The other schedules can be that short.)

    Args:
        T: number of timesteps, at least 1.
    Returns:
        betas, float64 [T], each in (0, 1).
    Raises:
        ValueError: T < 1.
    """
    _check_T(T)
    if T == 1:  # one step has to go all the way, so it takes the end of the line and not its beginning
        return torch.tensor([0.999], dtype=torch.float64)
    # beta_t = (1000 / T) (1e-4 + (0.02 - 1e-4) t / (T - 1))
    scale = 1000 / T
    return torch.linspace(scale * 1e-4, scale * 0.02, T, dtype=torch.float64).clamp(max=0.999)


def cosine_betas(T):
    """Nichol & Dhariwal 2021, eq. 17: alpha_bar follows a squared cosine, betas are clipped at 0.999.

    Args, Returns, Raises: as linear_betas.
    """
    _check_T(T)
    s = 0.008  # the paper's offset: keeps beta from vanishing at t = 0
    u = torch.arange(T + 1, dtype=torch.float64) / T
    # alpha_bar_t = f((t + 1) / T) / f(0),  f(u) = cos^2((u + s) / (1 + s) * pi/2)
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    # beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def logsnr_betas(T):
    """The log signal-to-noise ratio falls linearly, from noise of a sixth of a grey level to almost pure noise.

    Each timestep but the first then weighs the same in the variational bound, so that L_simple is, up to a factor, the
    bound without its two ends (Kingma et al. 2021, arXiv 2107.00630, eq. 17).

    Args, Returns, Raises: as linear_betas.
    """
    _check_T(T)
    # log(alpha_bar_t / (1 - alpha_bar_t)) = 13.3 - 23.3 t / (T - 1), and so alpha_bar_t = sigmoid of it
    logsnr = torch.linspace(-10.0, 13.3, T, dtype=torch.float64).flip(0)  # flipped, so that T = 1 gets the noisy end
    log_alpha_bars = torch.nn.functional.logsigmoid(logsnr)
    # beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}
    return -torch.expm1(torch.diff(log_alpha_bars, prepend=torch.zeros(1, dtype=torch.float64)))


# To add a schedule: write a function T -> betas, and give it a name here.
SCHEDULES = {"logsnr": logsnr_betas, "linear": linear_betas, "cosine": cosine_betas}


def make_betas(name, T):
    """The beta table of a schedule by its name, float64 [T].

    Raises:
        ValueError: unknown name (the known ones are listed), T < 1, or the table that comes out is not sound: see
            check_betas.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    betas = check_betas(SCHEDULES[name](T), f"the {name} schedule with T = {T}")
    if len(betas) != T:
        raise ValueError(f"the {name} schedule made {len(betas)} betas for T = {T}")
    return betas


LEAST = 1e-12  # smallest share of image or of noise in x_t's variance that float32 resolves


def check_betas(betas, what="the table of betas"):
    """Checks that a table of betas [T] can be computed with. Returns it as float64 on the CPU.

    Raises:
        ValueError: it is not one-dimensional, its numbers are not in (0, 1), alpha_bar falls below LEAST at t = T-1, so
            that float32 would not see the image, or 1 - alpha_bar is below it at t = 0, so that it would not see noise.
    """
    betas = torch.as_tensor(betas).detach().to("cpu", torch.float64)
    if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(f"{what} must be a non-empty table [T] of numbers between 0 and 1, both excluded")
    last, noise = (1 - betas).prod().item(), betas[0].item()
    if last < LEAST:
        raise ValueError(f"{what}: alpha_bar falls to {last:.1e} at the last timestep, and below {LEAST:.0e} float32 "
                         "cannot resolve the image; take smaller betas, or another number of timesteps")
    if noise < LEAST:
        raise ValueError(f"{what}: the first beta is {noise:.1e}, and below {LEAST:.0e} float32 cannot tell the noise")
    return betas


def sampling_timesteps(T, steps, spacing="trailing", alpha_bars=None):
    """Which timesteps a sampler of fewer steps visits.

    Args:
        T: number of timesteps that the model was trained with.
        steps: how many of them to visit, 1..T.
        spacing:
            "trailing"  uniform in t and counted from the end, so that the first is T-1, where x_T belongs (Lin et al.
                        2023, arXiv 2305.08891, table 2).
            "logsnr"    uniform in log(alpha_bar / (1 - alpha_bar)), from T-1 down to 0 (Lu et al. 2022, arXiv
                        2206.00927, section 3.3), each rounded to a timestep of its own.
            "signal"    the same, but where little of the image is left the steps are longer, in proportion to
                        alpha_bar^(-1/4), since pure noise shows little that a step could use.
        alpha_bars: [T], needed for "logsnr" and "signal".
    Returns:
        LongTensor [steps]: strictly decreasing, the first T-1. With steps == T it is every timestep.
    Raises:
        ValueError: steps outside 1..T, unknown spacing, or one that needs alpha_bars [T] without them.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps must lie in 1..{T}, the number of timesteps, got {steps}")
    if spacing == "trailing":
        wanted = [round(T - k * T / steps) - 1 for k in range(steps)]
    elif spacing in ("logsnr", "signal"):
        if alpha_bars is None or len(alpha_bars) != T:
            raise ValueError(f"{spacing} spacing needs the {T} alpha_bars")
        alpha_bars = np.asarray(alpha_bars, dtype=np.float64)
        if spacing == "logsnr":
            place = np.log(alpha_bars / (1 - alpha_bars))
        else:
            # the integral of u d(logsnr), with u = alpha_bar^(1/4), is 2 (artanh(u) + arctan(u))
            u = alpha_bars ** 0.25
            place = 2 * (np.arctanh(u) + np.arctan(u))
        # It falls with t, and np.interp wants it to rise: hence the minus.
        wanted = np.interp(-np.linspace(place[-1], place[0], steps), -place, np.arange(T))
    else:
        raise ValueError(f"unknown spacing {spacing!r}; choose trailing, logsnr or signal")
    # Rounded. Where two fall on one timestep the second moves down, but leaves room for the `left` that are to come.
    visited = [T]
    for left, t in zip(reversed(range(steps)), wanted):
        visited.append(min(visited[-1] - 1, max(round(float(t)), left)))
    return torch.tensor(visited[1:])


def _check_T(T):
    if T < 1:
        raise ValueError(f"the number of timesteps T must be at least 1, got {T}")
