"""The optimizer, against linear algebra and against torch's own Muon."""
import math

import pytest
import torch
from torch import nn

from diffusion_model import BayesUNet, UNet
from utils.muon import Muon, make_optimizers, orthogonalize, set_learning_rate


def matrices(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (2, 24, 24), (1, 8, 1152)])
def test_orthogonalize_evens_out_the_singular_values_and_keeps_the_directions(shape):
    x = matrices(*shape).double()
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    made = orthogonalize(x)
    assert made.shape == x.shape
    # U^T X' V is diagonal: the singular vectors are still those of x.
    inside = u.mT @ made @ vt.mT
    values = inside.diagonal(dim1=1, dim2=2)
    assert torch.allclose(inside, torch.diag_embed(values), atol=1e-8)
    # The polynomial, five times over, of each singular value; they are evened out unless one is next to nothing.
    small = s = s / s.square().sum(dim=1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    assert torch.allclose(values, s, atol=1e-8)
    assert ((values > 0.65) & (values < 1.25))[small > 0.01].all() and (small > 0.01).sum() > 7


def test_orthogonalize_does_not_see_the_size_of_a_matrix():
    x = matrices(2, 8, 12)
    assert torch.allclose(orthogonalize(1e-4 * x), orthogonalize(1e4 * x), atol=1e-4)
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def test_orthogonalize_is_stable_in_float32():
    """Singular values over six decades, whose squares no float32 tells from 0 beside the largest."""
    u, _, vt = torch.linalg.svd(matrices(2, 128, 1152).double(), full_matrices=False)
    x = u * torch.logspace(0, -6, 128, dtype=torch.float64) @ vt
    made, expected = orthogonalize(x.float()), orthogonalize(x)
    assert (made - expected).norm() < 2e-3 * expected.norm()
    assert torch.linalg.matrix_norm(made, 2).max() < 1.25


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has a Muon of its own from 2.9 on")
@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_steps_are_those_of_torch(shape):
    """Its orthogonalisation is in bfloat16, of 8 bits: steps agree to some 3 % of their size."""
    start, target = matrices(*shape), matrices(*shape, seed=1)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = [Muon([ours], **settings),
                  torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)]
    for step in range(6):
        for p, optimizer in zip((ours, theirs), optimizers):
            before = p.detach().clone()
            optimizer.zero_grad()
            (p - target).abs().sum().backward() if step % 2 else (p - target).square().sum().backward()
            optimizer.step()
        size = (theirs.detach() - before).norm()
        assert (ours - theirs).norm() < 0.03 * (step + 1) * size, step
    assert (theirs - start).norm() > 0.1


def test_a_convolution_is_a_matrix_of_its_outputs():
    """The same step, whether the weights are [O, I, h, w] in either memory format or one matrix [O, I h w]."""
    start, gradient = matrices(8, 4, 3, 3), matrices(8, 4, 3, 3, seed=1)
    weights = [torch.nn.Parameter(x) for x in
               (start.clone(), start.clone().contiguous(memory_format=torch.channels_last), start.flatten(1).clone())]
    for weight in weights:
        weight.grad = gradient.view(weight.shape).clone()
    Muon(weights, lr=0.1).step()
    assert torch.allclose(weights[0], weights[1], atol=1e-6)
    assert torch.allclose(weights[0].flatten(1), weights[2], atol=1e-6)
    assert not torch.allclose(weights[0], start, atol=1e-3)


def test_steps_are_as_large_as_those_of_adamw():
    """Root mean square 0.2 lr, whatever the shape and however large the gradient."""
    weights = [torch.nn.Parameter(matrices(*shape)) for shape in [(64, 16, 3, 3), (16, 64), (32, 32)]]
    before = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.grad = 1e-3 * matrices(*weight.shape, seed=1)
    Muon(weights, lr=0.1).step()
    for weight, old in zip(weights, before):
        # A matrix with k singular values of 1 has a mean square of k / (R C) = 1 / longer side.
        assert (weight - old).square().mean().sqrt().item() == pytest.approx(0.02, rel=0.25)


