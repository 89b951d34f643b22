"""The network: shapes, what it listens to, labels dropped and guided, and no float64 or stray device inside; and the
model: what its output is taken for, and what else may stand in its place."""
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm import DDPM
from diffusion_model import (EMBEDDING, NETWORKS, TIME_FEATURES, BayesUNet, Mixing, Model, ResidualBlock, UNet,
                             build_network, drop_labels, guided, time_features, whole_levels)
from diffusion_schedules import make_betas
from fake_device import pretend
from helpers import NETWORK, seeded
from sample import generate


UNETS = pytest.mark.parametrize("kind", [UNet, BayesUNet])


def tiny(kind=UNet, **settings):
    return kind(**{"width": 8, "depth": 1} | settings)


def awake(network, seed=0):
    """The network with random weights everywhere, those included that start at 0 and so hide what lies before them."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.1, generator=seeded(seed))
    return network


def batch(n=4, channels=1, size=28, seed=0):
    """x_t [n, C, H, W] and t [n], spread over 0..999."""
    return torch.randn(n, channels, size, size, generator=seeded(seed)), torch.arange(n) * 999 // max(1, n - 1)


# ----------------------------------------------------------------------------------------------------------------------
# Shapes

@UNETS
@pytest.mark.parametrize("size", [28, 32, 12])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("classes", [0, 10])
def test_shape_in_is_shape_out(size, channels, classes, kind):
    network = awake(tiny(kind, image_size=size, image_channels=channels, classes=classes))
    x_t, t = batch(3, channels, size)
    out = network(x_t, t, torch.tensor([0, 5, 9]) if classes else None)
    assert out.shape == x_t.shape and out.dtype == torch.float32
    assert out.std() > 0


def test_an_untrained_unet_says_exactly_zero():
    x_t, t = batch()
    assert (UNet()(x_t, t, torch.arange(4)) == 0).all()


def test_every_block_starts_as_the_identity():
    x, e = torch.randn(2, 6, 4, 4, generator=seeded()), torch.randn(2, EMBEDDING, generator=seeded(1))
    assert torch.equal(ResidualBlock(6, 6)(x, e), x)


def test_what_comes_before_the_last_convolution_is_normalised():
    network, seen = awake(tiny()), {}
    network.up.register_forward_hook(lambda layer, x, out: seen.update(before=out))
    network.out.register_forward_hook(lambda layer, x, out: seen.update(after=x[0]))
    network(*batch())
    mean, std = (f(seen["before"], dim=(1, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    expected = (seen["before"] - mean) / std
    torch.testing.assert_close(seen["after"], expected * expected.sigmoid(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("size", [27, 30, 1, 0, -4])
def test_a_size_that_does_not_divide_is_refused(size):
    for kind in UNet, BayesUNet:
        with pytest.raises(ValueError, match=f"multiple of 4.*got {size}$"):
            kind(image_size=size)


@UNETS
@pytest.mark.parametrize("setting", [{"image_channels": 0}, {"classes": -1}, {"width": 2}, {"depth": 0}])
def test_numbers_that_make_no_network_are_refused(setting, kind):
    with pytest.raises(ValueError, match="at least"):
        kind(**setting)


@UNETS
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 28, 28), (1, 28, 32)])
def test_images_of_another_size_are_refused(shape, kind):
    with pytest.raises(ValueError, match=r"takes images \[1, 28, 28\], got \[" + ", ".join(map(str, shape))):
        tiny(kind)(torch.zeros(2, *shape), torch.zeros(2, dtype=torch.long))


@UNETS
def test_memory_layout_makes_no_difference(kind):
    network, (x_t, t) = awake(tiny(kind, image_channels=3)), batch(channels=3)
    expected = network(x_t, t)
    strided = torch.stack([x_t, x_t], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(network(x_t.contiguous(memory_format=torch.channels_last), t), expected)
    torch.testing.assert_close(network(strided, t), expected)


def test_the_way_back_up_sees_what_the_fine_block_made():
    """The skip connection: what `down` puts out goes to `up`, beside what comes from below."""
    network, (x_t, t) = awake(tiny()), batch()
    seen = {}
    for name in "down", "upsample", "up":
        network.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: (inputs[0], output)}))
    network(x_t, t)
    assert torch.equal(seen["up"][0], torch.cat([seen["upsample"][1], seen["down"][1]], dim=1))
    assert not torch.equal(*seen["down"])


# ----------------------------------------------------------------------------------------------------------------------
# Bayes' rule

LEVELS = [0, 200, 255]


def mixture(seed=0, B=5, C=2, H=6, W=7):
    """Pixels y [B, C, 1, H, W], what they are noised with, and what was expected of them, for a BayesUNet of LEVELS."""
    network = tiny(BayesUNet, image_channels=C, levels=LEVELS).double()
    variance = torch.tensor([0.3, 1.1, 4, 20, 500], dtype=torch.float64).view(B, 1, 1, 1, 1).square() / 127.5 ** 2
    k = torch.randint(256, (B, C, 1, H, W), generator=seeded(seed))
    y = k / 127.5 - 1 + variance.sqrt() * torch.randn(k.shape, generator=seeded(seed + 1), dtype=torch.float64)
    normal = (torch.randn(n, B, C, H, W, generator=seeded(seed + n), dtype=torch.float64).movedim(0, 2)
              for n in (len(LEVELS) + 2, 2, 2))
    logits, means, log_stds = normal
    return network, y, variance, logits, means / 2, torch.exp(log_stds / 4 - 1)


def test_bayes_rule_against_a_sum_over_all_grey_levels():
    """The posterior of 256 levels and of those around them, one by one, with each prior normalised by itself."""
    network, y, variance, logits, means, stds = mixture()
    p, x0_hat = (a.numpy() for a in network.posterior(y, variance, logits, means, stds))

    x = np.arange(-3000, 3256) / 127.5 - 1                                              # the levels, [k]
    at = lambda a: np.asarray(a)[..., None]
    priors = [np.isclose(x, level / 127.5 - 1) + np.zeros((*means.shape[:2], *means.shape[3:], 1)) for level in LEVELS]
    for n in range(2):
        prior = np.exp(-(x - at(means[:, :, n])) ** 2 / (2 * at(stds[:, :, n]) ** 2))
        priors.append(prior / prior.sum(-1, keepdims=True))
    priors = np.exp(at(logits)) * np.stack(priors, axis=2)                              # [B, C, L + 2, H, W, k]
    exponent = -(at(y) - x) ** 2 / (2 * at(variance))
    joint = priors * np.exp(exponent - exponent.max(-1, keepdims=True))
    expected = joint.sum(-1) / joint.sum((2, -1))[:, :, None]
    # Where the noise is about a level, a normal distribution is taken for flat around a pixel.
    off = np.abs(p - expected).max((1, 2, 3, 4))
    assert (off < [5e-3, 5e-3, 1e-6, 1e-6, 1e-6]).all(), off
    expected = (joint * x).sum((2, -1)) / joint.sum((2, -1))
    off = np.abs(x0_hat[:, :, 0] - expected).max((1, 2, 3)) / variance.sqrt().flatten().numpy()
    assert (off < [0.1, 1e-4, 1e-5, 1e-6, 1e-6]).all(), off


@pytest.mark.parametrize("sigma", [0.163, 0.3, 0.7, 2.0])
def test_whole_levels_against_a_sum_over_them(sigma):
    u = torch.linspace(-3, 258, 4001, dtype=torch.float64)
    k = np.arange(-60, 330)
    weights = np.exp(-(u.numpy()[:, None] - k) ** 2 / (2 * sigma ** 2))
    log_p, moved = whole_levels(u, torch.tensor(sigma))
    np.testing.assert_allclose(log_p, np.log(weights.sum(1) / (sigma * math.sqrt(2 * math.pi))), atol=2e-4)
    np.testing.assert_allclose(moved, weights @ k / weights.sum(1) - u.numpy(), atol=1e-4)
    in_float32 = whole_levels(u.float(), torch.tensor(sigma))
    for low, high in zip(in_float32, (log_p, moved)):
        assert (low - high).abs().max() < 1e-3


def test_with_less_noise_than_any_schedule_has_whole_levels_are_still_found():
    u = torch.tensor([0.0, 3.1, 6.95, 254.9])
    _, moved = whole_levels(u, torch.tensor(1e-6))
    assert ((u + moved) - u.round()).abs().max() < 0.02


def test_an_untrained_one_says_what_the_pixel_alone_does():
    """x0_hat is black where the pixel is nearly black and there is little noise, and no other pixel changes it."""
    network = tiny(BayesUNet, levels=LEVELS)
    model = Model(network, DDPM(make_betas("logsnr", 1000)), {})
    x0 = torch.tensor([0, 1, 128, 200, 255])[torch.randint(5, (4, 1, 28, 28), generator=seeded())] / 127.5 - 1
    t, noise = torch.tensor([0, 20, 40, 60]), torch.randn(4, 1, 28, 28, generator=seeded(1))
    x_t = model.ddpm.q_sample(x0, t, noise)
    x0_hat = model.ddpm.predict_x0(x_t, t, model(x_t, t))
    assert ((127.5 * (x0_hat - x0)).abs()[:2] < 0.1).float().mean() > 0.95
    other = x_t.clone()
    other[:, :, 3, 5] += 1 / 255  # half a level
    changed = model.ddpm.predict_x0(other, t, model(other, t)) != x0_hat
    assert changed.any() and changed.sum() == changed[:, :, 3, 5].sum()


def test_the_unet_sees_what_each_pixel_shows():
    """x_t, and the posterior of each level and of a standard normal distribution, with the shares that it learned."""
    network, (x_t, t) = awake(tiny(BayesUNet, levels=LEVELS, timesteps=100)), batch()
    t, seen = t // 10, []
    network.unet.register_forward_hook(lambda unet, inputs, out: seen.append((*inputs, out)))
    network(x_t, t, torch.arange(4))
    (x, its_t, labels, _), = seen
    alpha_bar = torch.cumprod(1 - make_betas("logsnr", 100), 0)[t].view(-1, 1, 1, 1)
    y, variance = x_t / alpha_bar.sqrt(), 1 / alpha_bar - 1
    grid = whole_levels(127.5 * (y + 1), 127.5 * variance.sqrt())[0]
    density = [torch.exp(-(y - level / 127.5 + 1) ** 2 / (2 * variance)) / variance.sqrt() for level in LEVELS]
    density.append(torch.exp(-y ** 2 / (2 * (1 + variance)) + grid) / (1 + variance).sqrt())
    density = torch.cat(density, dim=1) * network.shares.exp()
    assert torch.equal(x[:, :1], x_t) and torch.equal(its_t, t) and torch.equal(labels, torch.arange(4))
    torch.testing.assert_close(x[:, 1:], (density / density.sum(1, keepdim=True)).float(), rtol=1e-3, atol=1e-4)


def test_it_is_built_for_the_levels_and_the_schedule_of_its_settings():
    settings = NETWORK | {"network": "bayes", "levels": LEVELS, "schedule": "linear", "timesteps": 40}
    network, alpha_bars = build_network(settings), torch.cumprod(1 - make_betas("linear", 40), 0)
    torch.testing.assert_close(network.variance, (1 / alpha_bars - 1).float())
    torch.testing.assert_close(network.levels, torch.tensor(LEVELS) / 127.5 - 1)


@pytest.mark.parametrize("value", [-1e3, -50, 50, 1e3])
def test_it_is_finite_whatever_the_unet_says(value):
    """A run once drove a standard deviation beyond what float32 holds."""
    network, (x_t, t) = awake(tiny(BayesUNet, levels=LEVELS)), batch(8)
    for k in range(len(network.out.bias)):
        network.zero_grad()
        with torch.no_grad():
            network.out.bias.zero_()[k] = value
        v = network(x_t, t)
        v.square().mean().backward()
        assert v.isfinite().all() and all(p.grad.isfinite().all() for p in network.parameters()), k


@pytest.mark.parametrize("schedule, timesteps", [("logsnr", 1000), ("linear", 1000), ("cosine", 200)])
def test_it_is_finite_at_every_timestep_and_follows_the_pixel_where_there_is_little_noise(schedule, timesteps):
    """In float32, whatever the UNet expects."""
    network = awake(tiny(BayesUNet, levels=LEVELS, schedule=schedule, timesteps=timesteps))
    ddpm = DDPM(make_betas(schedule, timesteps))
    t = torch.arange(timesteps)
    x0 = torch.randint(256, (timesteps, 1, 28, 28), generator=seeded()) / 127.5 - 1
    noise = torch.randn(x0.shape, generator=seeded(1))
    v = torch.cat([network(x, s) for x, s in zip(ddpm.q_sample(x0, t, noise).split(100), t.split(100))])
    a, b = (ddpm.tables[f"sqrt_{name}"].view(-1, 1, 1, 1) for name in ("alpha_bars", "one_minus_alpha_bars"))
    x0_hat = a * ddpm.q_sample(x0, t, noise) - b * v
    assert v.isfinite().all()
    clear = ddpm.alpha_bars > 0.999
    assert ((x0_hat - x0) / b)[clear].square().mean() < 2


# ----------------------------------------------------------------------------------------------------------------------
# Blocks

@pytest.mark.parametrize("channels, groups", [(16, 8), (6, 2), (3, 1)])
def test_mixing_by_hand(channels, groups):
    """A channel's value at a position is a sum over all positions, by the matrix of its group."""
    mixing, x = awake(Mixing(channels, 6)), torch.randn(3, channels, 2, 3, generator=seeded())
    assert mixing.weight.shape == (groups, 6, 6)
    expected = [[(x[b, c].flatten() @ mixing.weight[c * groups // channels]).view(2, 3) for c in range(channels)]
                for b in range(3)]
    expected = torch.stack([torch.stack(image) for image in expected])
    for layout in torch.contiguous_format, torch.channels_last:
        torch.testing.assert_close(mixing(x.contiguous(memory_format=layout)), expected)


def test_a_block_by_hand():
    block, x = awake(ResidualBlock(6, 6, 20)), torch.randn(2, 6, 4, 5, generator=seeded())
    emb = torch.randn(2, EMBEDDING, generator=seeded(1))

    def normalised(x):
        return (x - x.mean(dim=(1, 2, 3), keepdim=True)) / x.var(dim=(1, 2, 3), keepdim=True, correction=0).sqrt()

    h = normalised(x)
    h = h * h.sigmoid()
    h = normalised(block.conv1(h) + block.mixing(h))
    scale_shift = (emb @ block.scale_shift.weight.T + block.scale_shift.bias)[:, :, None, None]
    h = (1 + scale_shift[:, :6]) * h + scale_shift[:, 6:]
    torch.testing.assert_close(block(x, emb), x + block.conv2(h * h.sigmoid()), rtol=1e-3, atol=1e-4)


@UNETS
@pytest.mark.parametrize("size, mixed", [(28, 49), (64, 256), (68, None)])
def test_positions_are_mixed_at_the_coarser_level_of_images_up_to_64_pixels(size, mixed, kind):
    """Of larger ones the matrices would outgrow the rest of the network."""
    sizes = [(name.split(".")[-3], layer.weight.shape[1]) for name, layer in tiny(kind, image_size=size, depth=2
                                                                                  ).named_modules()
             if isinstance(layer, Mixing)]
    assert sizes == ([("middle", mixed)] * 2 if mixed else [])


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


# ----------------------------------------------------------------------------------------------------------------------
# What it listens to

def train_a_little(network, steps=12):
    """Steps towards targets that differ by t and by label. Returns the loss at each."""
    x_t, t = batch(8)
    labels = torch.arange(8)
    target = (t / 999 - labels / 10)[:, None, None, None] * torch.ones_like(x_t)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = (network(x_t, t, labels) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_one_step_reduces_the_loss():
    torch.manual_seed(0)
    first, second = train_a_little(tiny(), 2)
    assert second < first


def test_timestep_and_label_matter_after_a_few_steps():
    torch.manual_seed(0)
    network = tiny()
    train_a_little(network)
    x_t, _ = batch(2, seed=1)
    one, two, a, b = (torch.full((2,), number) for number in (0, 500, 3, 7))
    assert (network(x_t, one, a) - network(x_t, two, a)).abs().max() > 1e-3
    assert (network(x_t, one, a) - network(x_t, one, b)).abs().max() > 1e-3
    assert (network(x_t, one, a) - network(x_t, one, None)).abs().max() > 1e-3


@UNETS
def test_every_weight_learns(kind):
    network, (x_t, t) = awake(tiny(kind, **{"levels": LEVELS} if kind is BayesUNet else {})), batch(11)
    network(x_t, t, torch.arange(11)).square().sum().backward()
    assert [name for name, p in network.named_parameters() if not p.grad.abs().sum() > 0] == []


def test_each_image_is_its_own():
    network, (x_t, t) = awake(tiny()), batch(5)
    labels = torch.tensor([0, 3, 9, 10, 4])
    expected = network(x_t, t, labels)
    order = torch.tensor([4, 2, 0])
    torch.testing.assert_close(network(x_t[order], t[order], labels[order]), expected[order])


def test_time_and_label_make_one_embedding_for_all_blocks():
    """silu(w2 silu(w1 features + b1) + b2 + label)."""
    network, (x_t, t), labels = awake(tiny(depth=2)), batch(), torch.tensor([0, 3, 9, 10])
    told = []
    for block in network.down, *network.middle, network.up:
        block.register_forward_hook(lambda block, inputs, out: told.append(inputs[1]))
    network(x_t, t, labels)
    first, _, second = network.time
    h = time_features(t) @ first.weight.T + first.bias
    h = (h * h.sigmoid()) @ second.weight.T + second.bias + network.label.weight[labels]
    assert len(told) == 4
    for emb in told:
        torch.testing.assert_close(emb, h * h.sigmoid())


def test_no_labels_is_the_label_after_the_last():
    network, (x_t, t) = awake(tiny(classes=10)), batch()
    torch.testing.assert_close(network(x_t, t), network(x_t, t, torch.full((4,), 10)), rtol=0, atol=0)
    assert (network(x_t, t) - network(x_t, t, torch.full((4,), 9))).abs().max() > 1e-3


def test_time_features_are_those_of_the_paper():
    features = time_features(torch.tensor([0, 7]))
    assert features.shape == (2, TIME_FEATURES) and features.dtype == torch.float32
    half = TIME_FEATURES // 2
    frequencies = [10_000 ** (-k / half) for k in range(half)]
    expected = [math.sin(7 * f) for f in frequencies] + [math.cos(7 * f) for f in frequencies]
    torch.testing.assert_close(features[1], torch.tensor(expected))
    assert features[0].tolist() == [0.0] * half + [1.0] * half


def test_time_features_tell_all_timesteps_apart():
    features = time_features(torch.tensor([*range(1000), 4000]))
    distances = torch.cdist(features, features) + 10 * torch.eye(1001)
    assert distances.min() > 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Labels: dropped in training, guiding in sampling

def test_labels_are_dropped_one_by_one_with_their_probability():
    n, p = 20_000, 0.3
    labels = torch.arange(n) % 10
    dropped = drop_labels(labels, p, 10, seeded())
    lost = dropped == 10
    assert torch.equal(dropped[~lost], labels[~lost]) and dropped.dtype == torch.long
    assert abs(lost.sum().item() - n * p) < 5 * math.sqrt(n * p * (1 - p))
    # If neighbours shared their fate, pairs lost together would be more than p^2 of all.
    pairs = (lost[0::2] & lost[1::2]).sum().item()
    assert abs(pairs - n / 2 * p * p) < 5 * math.sqrt(n / 2 * p * p * (1 - p * p))


@pytest.mark.parametrize("probability, lost", [(0.0, 0), (1.0, 10_000)])
def test_no_label_and_every_label_dropped(probability, lost):
    assert (drop_labels(torch.zeros(10_000, dtype=torch.long), probability, 10, seeded()) == 10).sum() == lost


def test_dropping_follows_its_generator():
    labels = torch.zeros(1000, dtype=torch.long)
    same, again, other = (drop_labels(labels, 0.5, 10, seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


@pytest.fixture
def times():
    """A model that multiplies by the label, or by 5 without; `times.calls` counts its calls."""
    def model(x_t, t, labels):
        model.calls += 1
        return x_t * 5 if labels is None else x_t * labels.view(-1, 1)

    model.calls = 0
    return model


@pytest.mark.parametrize("guidance, expected, calls", [
    (0, [5, 5], 1),          # the label is ignored
    (1, [8, 3], 1),          # no guidance, and no second call
    (2, [11, 1], 2),         # 5 + 2 (8 - 5), 5 + 2 (3 - 5)
    (0.5, [6.5, 4], 2),
    (7.5, [27.5, -10], 2),
])
def test_guidance_by_hand(times, guidance, expected, calls):
    model = guided(times, torch.tensor([8, 3]), guidance)
    for count in range(1, 4):  # as often as it is called
        assert model(torch.ones(2, 1), torch.tensor([4, 4])).flatten().tolist() == expected
        assert times.calls == count * calls


@pytest.mark.parametrize("guidance, expected, calls", [
    (0, [5, 5], [1, 0]), (1, [8, 3], [1, 0]), (2, [15, 4], [1, 1]), (0.5, [4.5, 2.5], [1, 1])])
def test_autoguidance_by_hand(times, guidance, expected, calls):
    """By what was seen in the same image, with the same label, early in the training: 1 and 2."""
    def early(x, t, labels):
        early.calls += 1
        assert labels.tolist() == [8, 3] and t.tolist() == [4, 4] and x.flatten().tolist() == [1, 1]
        return torch.tensor([[1.0], [2.0]])

    early.calls = 0
    model = guided(times, torch.tensor([8, 3]), guidance, [True, False], early)
    assert model(torch.ones(2, 1), torch.tensor([4, 4])).flatten().tolist() == expected
    assert [times.calls, early.calls] == calls
    plain = [5, 5] if guidance == 0 else [8, 3]
    assert model(torch.ones(2, 1), torch.tensor([4, 4])).flatten().tolist() == plain and early.calls == calls[1]


@pytest.mark.parametrize("guidance, acting, plain, calls", [
    (2, [11, 1], [8, 3], [1, 3, 5, 6]), (1, [8, 3], [8, 3], [1, 2, 3, 4]), (0, [5, 5], [5, 5], [1, 2, 3, 4])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_guidance_where_it_is_wanted_by_hand(times, dtype, guidance, acting, plain, calls):
    """Call by call, and no second one where it does not act."""
    model = guided(times, torch.tensor([8, 3]), guidance, [False, True, True, False])
    for expected, count in zip([plain, acting, acting, plain], calls):
        noise = model(torch.ones(2, 1, dtype=dtype), torch.tensor([4, 4]))
        assert noise.flatten().tolist() == expected and noise.dtype == dtype and times.calls == count


# ----------------------------------------------------------------------------------------------------------------------
# The model: a network, and how its output becomes noise

def model_of(network, precision="fp32", **settings):
    return Model(network, DDPM(make_betas("linear", 1000)), NETWORK | {"label_dropout": 0.1} | settings, precision)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 0.05)])
def test_a_model_takes_the_output_for_v_and_returns_the_noise(precision, tolerance):
    """x0_hat = sqrt(alpha_bar) x_t - sqrt(1 - alpha_bar) v, clipped, and the noise that is left of x_t without it."""
    network, (x_t, t), labels = awake(tiny()), batch(), torch.tensor([0, 3, 9, 10])
    model = model_of(network, precision)
    a = model.ddpm.alpha_bars.numpy()[t][:, None, None, None]
    for given in labels, None:
        v = network(x_t, t, given).detach().double().numpy()
        x0_hat = np.clip(np.sqrt(a) * x_t.numpy() - np.sqrt(1 - a) * v, -1, 1)
        wanted = (x_t.numpy() - np.sqrt(a) * x0_hat) / np.sqrt(1 - a)
        noise = model(x_t, t, given).detach()
        assert noise.dtype == torch.float32
        error = np.abs(noise.numpy() - wanted)[1:].max()  # at t = 0 the noise is a hundredth of x_t
        assert error < tolerance and (precision == "fp32" or error > 1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(model(x_t, t, labels), model(x_t, t))


@pytest.mark.parametrize("classes, label_dropout, known, guidance", [
    (10, 0.1, 10, True), (10, None, 10, True), (10, 0, 10, False), (10, 1, 0, False), (0, 0.1, 0, False)])
def test_what_a_model_knows_follows_from_its_training(classes, label_dropout, known, guidance):
    settings = {"classes": classes} | ({} if label_dropout is None else {"label_dropout": label_dropout})
    model = Model(tiny(classes=classes), None, settings)
    assert model.num_classes == known and model.supports_guidance == guidance


class Stripes(torch.nn.Module):
    """A network that has nothing of the UNet's: x_t once more, plus a number for the label and one for the time."""

    def __init__(self, **settings):
        super().__init__()
        self.settings = settings
        self.numbers = torch.nn.Parameter(torch.linspace(0, 1, settings["classes"] + 1))

    def forward(self, x_t, t, labels=None):
        labels = torch.full_like(t, -1) if labels is None else labels
        return x_t * 0.5 + (self.numbers[labels] + t / 1000)[:, None, None, None]


def test_a_new_network_is_built_and_serves(monkeypatch):
    """One row in NETWORKS: it is built with its settings, a Model reads it, and sample.generate guides it."""
    monkeypatch.setitem(NETWORKS, "stripes", Stripes)
    settings = NETWORK | {"network": "stripes", "image_size": 6, "image_channels": 3, "classes": 4,
                          "class_shares": [0.25] * 4, "label_dropout": 0.1}
    network = build_network(settings)
    assert type(network) is Stripes
    assert network.settings == {"image_size": 6, "image_channels": 3, "classes": 4, "width": 8, "depth": 1}
    model = Model(network, DDPM(make_betas("linear", 40)), settings)
    x_t, t, labels = torch.randn(2, 3, 6, 6, generator=seeded()), torch.tensor([7, 30]), torch.tensor([3, 0])
    v = network(x_t, t, labels)
    torch.testing.assert_close(model(x_t, t, labels), model.ddpm.clipped_noise_from_v(x_t, t, v))
    calls = []
    network.register_forward_hook(lambda network, given, out: calls.append(given[2] is None))
    (_, process), = generate(model, 5, sampler="ddim", steps=4, guidance=2.0, guidance_interval=(0.0, 1e9))
    images = [x for _, x, _ in process]
    assert len(images) == 4 and images[-1].shape == (5, 3, 6, 6) and images[-1].isfinite().all()
    assert calls == [False, True] * 4


def test_a_model_of_one_class_can_be_guided():
    settings = {"classes": 1, "class_shares": [1.0], "label_dropout": 0.1}
    assert Model(None, None, settings).supports_guidance and Model(None, None, settings).num_classes == 1


# ----------------------------------------------------------------------------------------------------------------------
# Types and devices

class Types(TorchDispatchMode):
    """Notes the dtypes of all tensors that any operation makes."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        outputs = out if isinstance(out, (tuple, list)) else [out]
        self.seen |= {tensor.dtype for tensor in outputs if isinstance(tensor, torch.Tensor)}
        return out


def test_nothing_is_float64_on_the_way_there_or_back():
    network, (x_t, t) = awake(tiny()), batch()
    with Types() as types:
        guided(network, torch.arange(4), 2.0)(x_t, t).square().mean().backward()
    assert torch.float32 in types.seen and torch.float64 not in types.seen
    assert {p.grad.dtype for p in network.parameters()} == {torch.float32}


def test_network_and_guidance_on_a_fake_gpu():
    with pretend("cuda") as home:
        network = tiny().requires_grad_(False).to(home)
        x_t, t, labels = (x.to(home) for x in (torch.zeros(4, 1, 28, 28), *torch.zeros(2, 4, dtype=torch.long)))
        for given in (None, drop_labels(labels, 0.5, 10)):
            out = network(x_t, t, given)
            assert out.device == home and out.shape == x_t.shape
        assert guided(network, labels, 2.0)(x_t, t).device == home
        with pytest.raises(RuntimeError, match="device"):  # the control: a mix-up is noticed
            network(x_t, t, labels.cpu())


def test_backward_stays_on_its_device():
    """On the meta device, since autograd asks a real driver about a fake GPU."""
    with torch.device("meta"):
        network, x_t, t = tiny(), torch.zeros(4, 1, 28, 28), torch.zeros(4, dtype=torch.long)
    network(x_t, t, t).sum().backward()
    assert {p.grad.device.type for p in network.parameters()} == {"meta"}


def test_the_smallest_networks_there_are():
    """And the finer level has 3/8 of the channels, full resolution a quarter, but never fewer than 8."""
    x, t = torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.long)
    for kind in UNet, BayesUNet:
        assert kind(image_size=4, width=3, depth=1)(x, t).shape == x.shape
    for size in 2, 0, 6:
        with pytest.raises(ValueError, match="multiple of 4"):
            UNet(image_size=size)
    for wrong in {"width": 2}, {"depth": 0}, {"image_channels": 0}, {"classes": -1}:
        with pytest.raises(ValueError, match="at least"):
            UNet(**wrong)
    assert UNet(width=128).stem.out_channels == 48 and UNet(width=8, depth=1).stem.out_channels == 3
    assert BayesUNet(width=128).full.out_channels == 32 and BayesUNet(width=3, depth=1).full.out_channels == 8
