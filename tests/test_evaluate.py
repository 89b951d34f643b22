"""The ruler: against closed forms, against the formulas written out naively, and on digits that were tampered with.

No number here was copied from what evaluate.py printed: they come from algebra, from counting, or from scipy.
"""
import itertools
import json
import math
import os
import sys
import types
import zipfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
from checkpoint import build_network, save_checkpoint
from cli import run
from data import load_dataset
from tiny import DEVICE

SETTINGS = {"schedule": "linear", "timesteps": 12, "image_size": 28, "image_channels": 1, "classes": 10, "width": 8,
            "depth": 1, "dataset": "MNIST", "class_shares": [0.1] * 10}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian_features(mean, covariance, n=400, seed=0):
    """Features [n, D] whose sample mean and covariance are these, exactly."""
    x = torch.randn(n, len(mean), dtype=torch.float64, generator=seeded(seed))
    x = x - x.mean(dim=0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T              # covariance I
    values, vectors = torch.linalg.eigh(covariance)
    return x @ (vectors * values.clamp(min=0).sqrt()).T + mean


@pytest.fixture(scope="module")
def mnist():
    """A few thousand real digits: train and test images, with labels, in random order."""
    sets = {}
    for name, train, n in ("train", True, 4000), ("test", False, 2000):
        images, labels = load_dataset("MNIST", train=train)
        order = torch.randperm(len(images), generator=seeded(1))[:n]
        sets[name] = images[order], labels[order]
    return sets


@pytest.fixture(scope="module")
def classifier():
    return evaluate.load_classifier()


@pytest.fixture(scope="module")
def seen(mnist, classifier):
    def see(images, labels=None):
        return evaluate.Digits(images, labels, *evaluate.classify(classifier, images))
    return see


@pytest.fixture(scope="module")
def test_digits(mnist, seen):
    return seen(*mnist["test"])


@pytest.fixture
def small_world(mnist, monkeypatch, tmp_path):
    """evaluate.py among a few hundred digits, with a short two-sample test, in a folder of its own."""
    few = {True: [x[:1500] for x in mnist["train"]], False: [x[:800] for x in mnist["test"]]}
    monkeypatch.setattr(evaluate, "load_dataset", lambda name, train=True: tuple(few[train]))
    real_fit = evaluate.fit
    monkeypatch.setattr(evaluate, "fit", lambda *args, epochs, **kwargs: real_fit(*args, epochs=1, **kwargs))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(monkeypatch, *arguments):
    """Runs python evaluate.py in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    try:
        run(evaluate.main)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture
def tiny_checkpoint(tmp_path):
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "tiny.pt", {"settings": SETTINGS, "ema": build_network(SETTINGS).state_dict()})
    return tmp_path / "tiny.pt"


# ----------------------------------------------------------------------------------------------------------------------
# The classifier

def test_classifier_reads_the_test_digits(classifier):
    images, labels = load_dataset("MNIST", train=False)
    features, probabilities = evaluate.classify(classifier, images)
    assert features.shape == (10_000, 128) and features.dtype == torch.float64
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(10_000), atol=1e-5) and probabilities.min() >= 0
    assert (probabilities.argmax(dim=1) == labels).double().mean() >= 0.995


def test_what_the_classifier_says_are_probabilities(mnist, classifier):
    features, probabilities = evaluate.classify(classifier, mnist["test"][0][:3])
    assert len(features) == 3 and (probabilities >= 0).all()
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(3).to(probabilities.dtype), atol=1e-5)
    assert probabilities.argmax(dim=1).tolist() == mnist["test"][1][:3].tolist()


def test_classifier_does_not_depend_on_the_chunk(mnist, classifier):
    images = mnist["test"][0][:30]
    one, many = (evaluate.classify(classifier, images, chunk)[0] for chunk in (30, 7))
    assert torch.allclose(one, many, atol=1e-5)


def test_another_classifier_is_refused(tmp_path):
    content = bytearray(evaluate.CLASSIFIER.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "classifier.pt").write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256"):
        evaluate.load_classifier(path=tmp_path / "classifier.pt")
    assert evaluate.CLASSIFIER.stat().st_size < 1 << 20


def test_train_classifier_writes_one_that_loads(small_world, monkeypatch, capsys):
    before = evaluate.CLASSIFIER.read_bytes()
    assert command(monkeypatch, "--train-classifier", "new.pt") == 0
    checksum = capsys.readouterr().out.split("SHA-256 ")[1].split()[0]
    evaluate.load_classifier(path="new.pt", checksum=checksum)
    assert evaluate.CLASSIFIER.read_bytes() == before


def test_fit_follows_the_gradient_of_each_batch_at_a_rate_that_falls_to_0(monkeypatch):
    """The gradient, of what the augmentation makes of the images, is computed again before each step."""
    images = torch.randint(0, 256, (20, 1, 28, 28), dtype=torch.uint8, generator=seeded())
    net, labels, rates = evaluate.DigitNet(2, 10).double(), torch.arange(20) % 10, []

    class Checked(torch.optim.SGD):
        def step(self):
            loss = F.cross_entropy(net(-evaluate.to_float(images).double())[1], labels)
            for p, expected in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters()))):
                torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5)
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(torch.optim, "SGD", Checked)
    evaluate.fit(net, images, labels, epochs=20, batch_size=20, lr=0.1, generator=seeded(),
                 change=lambda x, generator: -x.double())
    assert len(rates) == 20 and max(rates) == pytest.approx(0.1) and rates[0] < 0.01 and rates[-1] < 0.001
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_each_epoch_has_every_image_once_in_an_order_of_its_own():
    images, seen = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 1, 28, 28), []
    evaluate.fit(evaluate.DigitNet(2, 10), images, torch.arange(12) % 10, epochs=3, batch_size=4, lr=0.0,
                 generator=seeded(), change=lambda x, generator: seen.extend(x[:, 0, 0, 0].tolist()) or x)
    epochs = [seen[start:start + 12] for start in (0, 12, 24)]
    in_order = sorted(epochs[0])
    assert len(set(in_order)) == 12 and all(sorted(epoch) == in_order for epoch in epochs)
    assert in_order not in epochs and epochs[0] != epochs[1] != epochs[2]


def test_augmentation_moves_turns_and_scales_and_lets_in_black(monkeypatch):
    white, digit = torch.ones(1, 1, 28, 28), torch.rand(1, 1, 28, 28, generator=seeded())
    turned = evaluate.random_affine(digit.expand(2, -1, -1, -1), seeded())
    assert (turned[0] - turned[1]).abs().max() > 0.1                               # each at random, by itself
    drawn = torch.full((6, 1), 0.5)
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: drawn)
    torch.testing.assert_close(evaluate.random_affine(digit, None), digit, atol=1e-5, rtol=0)
    drawn[4] = 1                                                                   # two pixels to the left
    torch.testing.assert_close(evaluate.random_affine(digit, None)[..., :-2], digit[..., 2:], atol=1e-4, rtol=0)
    assert (evaluate.random_affine(white, None)[..., -2:] < -0.999).all()


# ----------------------------------------------------------------------------------------------------------------------
# Frechet and kernel distance

def test_frechet_of_gaussians_that_commute():
    zero, mean = torch.zeros(3).double(), torch.tensor([1.0, -2, 0.5]).double()
    a = gaussian_features(zero, torch.tensor([1.0, 4, 9]).double().diag())
    b = gaussian_features(mean, torch.tensor([4.0, 1, 0.25]).double().diag(), seed=1)
    # |mean|^2 + sum of (s_a - s_b)^2 = 5.25 + (1-2)^2 + (2-1)^2 + (3-0.5)^2
    assert evaluate.frechet_distance(a, b) == pytest.approx(5.25 + 1 + 1 + 6.25, abs=1e-9)


def test_frechet_of_gaussians_that_do_not_commute():
    a = torch.tensor([[2.0, 1.2], [1.2, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.7], [-0.7, 3.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    # for 2x2 matrices tr M^(1/2) = sqrt(tr M + 2 sqrt(det M))
    root = math.sqrt((a @ b).trace().item() + 2 * math.sqrt((torch.det(a) * torch.det(b)).item()))
    d = evaluate.frechet_distance(gaussian_features(zero, a), gaussian_features(zero, b, seed=1))
    assert d == pytest.approx(3 + 4 - 2 * root, abs=1e-9)


def test_frechet_where_covariances_are_singular():
    # Two rank-one Gaussians, along u and v: tr (uu'vv')^(1/2) = |u . v|
    u, v = torch.tensor([3.0, 4, 0, 0]).double(), torch.tensor([0, 2.0, 0, 1]).double()
    zero = torch.zeros(4, dtype=torch.float64)
    a, b = gaussian_features(zero, u.outer(u)), gaussian_features(zero, v.outer(v), seed=1)
    assert evaluate.frechet_distance(a, b) == pytest.approx(25 + 5 - 2 * 8, abs=1e-6)


def test_frechet_of_fewer_digits_than_features(test_digits):
    few, others = test_digits.features[:60], test_digits.features[60:120]          # rank 59 of 128
    assert evaluate.frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert evaluate.frechet_distance(few, few + 1) == pytest.approx(128, abs=1e-6)
    assert 0 < evaluate.frechet_distance(few, others) == pytest.approx(evaluate.frechet_distance(others, few))


def test_frechet_agrees_with_scipy_on_digits(test_digits, seen, mnist):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = test_digits.features[:500], seen(mnist["train"][0][:300]).features
    product = torch.cov(a.T).numpy() @ torch.cov(b.T).numpy()
    expected = ((a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace()).item() \
        - 2 * np.trace(linalg.sqrtm(product)).real
    assert evaluate.frechet_distance(a, b) == pytest.approx(expected, abs=1e-6)


def test_groups_are_drawn_at_random():
    groups = evaluate.shuffled_groups(torch.arange(1005), 0)
    assert len(groups) == evaluate.GROUPS and {len(group) for group in groups} == {50, 51}
    assert torch.equal(torch.cat(groups).sort().values, torch.arange(1005))
    # the mean of 50 out of 1005 numbers has a standard deviation of 40
    assert all(abs(group.double().mean() - 502) < 5 * 40 for group in groups)


def test_jackknife_of_a_mean_is_its_standard_error():
    """There it is exact: s / sqrt(G), with s^2 the sum of squares over G - 1."""
    x = torch.randn(evaluate.GROUPS, dtype=torch.float64, generator=seeded())
    error = evaluate.jackknife(lambda keep: x[keep].mean().item())
    assert error == pytest.approx(x.std().item() / math.sqrt(evaluate.GROUPS))


def test_squared_distances_are_never_negative():
    x = 1000 + torch.randn(50, 3, dtype=torch.float64, generator=seeded())
    d = evaluate.squared_distances(x, x)
    assert d.min() >= 0 and torch.allclose(d, torch.cdist(x, x) ** 2, atol=1e-6)


def test_frechet_spread_is_that_of_repetitions():
    sets = [torch.randn(200, 4, dtype=torch.float64, generator=seeded(k)) * 1.2 + 0.7 for k in range(101)]
    scatter = np.std([evaluate.frechet_distance(x, sets[0]) for x in sets[1:]])
    claimed = np.mean([evaluate.frechet_spread(x, sets[0]) for x in sets[1:21]])
    assert 0.8 < claimed / scatter < 1.5


def test_kernel_distance_is_the_formula():
    a, b = (torch.randn(n, 3, dtype=torch.float64, generator=seeded(n)) for n in (43, 30))

    def kernel(x, y):
        return (sum(p * q for p, q in zip(x, y)) / 3 + 1) ** 3

    a_, b_ = a.tolist(), b.tolist()
    expected = (sum(kernel(x, y) for i, x in enumerate(a_) for j, y in enumerate(a_) if i != j) / (43 * 42)
                + sum(kernel(x, y) for i, x in enumerate(b_) for j, y in enumerate(b_) if i != j) / (30 * 29)
                - 2 * sum(kernel(x, y) for x in a_ for y in b_) / (43 * 30))
    assert evaluate.kernel_distance(a, b)[0] == pytest.approx(expected, abs=1e-12)


def test_kernel_distance_is_unbiased_and_its_error_honest():
    runs = np.array([evaluate.kernel_distance(*(torch.randn(100, 4, dtype=torch.float64, generator=seeded(2 * k + i))
                                                + 0.4 * i for i in (0, 1))) for k in range(60)])
    distances, errors = runs.T
    assert 0.75 < errors.mean() / distances.std() < 1.5
    same = [evaluate.kernel_distance(*(torch.randn(60, 4, dtype=torch.float64, generator=seeded(900 + 2 * k + i))
                                       for i in (0, 1)))[0] for k in range(60)]
    assert abs(np.mean(same)) < 4 * np.std(same) / math.sqrt(60) and min(same) < 0


# ----------------------------------------------------------------------------------------------------------------------
# Precision, recall, density, coverage

def test_manifold_figures_are_the_formulas():
    real, fake = (torch.randn(60, 2, dtype=torch.float64, generator=seeded(s)) * (1 + s / 5) + 2 * s for s in (0, 1))

    def reach(points, i, k):
        return sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]

    r, f = real.tolist(), fake.tolist()
    reach3, reach5, reach3_fake = ([reach(p, i, k) for i in range(60)] for p, k in ((r, 3), (r, 5), (f, 3)))
    expected = {
        "precision": sum(any(math.dist(y, x) <= d for x, d in zip(r, reach3)) for y in f) / 60,
        "recall": sum(any(math.dist(x, y) <= d for y, d in zip(f, reach3_fake)) for x in r) / 60,
        "density": sum(math.dist(y, x) <= d for y in f for x, d in zip(r, reach5)) / (5 * 60),
        "coverage": sum(any(math.dist(y, x) <= d for y in f) for x, d in zip(r, reach5)) / 60}
    assert 0 < expected["precision"] < expected["recall"] < 1  # the case tells the figures apart
    for chunk in (7, 100):
        assert evaluate.manifold_figures(real, fake, chunk) == pytest.approx(expected)
        assert evaluate.manifold_figures(real, fake, real_reach=evaluate._reach(real)) == pytest.approx(expected)


def test_manifold_figures_of_known_sets():
    cluster = torch.randn(50, 3, dtype=torch.float64, generator=seeded(3))
    real = torch.cat([cluster, cluster + 100])                                     # two modes
    one_mode = torch.cat([cluster, cluster + 0.01])                                # the second is never sampled
    figures = evaluate.manifold_figures(real, one_mode)
    assert (figures["precision"], figures["recall"], figures["coverage"]) == (1, 0.5, 0.5)
    assert set(evaluate.manifold_figures(real, real + 1000).values()) == {0}
    # A real digit reaches 5 others and itself, so that each is reached by 6 on average. (Rounding decides about the
    # fifth, which lies just on the edge.)
    assert evaluate.manifold_figures(real, real) == pytest.approx(
        {"precision": 1, "recall": 1, "density": 6 / 5, "coverage": 1}, abs=0.01)


def test_as_many_test_digits_as_samples(test_digits, seen, mnist):
    """Precision and the like compare sets of one size, whichever is the larger."""
    many = seen(mnist["train"][0][:300])
    few = test_digits._replace(features=test_digits.features[:200])
    for samples, test in (many, few), (few, many):
        figures = evaluate.distribution_figures(samples, test, 0)
        expected = evaluate.manifold_figures(test.features[:200], samples.features[:200])
        assert figures == figures | expected


def test_the_floor_is_of_sets_at_random_that_share_nothing():
    for available, n, sets in (1000, 300, 3), (1000, 100, 5), (1000, 1000, 1):
        labels = torch.randint(0, 10, (available,), generator=seeded(3))
        draws = evaluate.floor_draws(labels, n, 0)
        drawn = torch.cat(draws)
        assert len(draws) == sets and len(drawn.unique()) == len(drawn) == sets * n and drawn.max() < available
        assert not torch.equal(drawn, drawn.sort().values)
        other = evaluate.floor_draws(labels, n, 1)[0]
        assert not torch.equal(draws[0], other) and (n == 1000 or not torch.equal(draws[0].sort()[0], other.sort()[0]))


def test_the_floor_has_the_classes_in_their_shares_and_in_no_order():
    labels = torch.tensor([0] * 600 + [1] * 300 + [7] * 100)
    for n in 10, 100, 333:
        for draw in evaluate.floor_draws(labels, n, 0):
            counts = torch.bincount(labels[draw], minlength=8)[[0, 1, 7]]
            assert ((counts - n * torch.tensor([0.6, 0.3, 0.1])).abs() <= 1).all()
    tens = labels[evaluate.floor_draws(labels, 330, 0)[0]].unfold(0, 10, 10)
    assert max((ten == 0).sum() for ten in tens) >= 8  # 6 in each, if it were in the order in which they are lined up


# ----------------------------------------------------------------------------------------------------------------------
# Classes, pixels, neighbours, the two-sample test

def test_class_figures_by_counting():
    probabilities = torch.full((4, 10), 0.01)
    for i, (digit, p) in enumerate([(3, 0.95), (3, 0.91), (7, 0.89), (7, 0.99)]):
        probabilities[i, digit] = p
    figures = evaluate.class_figures(evaluate.Digits(None, torch.tensor([3, 7, 7, 7]), None, probabilities))
    assert figures == pytest.approx({"class_entropy": math.log10(2), "confident": 0.75, "label_agreement": 0.75})
    alone = evaluate.class_figures(evaluate.Digits(None, None, None, probabilities[:1]))
    assert alone["class_entropy"] == 0 and alone["label_agreement"] is None


def test_pixel_figures_by_counting():
    image = torch.tensor([0, 0, 0, 0, 1, 12, 13, 255], dtype=torch.uint8).view(1, 1, 2, 4)
    reference = torch.tensor([0, 0, 0, 0, 0, 0, 0, 255], dtype=torch.uint8).view(1, 1, 2, 4)
    assert evaluate.pixel_figures(image, reference) == {"zeros": 0.5, "faint": 0.25, "grey_distance": 3 / 8}


def test_nearest_neighbours_by_brute_force(mnist):
    queries, pool = mnist["test"][0][:40], mnist["train"][0][:300]
    pool = torch.cat([pool, queries[7:8]])
    distances, indices = evaluate.nearest_neighbours(queries, pool, chunk=16)
    all_pairs = torch.cdist(queries.flatten(1).double() / 255, pool.flatten(1).double() / 255,
                            compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(indices, all_pairs.argmin(dim=1))
    assert torch.allclose(distances, all_pairs.amin(dim=1)) and distances[7] == 0 and indices[7] == 300


def test_memorisation_figures():
    distances, test_distances = torch.tensor([0.0, 1, 2, 5]).double(), torch.tensor([0.5, 1.5]).double()
    figures = evaluate.memorisation_figures(distances, test_distances)
    assert figures["nearest_neighbour_ratio"] == 2 and figures["copied"] == 0.25
    # relative variances of the means: 3.5 / 4 / 2^2 and 0.25 / 2 / 1^2
    assert figures["nearest_neighbour_ratio_stderr"] == pytest.approx(2 * math.sqrt(3.5 / 16 + 0.25 / 2))


def test_wilson_interval():
    # Wilson 1927 for 8 of 10: (0.490, 0.943); at the ends it stays between 0 and 1
    assert evaluate.wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert evaluate.wilson_interval(50, 50)[1] == 1 and evaluate.wilson_interval(0, 50)[0] == 0


def test_two_sample_test_sees_what_an_eye_does_not(mnist):
    real, test = mnist["train"][0][:400], mnist["test"][0][:400]
    faint = torch.where(real == 0, torch.randint(0, 3, real.shape, generator=seeded()).to(torch.uint8), real)
    fair = evaluate.two_sample_figures(real, test, epochs=3)
    assert fair["two_sample_accuracy_low"] < 0.5 < fair["two_sample_accuracy_high"]
    assert evaluate.two_sample_figures(faint, test, epochs=3)["two_sample_accuracy"] > 0.95


def test_the_two_sample_test_is_on_images_that_it_was_not_trained_on(mnist, monkeypatch):
    seen, classify = [], evaluate.classify
    monkeypatch.setattr(evaluate, "fit", lambda net, images, *args, **kwargs: seen.append(images) or net.eval())
    monkeypatch.setattr(evaluate, "classify", lambda net, images: seen.append(images) or classify(net, images))
    with torch.no_grad():
        evaluate.two_sample_figures(mnist["train"][0][:20], mnist["test"][0][:20])
    assert len(torch.cat(seen)) == len(torch.cat(seen).flatten(1).unique(dim=0)) == 40


def test_the_two_sample_test_follows_from_the_seed_alone(mnist, monkeypatch):
    """Untrained here: its network, and which images are held out. The global generator is left as it was."""
    monkeypatch.setattr(evaluate, "fit", lambda net, *args, **kwargs: net.eval().requires_grad_(False))
    nets, classify = [], evaluate.classify
    monkeypatch.setattr(evaluate, "classify", lambda net, images: nets.append((net, images)) or classify(net, images))
    for seed in 0, 0, 1:
        torch.rand(1)
        state = torch.get_rng_state()
        evaluate.two_sample_figures(mnist["train"][0][:40], mnist["test"][0][:30], seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
    (one, held_out), (again, held_out_again), (other, _) = nets
    assert torch.equal(held_out, held_out_again) and len(held_out) == 2 * 15       # half of as many of each
    assert torch.equal(one.head.weight, again.head.weight) and not torch.equal(one.head.weight, other.head.weight)


# ----------------------------------------------------------------------------------------------------------------------
# Digits that were tampered with move the figures that should see it

@pytest.fixture(scope="module")
def honest(mnist, seen, test_digits):
    """The figures of 1,000 training digits."""
    real = seen(mnist["train"][0][:1000], mnist["train"][1][:1000])
    return evaluate.distribution_figures(real, test_digits, 0) | evaluate.class_figures(real)


def figures_of(images, labels, seen, test_digits):
    digits = seen(images, labels)
    return evaluate.distribution_figures(digits, test_digits, 0) | evaluate.class_figures(digits)


def blur(x):
    return F.avg_pool2d(x.float(), 3, stride=1, padding=1).round().to(torch.uint8)


def noisy(x):
    return (x + 60 * torch.randn(x.shape, generator=seeded())).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("tamper", [lambda x: x.roll(4, dims=3), blur, noisy, lambda x: x.flip(3)],
                         ids=["shift", "blur", "noise", "flip"])
def test_tampering_moves_the_distances(tamper, mnist, seen, test_digits, honest):
    images, labels = (x[:1000] for x in mnist["train"])
    figures = figures_of(tamper(images), labels, seen, test_digits)
    assert figures["frechet"] > 5 * honest["frechet"]
    assert figures["kid"] > 4 * honest["kid_stderr"]
    assert figures["precision"] < honest["precision"] - 0.05
    assert figures["coverage"] < honest["coverage"] - 0.05


def test_flipped_digits_are_misread_and_shifted_ones_lie_far_from_the_training_digits(mnist, seen, test_digits):
    images, labels = (x[:300] for x in mnist["test"])
    assert evaluate.class_figures(seen(images, labels))["label_agreement"] > 0.98
    assert evaluate.class_figures(seen(images.flip(3), labels))["label_agreement"] < 0.8
    near, far = (evaluate.nearest_neighbours(x, mnist["train"][0])[0] for x in (images, images.roll(4, dims=3)))
    assert evaluate.memorisation_figures(far, near)["nearest_neighbour_ratio"] > 1.2


def test_a_dropped_mode_costs_recall_and_not_precision(mnist, seen, test_digits, honest):
    images, labels = mnist["train"]
    keep = labels < 5
    figures = figures_of(images[keep][:1000], labels[keep][:1000], seen, test_digits)
    assert figures["precision"] > honest["precision"] - 0.05
    assert figures["recall"] < 0.65 and figures["coverage"] < 0.6
    assert figures["frechet"] > 20 * honest["frechet"]
    assert figures["class_entropy"] == pytest.approx(math.log10(5), abs=0.02)


def test_copies_are_caught_by_the_memorisation_figures_alone(mnist, honest):
    train, test = mnist["train"][0], mnist["test"][0][:300]
    test_distances, _ = evaluate.nearest_neighbours(test, train)
    copies, _ = evaluate.nearest_neighbours(train[:300], train)
    slightly, _ = evaluate.nearest_neighbours((train[:300].int() - 3).clamp(0).to(torch.uint8), train)
    fresh, _ = evaluate.nearest_neighbours(mnist["test"][0][300:600], train)
    assert honest["frechet"] < 0.3  # of 1,000 copies of training digits: nothing wrong with them there
    for distances in copies, slightly:
        figures = evaluate.memorisation_figures(distances, test_distances)
        assert figures["nearest_neighbour_ratio"] < 0.1 and figures["copied"] == 1
    figures = evaluate.memorisation_figures(fresh, test_distances)
    assert figures["nearest_neighbour_ratio"] == pytest.approx(1, abs=0.1) and figures["copied"] < 0.02


# ----------------------------------------------------------------------------------------------------------------------
# Bits per dimension

def harmonic_model(T):
    """A model whose bound is known: L_t = 1 / (t + 1) bits, plus what the noise adds (0 on average), prior 0.25."""
    ddpm = types.SimpleNamespace(
        T=T, prior_bits=lambda x0: torch.full((len(x0),), 0.25),
        bound_term=lambda model, x0, t, noise: 1 / (t + 1) + 0.01 * noise.flatten(1).mean(dim=1))
    return types.SimpleNamespace(ddpm=ddpm, network=torch.nn.Linear(1, 1), denoiser=None)


def test_exact_bits_are_the_sum_over_all_timesteps(mnist):
    figures = evaluate.bits_figures(harmonic_model(50), mnist["test"][0][:300], exact=True)
    harmonic = sum(1 / t for t in range(1, 51))
    assert figures["bits_per_dim"] == pytest.approx(0.25 + harmonic, abs=2e-3)
    assert figures["bits_decoder"] == pytest.approx(1, abs=1e-3) and figures["bits_prior"] == 0.25
    assert figures["bits_diffusion"] == pytest.approx(harmonic - 1, abs=2e-3)


@pytest.mark.parametrize("T", [1, 2, 37, 1000])
def test_estimated_bits_are_unbiased_and_their_error_honest(T, mnist):
    expected = 0.25 + sum(1 / t for t in range(1, T + 1))
    runs = [evaluate.bits_figures(harmonic_model(T), mnist["test"][0][:100], seed=s) for s in range(30)]
    values = np.array([r["bits_per_dim"] for r in runs])
    error = np.mean([r["bits_per_dim_stderr"] for r in runs])
    assert abs(values.mean() - expected) < 4 * error / math.sqrt(30)
    assert 0.6 < values.std(ddof=1) / error < 1.6


def test_estimated_bits_follow_from_the_seed(mnist):
    def bits(seed):
        return evaluate.bits_figures(harmonic_model(1000), mnist["test"][0][:20], seed=seed)

    assert bits(3) == bits(3) != bits(4)


def test_exact_bits_agree_with_ddpm(mnist, tiny_checkpoint):
    model = evaluate.load_model(tiny_checkpoint)
    images = mnist["test"][0][:60]
    figures = evaluate.bits_figures(model, images, exact=True)
    expected = model.ddpm.bits_per_dim(model.denoiser, evaluate.to_float(images))["total"].mean().item()
    assert figures["bits_per_dim"] == pytest.approx(expected, rel=0.02)  # each draws noise of its own


# ----------------------------------------------------------------------------------------------------------------------
# The files read

def save_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


GOOD = np.zeros((3, 28, 28), np.uint8)
BAD = {
    "no images": ({"pictures": GOOD}, "no array"),
    "floats": ({"images": GOOD.astype(np.float32)}, "float32"),
    "nan": ({"images": np.full((3, 28, 28), np.nan)}, "NaN"),
    "int64": ({"images": GOOD.astype(np.int64)}, "int64"),
    "objects": ({"images": np.array([{}, None], dtype=object)}, "damaged"),
    "another size": ({"images": np.zeros((3, 32, 32), np.uint8)}, "shape"),
    "three channels": ({"images": np.zeros((3, 3, 28, 28), np.uint8)}, "shape"),
    "one flat image": ({"images": GOOD[0]}, "shape"),
    "empty": ({"images": GOOD[:0]}, "no image"),
    "too few labels": ({"images": GOOD, "labels": np.zeros(2, np.int64)}, "labels"),
    "labels of floats": ({"images": GOOD, "labels": np.zeros(3)}, "labels"),
    "one-hot labels": ({"images": GOOD, "labels": np.zeros((3, 10), np.int64)}, "labels"),
    "labels out of range": ({"images": GOOD, "labels": np.array([0, 1, 10])}, "0 to 9"),
}


@pytest.mark.parametrize("arrays, words", BAD.values(), ids=BAD)
def test_unsound_arrays_are_refused_in_one_line(arrays, words, small_world, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "--npz", save_npz(tmp_path / "bad.npz", **arrays)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and "bad.npz" in error


def test_unsound_files_are_refused_in_one_line(small_world, tmp_path, monkeypatch, capsys):
    sound = save_npz(tmp_path / "sound.npz", images=np.random.default_rng(0).integers(0, 256, (9, 28, 28), np.uint8))
    content = bytearray(sound.read_bytes())
    (tmp_path / "truncated.npz").write_bytes(content[:len(content) // 2])
    content[3000] ^= 255                                                           # a pixel: the checksum fails
    (tmp_path / "flipped.npz").write_bytes(content)
    (tmp_path / "text.npz").write_text("not an archive")
    np.save(tmp_path / "array.npy", GOOD)
    # 784 GB by its header, of which 1 KB is there
    header = io_header((10**9, 28, 28))
    with zipfile.ZipFile(tmp_path / "liar.npz", "w") as archive:
        archive.writestr("images.npy", header + bytes(1000))
    # 2 GB that are there, packed into 2 MB
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("images.npy", "w") as file:
            file.write(io_header((1_300_000, 28, 28)))
            for _ in range(1300):
                file.write(bytes(784_000))
    for name in "truncated.npz", "flipped.npz", "text.npz", "array.npy", "liar.npz", "bomb.npz", "missing.npz", ".":
        assert command(monkeypatch, "--npz", tmp_path / name) == 1, name
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(tmp_path / name) in error, name


def test_what_is_no_file_is_not_read():
    with pytest.raises(ValueError, match="is not a file"):
        evaluate.read_npz(DEVICE)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressions_that_numpy_does_not_use_are_refused(compression, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("images.npy", io_header(GOOD.shape) + GOOD.tobytes())
    with pytest.raises(ValueError, match="compression"):
        evaluate.read_npz(tmp_path / "a.npz")


def test_a_header_longer_than_its_array_is_refused_before_memory_is_taken(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", io_header((500_000, 28, 28)) + bytes(1000))
    with pytest.raises(ValueError, match="shorter than the shape"):
        evaluate.read_npz(tmp_path / "a.npz")


def io_header(shape):
    """The first bytes of an .npy file of uint8 with this shape."""
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def test_both_shapes_and_absent_labels_are_read(tmp_path, mnist):
    images, labels = (x[:5] for x in mnist["test"])
    for stored in images, images.squeeze(1):
        file = save_npz(tmp_path / "a.npz", images=stored, labels=labels.to(torch.uint8))
        read, read_labels = evaluate.read_npz(file)
        assert torch.equal(read, images) and torch.equal(read_labels, labels)
    for extra in {}, {"labels": np.full(5, -1)}:                                   # -1: of a model without classes
        read, read_labels = evaluate.read_npz(save_npz(tmp_path / "a.npz", images=images, **extra))
        assert torch.equal(read, images) and read_labels is None


def test_pick_takes_the_same_images_in_whatever_order_they_come(mnist):
    images, labels = (x[:50] for x in mnist["train"])
    shuffled = torch.randperm(50, generator=seeded(5))
    one, other = evaluate.pick(images, labels, 20, 3), evaluate.pick(images[shuffled], labels[shuffled], 20, 3)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert len(one[0].flatten(1).unique(dim=0)) == 20
    assert not torch.equal(one[0], evaluate.pick(images, labels, 20, 4)[0])


# ----------------------------------------------------------------------------------------------------------------------
# The command

KEYS = {"n", "frechet", "frechet_floor", "frechet_ratio", "kid", "kid_stderr", "precision", "recall", "density",
        "coverage", "class_entropy", "confident", "label_agreement", "nearest_neighbour_ratio", "two_sample_accuracy",
        "zeros", "bits_per_dim", "bits_per_dim_stderr", "kid_floor", "precision_floor", "recall_floor", "density_floor",
        "coverage_floor", "class_entropy_floor", "confident_floor", "two_sample_accuracy_floor", "zeros_floor", "seed",
        "classifier_sha256", "sampler", "steps", "guidance", "guidance_from", "guidance_to"}


def test_npz_is_measured_whatever_its_order(small_world, mnist, monkeypatch, capsys):
    images, labels = (x[-300:] for x in mnist["train"])                            # none of the 1,500 of small_world
    shuffled = torch.randperm(300, generator=seeded(5))
    figures = []
    for name, order in ("a", torch.arange(300)), ("b", shuffled):
        save_npz(f"{name}.npz", images=images[order], labels=labels[order])
        assert command(monkeypatch, "--npz", f"{name}.npz", "--json", f"{name}.json", "--pairs", "out/pairs.png") == 0
        figures.append(json.loads((small_world / f"{name}.json").read_text()))
    assert figures[0] == figures[1]
    assert KEYS <= figures[0].keys() and figures[0]["n"] == 300
    nulls = {key for key in KEYS if figures[0][key] is None}
    assert nulls == {"bits_per_dim", "bits_per_dim_stderr", "sampler", "steps", "guidance", "guidance_from",
                     "guidance_to"}
    assert figures[0]["frechet_ratio"] == figures[0]["frechet"] / figures[0]["frechet_floor"]
    assert 0.2 < figures[0]["frechet_ratio"] < 5 < figures[0]["frechet_ratio_ceiling"]  # real digits, noise
    assert figures[0]["nearest_neighbour_ratio"] == pytest.approx(1, abs=0.1)
    # of standard normal noise, what rounds to 0 lies below -1 + 1/255
    assert figures[0]["zeros_ceiling"] == pytest.approx((1 + math.erf((-1 + 1 / 255) / math.sqrt(2))) / 2, abs=0.005)
    out = capsys.readouterr().out
    assert f"{figures[0]['zeros']:.4f}" in out and "n = 300: these figures" in out  # table, and a warning
    assert (small_world / "out/pairs.png").read_bytes().startswith(b"\x89PNG")


def test_too_few_samples_leave_figures_out_and_say_so(small_world, mnist, monkeypatch, capsys):
    save_npz("one.npz", images=mnist["train"][0][:1])
    assert command(monkeypatch, "--npz", "one.npz", "--json", "one.json") == 0
    figures = json.loads((small_world / "one.json").read_text())
    for key in "frechet", "frechet_floor", "kid", "precision", "coverage", "two_sample_accuracy", "label_agreement":
        assert figures[key] is None
    assert figures["class_entropy"] == 0 and figures["nearest_neighbour_ratio"] == 0  # one digit, a copy
    assert "left out" in capsys.readouterr().out


@pytest.mark.parametrize("figure, fewest", [("frechet", 256), ("kid", 100), ("precision", 100)])
def test_each_figure_has_a_number_of_samples_that_bears_it(figure, fewest, test_digits):
    for n in fewest - 1, fewest:
        samples = evaluate.Digits(*(x[-n:] for x in test_digits))
        figures = evaluate.distribution_figures(samples, test_digits, seed=0)
        assert (figures[figure] is None) == (n < fewest)


def test_what_is_compared_with_what(small_world, mnist, monkeypatch):
    """Samples, training digits and noise each with the test digits; neighbours are looked for among training digits."""
    sets = {"samples": mnist["train"][0][-300:], "train": mnist["train"][0][:1500], "test": mnist["test"][0][:800]}
    calls, arguments, results, figures_of_distributions = [], [], [], evaluate.distribution_figures

    def kind(x):
        image = getattr(x, "images", x)[0]
        return next((name for name, images in sets.items() if (images == image).flatten(1).all(dim=1).any()), "noise")

    def spied(name, function):
        def spy(a, b, *args, **kwargs):
            calls.append((name, kind(a), kind(b)))
            arguments.append((a, b))
            results.append(function(a, b, *args, **kwargs))
            return results[-1]
        return spy

    names = "distribution_figures", "pixel_figures", "nearest_neighbours", "two_sample_figures"
    for name in names:
        monkeypatch.setattr(evaluate, name, spied(name, getattr(evaluate, name)))
    figures, _ = evaluate.evaluate(sets["samples"], mnist["train"][1][-300:])
    distances, pixels, neighbours, two_sample = ([call[1:] for call in calls if call[0] == name] for name in names)
    assert distances == [("samples", "test"), ("noise", "test")] + 5 * [("train", "test")]
    assert pixels == [("samples", "test"), ("train", "test"), ("noise", "test")]
    assert neighbours == [("samples", "train"), ("test", "train")]
    assert two_sample == [("samples", "test"), ("train", "test")]
    assert results[0] == results[0] | figures_of_distributions(*arguments[0], 0)   # nothing is taken from another set
    floors = [result["frechet"] for call, result in zip(calls, results) if call[:2] == (names[0], "train")]
    assert len(set(floors)) == 5 and figures["frechet_floor"] == pytest.approx(np.mean(floors))
    assert figures["frechet_floor_stderr"] == pytest.approx(np.std(floors, ddof=1))
    assert figures["frechet_ratio_ceiling"] == pytest.approx(figures["frechet_ceiling"] / figures["frechet_floor"])
    # the floors of what needs no distribution: test digits, as many as there are samples
    test = arguments[0][1]
    expected = evaluate.class_figures(evaluate.Digits(*(of[:300] for of in test)))
    assert figures["confident_floor"] == expected["confident"] > 0.9
    assert figures["label_agreement_floor"] == expected["label_agreement"] > 0.98
    _, (of_test, _) = [result for call, result in zip(calls, results) if call[0] == names[2]]
    assert figures["nearest_neighbour_ratio_floor"] == (of_test[:300].mean() / of_test[300:].mean()).item()
    # but for the classes: those of training digits
    assert figures["class_entropy_floor"] == evaluate.class_figures(arguments[2][0])["class_entropy"]


def test_the_picture_shows_each_sample_beside_its_neighbour(small_world, mnist):
    train = mnist["train"][0][:1500]
    images = torch.cat([mnist["train"][0][-30:], train[700:702]])                  # two copies among 30 others
    evaluate.evaluate(images, pairs="pairs.png")
    picture = iio.imread("pairs.png")[::2, ::2]
    first, beside, second, its = (picture[2:30, 2 + 30 * k:30 + 30 * k] for k in range(4))
    assert (first == beside).all() and (second == its).all()
    assert {first.tobytes(), second.tobytes()} == {image.numpy().tobytes() for image in train[700:702]}


def test_the_table_has_a_column_for_each(capsys):
    figures = evaluate.merge({"frechet": 1.5, "frechet_stderr": 0.25, "copied": 0.0, "two_sample_accuracy": 0.5,
                              "two_sample_accuracy_low": 0.4, "two_sample_accuracy_high": 0.6, "kid": 0.00123},
                             {"frechet": 0.5, "frechet_stderr": 0.125}, {"frechet": 40.0})
    evaluate.print_table(figures)
    header, *lines = capsys.readouterr().out.splitlines()
    ends = [header.index(name) + len(name) for name in ("samples", "real digits", "noise")]
    starts = [max(len(name) for _, name, _ in evaluate.ROWS), *ends]
    cells = {key: [line[start:end].strip() for start, end in zip(starts, ends)]
             for (key, _, _), line in zip(evaluate.ROWS, lines, strict=True)}
    assert cells["frechet"] == ["1.5000 ± 0.25", "0.5000 ± 0.12", "40"]
    assert cells["copied"] == ["0.0000", "-", "-"] and cells["kid"] == ["0.00123", "-", "-"]
    assert cells["two_sample_accuracy"] == ["0.5000 (0.400-0.600)", "-", "-"]


def test_flags_reach_what_they_are_for(small_world, tiny_checkpoint, mnist, monkeypatch):
    seen = {}

    def spy(name, result):
        monkeypatch.setattr(evaluate, name, lambda *args, **kwargs: seen.update({name: (args, kwargs)}) or result)

    spy("draw", (mnist["train"][0][:9], mnist["train"][1][:9]))
    spy("evaluate", (evaluate.merge({}, {}, {}) | {"n": 9}, []))
    spy("bits_figures", {})
    flags = {"sampler": "ddim", "steps": 4, "guidance": 3, "seed": 5, "batch_size": 6}
    assert command(monkeypatch, "--checkpoint", tiny_checkpoint, "--n", 9, "--no-clip", "--exact", "--device", "cpu",
                   "--guidance-interval", 2, 7.5, "--pairs", "p.png",
                   *[f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]) == 0
    (_, n), settings = seen["draw"]
    assert n == 9 and settings == flags | {"clip": False, "guidance_interval": [2, 7.5]}
    assert seen["evaluate"][1] == {"seed": 5, "device": torch.device("cpu"), "pairs": "p.png"}
    (_, images, seed, exact), _ = seen["bits_figures"]
    assert (seed, exact) == (5, True)
    assert {x.numpy().tobytes() for x in images} == {x.numpy().tobytes() for x in mnist["test"][0][:800]}


def test_a_model_that_always_had_labels_is_not_measured_without(small_world, tiny_checkpoint, mnist, monkeypatch,
                                                               capsys):
    """--label-dropout 0: its bits and its guidance mean nothing."""
    state = evaluate.load_model(tiny_checkpoint)
    settings = SETTINGS | {"label_dropout": 0.0}
    save_checkpoint("only.pt", {"settings": settings, "ema": state.network.state_dict()})
    assert command(monkeypatch, "--checkpoint", "only.pt", "--n", 3, "--steps", 1, "--json", "a.json") == 0
    figures = json.loads(Path("a.json").read_text())
    assert figures["bits_per_dim"] is None and figures["guidance"] == 1 and figures["label_agreement"] is not None
    assert figures["guidance_from"] is figures["guidance_to"] is None  # as it guides nowhere
    monkeypatch.setattr(evaluate.sweep, "__defaults__", ({"ddim": (1,)}, (1, 2)))
    assert command(monkeypatch, "--sweep", "s.png", "--checkpoint", "only.pt", "--n", 256) == 0
    assert capsys.readouterr().out.count("| ddim | 1 | 1 |") == 1


@pytest.mark.parametrize("failing", ["print_table", "write_json"])
def test_neither_the_table_nor_the_file_is_lost_with_the_other(failing, small_world, mnist, monkeypatch, capsys):
    """A reader of stdout that has gone, a disk that is full."""
    def fail(*args):
        raise BrokenPipeError if failing == "print_table" else OSError(28, "No space left on device")

    save_npz("a.npz", images=mnist["train"][0][:3])
    monkeypatch.setattr(evaluate, failing, fail)
    monkeypatch.setattr(os, "dup2", lambda *args: None)
    monkeypatch.setattr(sys.stdout, "fileno", lambda: 1, raising=False)
    assert command(monkeypatch, "--npz", "a.npz", "--json", "a.json") == 1
    assert Path("a.json").exists() == (failing == "print_table")
    assert ("class entropy" in capsys.readouterr().out) == (failing == "write_json")


@pytest.mark.parametrize("flag", ["--json", "--pairs"])
def test_a_file_that_cannot_be_written_is_found_out_before_the_work(flag, small_world, mnist, monkeypatch, capsys):
    save_npz("a.npz", images=mnist["train"][0][:3])
    monkeypatch.setattr(evaluate, "evaluate", lambda *args, **kwargs: pytest.fail("it was measured"))
    assert command(monkeypatch, "--npz", "a.npz", flag, small_world) == 1
    assert str(small_world) in capsys.readouterr().err


def test_samples_that_are_not_finite_are_not_measured(tiny_checkpoint, monkeypatch):
    bad = torch.full((2, 1, 28, 28), torch.nan)
    monkeypatch.setattr(evaluate, "generate", lambda *args, **kwargs: [(torch.tensor([1, 2]), [(0, bad, bad)])])
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        evaluate.draw(evaluate.load_model(tiny_checkpoint), 2, steps=1, batch_size=2)


def test_samples_are_measured_as_grey_levels(tiny_checkpoint, monkeypatch):
    x = torch.linspace(-1.2, 1.2, 2 * 784).view(2, 1, 28, 28)
    monkeypatch.setattr(evaluate, "generate", lambda *args, **kwargs: [(torch.tensor([1, 2]), [(1, -x, x), (0, x, x)])])
    images, labels = evaluate.draw(evaluate.load_model(tiny_checkpoint), 2, steps=2, batch_size=2)
    expected = ((x.double() + 1) / 2 * 255).round().clamp(0, 255)
    assert images.dtype == torch.uint8 and (images - expected).abs().max() <= 1 and labels.tolist() == [1, 2]


def test_checkpoint_is_measured(small_world, tiny_checkpoint, monkeypatch):
    arguments = "--checkpoint", tiny_checkpoint, "--n", 101, "--steps", 3, "--guidance", 2, "--json", "m.json"
    assert command(monkeypatch, *arguments, "--device", "cpu", "--seed", 4, "--batch-size", 30,
                   "--guidance-interval", 0.05, 7.5) == 0
    figures = json.loads((small_world / "m.json").read_text())
    assert KEYS <= figures.keys() and None not in (figures["bits_per_dim"], figures["label_agreement"])
    assert (figures["n"], figures["sampler"], figures["steps"], figures["guidance"], figures["seed"]) \
        == (101, "dpm++", 3, 2, 4)
    assert (figures["guidance_from"], figures["guidance_to"]) == (0.05, 7.5)
    assert figures["bits_per_dim"] > 3 and figures["precision"] < 0.1             # it was never trained


def test_samples_of_a_model_do_not_depend_on_the_batch(tiny_checkpoint):
    model = evaluate.load_model(tiny_checkpoint)
    one, many = (evaluate.draw(model, 7, steps=2, batch_size=b, seed=1) for b in (7, 3))
    assert torch.equal(one[1], many[1]) and (one[0].int() - many[0].int()).abs().max() <= 1


@pytest.mark.parametrize("change", [{"dataset": "KMNIST"}, {"image_size": 32}], ids=str)
def test_models_of_other_images_are_refused(change, small_world, tmp_path, monkeypatch, capsys):
    settings = SETTINGS | change
    save_checkpoint(tmp_path / "other.pt", {"settings": settings, "ema": build_network(settings).state_dict()})
    assert command(monkeypatch, "--checkpoint", tmp_path / "other.pt", "--n", 9, "--steps", 1) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "only models of MNIST digits" in error


def test_sweep_prints_a_table_and_saves_a_plot(small_world, tiny_checkpoint, monkeypatch, capsys):
    model, ticks = evaluate.load_model(tiny_checkpoint), itertools.count()
    monkeypatch.setattr(evaluate, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    flags = types.SimpleNamespace(device="cpu", seed=0, guidance=1.0, sampler="ddim", steps=2, batch_size=300,
                                  clip=True, guidance_interval=(0, 20))
    rows = evaluate.sweep(model, 300, "sweep.png", flags, steps={"ddim": (1, 3), "dpm++": (1, 12, 1000)},
                          guidance=(0, 2))
    # 1,000 steps are more than the model has, 12 are all; guidance 2 takes two predictions in the second step, whose
    # noise level is below 20, and one in the first, whose is above
    assert [(row["sampler"], row["calls"]) for row in rows] == [
        ("ddim", 1), ("ddim", 3), ("dpm++", 1), ("dpm++", 12), ("ddim", 2), ("ddim", 3)]
    assert all(row["seconds"] == pytest.approx(1000 / 300) for row in rows)        # by that clock each took a second
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    floor = float(lines[2].split("|")[5])
    assert rows[0]["ratio"] == pytest.approx(rows[0]["frechet"] / floor, rel=1e-3)
    assert len(lines) == 3 + 6 and len({line.count("|") for line in lines}) == 1   # header, rule, real digits, runs
    assert (small_world / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_is_written_as_json_too(small_world, tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.sweep, "__defaults__", ({"ddim": (1,), "dpm++": (8,)}, (1,)))
    assert command(monkeypatch, "--sweep", "sweep.png", "--n", 256, "--checkpoint", tiny_checkpoint, "--json", "s.json",
                   "--steps", 2, "--device", "cpu") == 0
    rows = json.loads((small_world / "s.json").read_text())
    assert [(row["sampler"], row["steps"], row["guidance"], row["calls"]) for row in rows] == [
        ("ddim", 1, 1.3, 2), ("dpm++", 8, 1.3, 16), ("dpm++", 2, 1, 2)]  # guided in all steps
    assert capsys.readouterr().out.splitlines()[-2:] == ["sweep.png", "s.json"]
    assert not (small_world / "samples").exists()  # for pairs, which a sweep does not look for


def test_a_sweep_of_more_steps_than_there_are_is_refused_at_once(small_world, tiny_checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "draw", lambda *args, **kwargs: pytest.fail("it was measured"))
    assert command(monkeypatch, "--sweep", "sweep.png", "--checkpoint", tiny_checkpoint, "--steps", 1001) == 2
    assert "--steps 1001" in capsys.readouterr().err


def test_a_sweep_over_too_few_samples_is_refused(small_world, monkeypatch, capsys):
    assert command(monkeypatch, "--sweep", "sweep.png", "--n", 255) == 2
    assert "256" in capsys.readouterr().err and not (small_world / "sweep.png").exists()


@pytest.mark.parametrize("arguments", [["--n", "0"], ["--n", "60001"], ["--npz", "a.npz", "--exact"],
                                       ["--npz", "a.npz", "--checkpoint", "b.pt"], ["--nonsense"],
                                       ["--npz", "a.npz", "--steps", "3"], ["--npz", "a.npz", "--no-clip"],
                                       ["--npz", "a.npz", "--guidance-interval", "0", "9"],
                                       ["--npz", "a.npz", "--sweep"], ["--sweep", "a.png", "--exact"],
                                       ["--sweep", "a.png", "--pairs", "b.png"],
                                       ["--train-classifier", "a.pt", "--json", "a.json"],
                                       ["--train-classifier", "a.pt", "--n", "5"],
                                       ["--train-classifier", "a.pt", "--guidance", "2"]], ids=" ".join)
def test_bad_usage_is_told_apart(arguments, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "pick_device", lambda name: pytest.fail("it began its work"))
    assert command(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