def test_matrices_do_not_mix():
    """Each has the step it would have alone, though those of one shape are made orthogonal together."""
    weights = [torch.nn.Parameter(matrices(8, 12, seed=i)) for i in range(3)]
    alone = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    for i, pair in enumerate(zip(weights, alone)):
        for weight in pair:
            weight.grad = matrices(8, 12, seed=10 + i)
    Muon(weights, lr=0.1).step()
    for weight, other in zip(weights, alone):
        Muon([other], lr=0.1).step()
        assert torch.allclose(weight, other, atol=1e-6)


def test_without_a_gradient_nothing_moves():
    weight = torch.nn.Parameter(matrices(4, 4))
    optimizer = Muon([weight], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(weight, matrices(4, 4)) and not optimizer.state_dict()["state"]


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"\[5\]"):
        Muon([torch.nn.Parameter(torch.zeros(5))], lr=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# The optimizers of a run

NETWORKS = {
    "a UNet": lambda: UNet(width=8, depth=1), "a UNet and Bayes' rule": lambda: BayesUNet(width=8, depth=1),
    "no ends": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(4, 4)),
    "matrices only": lambda: nn.Conv2d(1, 1, 3, padding=1, bias=False),
    "no matrices": lambda: nn.BatchNorm2d(4),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_weight_has_one_optimizer(network, optimizer):
    """Muon takes the matrices, but for the layers that a network names; AdamW the rest. All get the settings."""
    network = network()
    optimizers = make_optimizers(network, {"optimizer": optimizer, "lr": 0.3, "weight_decay": 0.02})
    of = {id(p): type(each) for each in optimizers for group in each.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for each in optimizers for group in each.param_groups) == len(of)
    for name, p in network.named_parameters():
        named = {"stem", "out", "time", "label", "mixing"}
        named |= {"pixel", "scale_shift", "shares"} if hasattr(network, "pixel") else set()
        muon = optimizer == "muon" and p.ndim > 1 and named.isdisjoint(name.split("."))
        assert of.pop(id(p)) is (Muon if muon else torch.optim.AdamW), name
    assert not of
    for group in (group for each in optimizers for group in each.param_groups):
        assert group["lr"] == 0.3 and group["weight_decay"] == 0.02


def test_each_group_warms_up_and_falls_to_0_from_its_own_peak():
    """In any optimizer, however often it is asked."""
    peaks = 0.1, 0.02, 0.005
    weights = [nn.Parameter(matrices(4, 4)) for _ in peaks]
    optimizers = [torch.optim.SGD([{"params": weights[0]}, {"params": weights[1], "lr": peaks[1]}], lr=peaks[0]),
                  Muon(weights[2:], lr=peaks[2])]
    for step, share in [(0, 0.0), (0, 0.0), (3, 0.1), (9, 0.25), (500, 0.5), (999, 1.0)]:
        lr = set_learning_rate(optimizers, {"warmup": 10}, step, share)
        wanted = [peak * min(1, (step + 1) / 10) * (1 + math.cos(math.pi * share)) / 2 for peak in peaks]
        assert [group["lr"] for each in optimizers for group in each.param_groups] == pytest.approx(wanted, abs=1e-12)
        assert lr == pytest.approx(wanted[0], abs=1e-12)
    assert set_learning_rate(optimizers, {"warmup": 0}, 0, 0.0) == peaks[0]


def test_muon_forgets_as_fast_as_measured():
    """EXPERIMENTS.md, Optimizer; and the rate is told as a number, even if an optimizer has it as a tensor."""
    weight = torch.nn.Parameter(torch.eye(3))
    assert Muon([weight], lr=0.1).param_groups[0]["momentum"] == 0.9
    rate = set_learning_rate([torch.optim.Adam([weight], lr=torch.tensor(0.5))], {"warmup": 0}, 0, 0.0)
    assert type(rate) is float and rate == 0.5
