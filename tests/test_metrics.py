"""The ruler: against closed forms, against the formulas written out naively, and on digits that were tampered with.

No number here was copied from what the code printed: they come from algebra, from counting, or from scipy.
"""
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddpm import DDPM
from diffusion_model import Model, build_network
from diffusion_schedules import cosine_betas
from helpers import seeded
from utils import metrics
from utils.classifier import CLASSIFIER, DigitNet, classify, fit, load_classifier, random_affine
from utils.data import load_dataset, to_float
from utils.metrics import (GROUPS, Digits, bits_figures, class_figures, distribution_figures, frechet_distance,
                           frechet_spread, jackknife, kernel_distance, manifold_figures, memorisation_figures,
                           nearest_neighbours, pixel_figures, random_groups, reaches, real_draws, squared_distances,
                           tell_figures, two_sample_figures)


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
    return load_classifier()


@pytest.fixture(scope="module")
def seen(mnist, classifier):
    def see(images, labels=None):
        return Digits(images, labels, *classify(classifier, images))
    return see


@pytest.fixture(scope="module")
def test_digits(mnist, seen):
    return seen(*mnist["test"])


# ----------------------------------------------------------------------------------------------------------------------
# The classifier

def test_classifier_reads_the_test_digits(test_digits):
    _, labels, features, probabilities = test_digits
    assert features.shape == (2000, 128) and features.dtype == torch.float64
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(2000), atol=1e-5) and probabilities.min() >= 0
    assert (probabilities.argmax(dim=1) == labels).double().mean() >= 0.995


def test_classifier_does_not_depend_on_the_chunk(mnist, classifier):
    images, labels = (x[:30] for x in mnist["test"])
    (one, probabilities), (many, _) = (classify(classifier, images, chunk) for chunk in (30, 7))
    assert torch.allclose(one, many, atol=1e-5) and probabilities.argmax(dim=1).tolist() == labels.tolist()


def test_another_classifier_is_refused(tmp_path):
    content = bytearray(CLASSIFIER.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "classifier.pt").write_bytes(content)
    with pytest.raises(ValueError, match="SHA-256"):
        load_classifier(path=tmp_path / "classifier.pt")
    assert CLASSIFIER.stat().st_size < 1 << 20


def test_fit_follows_the_gradient_of_each_batch_at_a_rate_that_falls_to_0(monkeypatch):
    """The gradient, of what the augmentation makes of the images, is computed again before each step."""
    images = torch.randint(0, 256, (20, 1, 28, 28), dtype=torch.uint8, generator=seeded())
    net, labels, rates = DigitNet(2, 10).double(), torch.arange(20) % 10, []

    class Checked(torch.optim.SGD):
        def step(self):
            loss = F.cross_entropy(net(-to_float(images).double())[1], labels)
            for p, expected in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters()))):
                torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-5)
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(torch.optim, "SGD", Checked)
    fit(net, images, labels, epochs=20, batch_size=20, lr=0.1, generator=seeded(),
                 change=lambda x, generator: -x.double())
    assert len(rates) == 20 and max(rates) == pytest.approx(0.1) and rates[0] < 0.01 and rates[-1] < 0.001
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_each_epoch_has_every_image_once_in_an_order_of_its_own():
    images, seen = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 1, 28, 28), []
    fit(DigitNet(2, 10), images, torch.arange(12) % 10, epochs=3, batch_size=4, lr=0.0,
                 generator=seeded(), change=lambda x, generator: seen.extend(x[:, 0, 0, 0].tolist()) or x)
    epochs = [seen[start:start + 12] for start in (0, 12, 24)]
    in_order = sorted(epochs[0])
    assert len(set(in_order)) == 12 and all(sorted(epoch) == in_order for epoch in epochs)
    assert in_order not in epochs and epochs[0] != epochs[1] != epochs[2]


def test_augmentation_moves_and_lets_in_black(monkeypatch):
    white, digit = torch.ones(1, 1, 28, 28), torch.rand(1, 1, 28, 28, generator=seeded())
    turned = random_affine(digit.expand(2, -1, -1, -1), seeded())
    assert (turned[0] - turned[1]).abs().max() > 0.1                               # each at random, by itself
    drawn = torch.full((6, 1), 0.5)
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: drawn)
    torch.testing.assert_close(random_affine(digit, None), digit, atol=1e-5, rtol=0)
    drawn[4] = 1                                                                   # two pixels to the left
    torch.testing.assert_close(random_affine(digit, None)[..., :-2], digit[..., 2:], atol=1e-4, rtol=0)
    assert (random_affine(white, None)[..., -2:] < -0.999).all()
    drawn[4], drawn[5] = 0.5, 1                                                    # two pixels up
    torch.testing.assert_close(random_affine(digit, None)[..., :-2, :], digit[..., 2:, :], atol=1e-4, rtol=0)


def test_augmentation_turns_shears_and_scales(monkeypatch):
    """Of a picture whose levels rise evenly, to the right and faster downwards: what is between its pixels is known."""
    at = (torch.arange(28) * 2 + 1) / 28 - 1
    picture, x, y = (0.1 * at + 0.3 * at[:, None])[None, None], at[7:21], at[7:21, None]
    drawn, angle = torch.full((6, 1), 0.5), math.radians(15)
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: drawn)
    turned = math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y
    for k, (right, down) in enumerate([turned, (x + angle * y, y), (1.15 * x, y), (x, 1.15 * y)]):
        drawn.fill_(0.5)[k] = 1
        torch.testing.assert_close(random_affine(picture, None)[0, 0, 7:21, 7:21], 0.1 * right + 0.3 * down,
                                   atol=1e-3, rtol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Frechet and kernel distance

def test_frechet_of_gaussians_that_commute():
    zero, mean = torch.zeros(3).double(), torch.tensor([1.0, -2, 0.5]).double()
    a = gaussian_features(zero, torch.tensor([1.0, 4, 9]).double().diag())
    b = gaussian_features(mean, torch.tensor([4.0, 1, 0.25]).double().diag(), seed=1)
    # |mean|^2 + sum of (s_a - s_b)^2 = 5.25 + (1-2)^2 + (2-1)^2 + (3-0.5)^2
    assert frechet_distance(a, b) == pytest.approx(5.25 + 1 + 1 + 6.25, abs=1e-9)


def test_frechet_of_gaussians_that_do_not_commute():
    a = torch.tensor([[2.0, 1.2], [1.2, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.7], [-0.7, 3.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    # for 2x2 matrices tr M^(1/2) = sqrt(tr M + 2 sqrt(det M))
    root = math.sqrt((a @ b).trace().item() + 2 * math.sqrt((torch.det(a) * torch.det(b)).item()))
    d = frechet_distance(gaussian_features(zero, a), gaussian_features(zero, b, seed=1))
    assert d == pytest.approx(3 + 4 - 2 * root, abs=1e-9)


def test_frechet_where_covariances_are_singular():
    # Two rank-one Gaussians, along u and v: tr (uu'vv')^(1/2) = |u . v|
    u, v = torch.tensor([3.0, 4, 0, 0]).double(), torch.tensor([0, 2.0, 0, 1]).double()
    zero = torch.zeros(4, dtype=torch.float64)
    a, b = gaussian_features(zero, u.outer(u)), gaussian_features(zero, v.outer(v), seed=1)
    assert frechet_distance(a, b) == pytest.approx(25 + 5 - 2 * 8, abs=1e-6)


def test_frechet_of_fewer_digits_than_features(test_digits):
    few, others = test_digits.features[:60], test_digits.features[60:120]          # rank 59 of 128
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, few + 1) == pytest.approx(128, abs=1e-6)
    assert 0 < frechet_distance(few, others) == pytest.approx(frechet_distance(others, few))


def test_frechet_agrees_with_scipy_on_digits(test_digits, seen, mnist):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = test_digits.features[:500], seen(mnist["train"][0][:300]).features
    product = torch.cov(a.T).numpy() @ torch.cov(b.T).numpy()
    expected = ((a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace()).item() \
        - 2 * np.trace(linalg.sqrtm(product)).real
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-6)


def test_groups_are_drawn_at_random_with_the_classes_in_their_shares():
    labels = torch.tensor([0] * 603 + [4] * 301 + [7] * 101)
    for of, shares in (None, {}), (labels, {0: 30, 4: 15, 7: 5}):
        groups = random_groups(of, 1005, 0)
        assert len(groups) == GROUPS and {len(group) for group in groups} == {50, 51}
        assert torch.equal(torch.cat(groups).sort().values, torch.arange(1005))
        for group in groups:
            assert all(abs((labels[group] == k).sum() - share) <= 1 for k, share in shares.items())
        # where it is in its class, from 0 to 1: a mean of 50 such numbers has a standard deviation of 0.04
        places = torch.cat([torch.linspace(0, 1, n) for n in ([1005] if of is None else [603, 301, 101])])
        assert all(abs(places[group].mean() - 0.5) < 5 * 0.04 for group in groups)
        assert not all(map(torch.equal, groups, random_groups(of, 1005, 1)))


def test_jackknife_of_a_mean_is_its_standard_error():
    """There it is exact: s / sqrt(G), with s^2 the sum of squares over G - 1."""
    x = torch.randn(GROUPS, dtype=torch.float64, generator=seeded())
    error = jackknife(lambda keep: x[keep].mean().item())
    assert error == pytest.approx(x.std().item() / math.sqrt(GROUPS))


def test_squared_distances_are_never_negative():
    x = 1000 + torch.randn(50, 3, dtype=torch.float64, generator=seeded())
    d = squared_distances(x, x)
    assert d.min() >= 0 and torch.allclose(d, torch.cdist(x, x) ** 2, atol=1e-6)


def test_frechet_spread_is_that_of_repetitions():
    sets = [torch.randn(200, 4, dtype=torch.float64, generator=seeded(k)) * 1.2 + 0.7 for k in range(101)]
    scatter = np.std([frechet_distance(x, sets[0]) for x in sets[1:]])
    claimed = np.mean([frechet_spread(x, sets[0]) for x in sets[1:21]])
    assert 0.8 < claimed / scatter < 1.5


def of_classes(n, seed, shift=0.0):
    """Features [n, 4] of four classes far apart, each as often as the others, and their labels."""
    x, labels = torch.randn(n, 4, dtype=torch.float64, generator=seeded(seed)) + shift, torch.arange(n) % 4
    x[:, 0] += 3 * labels
    return x, labels


def test_frechet_spread_of_samples_with_fixed_shares_leaves_out_chance_in_the_classes():
    reference, _ = of_classes(400, 0)
    sets = [of_classes(200, k, shift=1) for k in range(1, 101)]
    scatter = np.std([frechet_distance(x, reference) for x, _ in sets])
    claimed = np.mean([frechet_spread(x, reference, labels) for x, labels in sets[:20]])
    assert 0.8 < claimed / scatter < 1.25 < np.mean([frechet_spread(x, reference) for x, _ in sets[:20]]) / scatter


def kernel(x, y):
    return (sum(p * q for p, q in zip(x, y)) / len(x) + 1) ** 3


def mean_kernel(a, b, pairs):
    return np.mean([kernel(a[i], b[j]) for i, j in pairs])


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 0, 0, 3, 1] * 8 + [0, 3, 3])], ids=["free", "by classes"])
def test_kernel_distance_is_the_formula(labels):
    """Of samples with fixed shares the pairs within a class, and those across two, count by the shares."""
    a, b = (torch.randn(n, 3, dtype=torch.float64, generator=seeded(n)) for n in (43, 30))
    a_, b_, of = a.tolist(), b.tolist(), [0] * 43 if labels is None else labels.tolist()
    places = {k: [i for i in range(43) if of[i] == k] for k in set(of)}
    expected = sum(len(places[c]) * len(places[d]) / 43 ** 2 * mean_kernel(
        a_, a_, [(i, j) for i in places[c] for j in places[d] if i != j]) for c in places for d in places)
    expected += mean_kernel(b_, b_, [(i, j) for i in range(30) for j in range(30) if i != j])
    expected -= 2 * mean_kernel(a_, b_, [(i, j) for i in range(43) for j in range(30)])
    assert kernel_distance(a, b, labels)[0] == pytest.approx(expected, abs=1e-12)


def test_the_kernel_distance_of_a_set_is_told_its_labels(mnist, seen, test_digits):
    samples = seen(*(x[:300] for x in mnist["train"]))
    expected = [kernel_distance(samples.features, test_digits.features, of, 3) for of in (samples.labels, None)]
    for labels, (kid, stderr) in zip((samples.labels, None), expected):
        figures = distribution_figures(samples._replace(labels=labels), test_digits, 3)
        assert (figures["kid"], figures["kid_stderr"]) == (kid, stderr)
    assert expected[0] != expected[1]


def test_kernel_distance_does_not_depend_on_the_chunk():
    """Of more than fit into one: all of them by one formula."""
    a, b = (torch.randn(n, 3, dtype=torch.float64, generator=seeded(n)) for n in (1203, 707))
    aa, ab, bb = ((x @ y.T / 3 + 1) ** 3 for x, y in ((a, a), (a, b), (b, b)))
    expected = ((aa.sum() - aa.trace()) / (1203 * 1202) + (bb.sum() - bb.trace()) / (707 * 706) - 2 * ab.mean()).item()
    assert kernel_distance(a, b)[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("fixed", [False, True], ids=["free", "by classes"])
def test_kernel_distance_is_unbiased_and_its_error_honest(fixed):
    """The error over other samples, of the same reference. Without regard to the fixed shares both would be wrong."""
    def samples(n, seed, shift=0.0):
        return of_classes(n, seed, shift) if fixed else (
            torch.randn(n, 4, dtype=torch.float64, generator=seeded(seed)) + shift, None)

    reference, _ = samples(100, 999)
    distances, errors = np.array([kernel_distance(x, reference, of) for x, of in (
        samples(100, k, 0.4) for k in range(60))]).T
    assert 0.75 < errors.mean() / distances.std() < 1.5
    many, _ = samples(4000, 100)
    references = [many[torch.randint(0, 4000, (60,), generator=seeded(200 + k))] for k in range(60)]
    same = np.array([[kernel_distance(x, y, of)[0], kernel_distance(x, y)[0]] for (x, of), y in zip((
        samples(60, 300 + k) for k in range(60)), references)])
    mean, error = same.mean(axis=0), same.std(axis=0) / math.sqrt(60)
    assert abs(mean[0]) < 4 * error[0] and min(same[:, 0]) < 0
    assert not fixed or mean[1] < -4 * error[1]


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
        assert manifold_figures(real, fake, chunk) == pytest.approx(expected)
        assert manifold_figures(real, fake, real_reach=reaches(real)) == pytest.approx(expected)


def test_manifold_figures_of_known_sets():
    cluster = torch.randn(50, 3, dtype=torch.float64, generator=seeded(3))
    real = torch.cat([cluster, cluster + 100])                                     # two modes
    one_mode = torch.cat([cluster, cluster + 0.01])                                # the second is never sampled
    figures = manifold_figures(real, one_mode)
    assert (figures["precision"], figures["recall"], figures["coverage"]) == (1, 0.5, 0.5)
    assert set(manifold_figures(real, real + 1000).values()) == {0}
    # A real digit reaches 4 others and itself. (The fifth lies just on the edge, where rounding lets a few in.)
    assert manifold_figures(real, real) == pytest.approx(
        {"precision": 1, "recall": 1, "density": 1, "coverage": 1}, abs=0.01)


def test_as_many_test_digits_as_samples(test_digits, seen, mnist):
    """Precision and the like compare sets of one size, whichever is the larger."""
    many = seen(mnist["train"][0][:300])
    few = test_digits._replace(features=test_digits.features[:200])
    for samples, test in (many, few), (few, many):
        figures = distribution_figures(samples, test, 0)
        expected = manifold_figures(test.features[:200], samples.features[:200])
        assert figures == figures | expected


@pytest.mark.parametrize("figure, fewest", [("frechet", 256), ("kid", 100), ("precision", 100)])
def test_each_figure_has_a_number_of_samples_that_bears_it(figure, fewest, test_digits):
    for n in fewest - 1, fewest:
        samples = Digits(*(x[-n:] for x in test_digits))
        figures = distribution_figures(samples, test_digits, seed=0)
        assert (figures[figure] is None) == (n < fewest)


def test_real_digits_are_drawn_at_random_in_sets_that_share_nothing():
    """As many of each class as the samples have, or, if those were not asked for, freely."""
    for available, n, sets in (1000, 300, 3), (1000, 100, 5), (1000, 1000, 1):
        pool = torch.arange(10).repeat(available // 10)[torch.randperm(available, generator=seeded(3))]
        for labels in None, torch.arange(n) % 10:
            draws = real_draws(pool, n, 0, labels)
            drawn = torch.cat(draws)
            assert len(draws) == sets and len(drawn.unique()) == len(drawn) == sets * n and drawn.max() < available
            assert not torch.equal(drawn, drawn.sort().values)
            other = real_draws(pool, n, 1, labels)[0]
            assert not torch.equal(draws[0], other)
            assert n == 1000 or not torch.equal(draws[0].sort()[0], other.sort()[0])


def test_real_digits_are_drawn_with_the_classes_of_the_samples_and_in_no_order():
    pool = torch.tensor([0] * 600 + [1] * 300 + [7] * 100)
    for counts, sets in ((6, 3, 1), 5), ((100, 0, 50), 2), ((1, 2, 330), 1), ((0, 650, 0), 1):
        draws = real_draws(pool, sum(counts), 0, torch.tensor([0, 1, 7]).repeat_interleave(torch.tensor(counts)))
        assert len(draws) == sets
        for draw in draws:  # if there are not enough of a class, all of them, some more than once
            assert torch.bincount(pool[draw], minlength=8)[[0, 1, 7]].tolist() == list(counts)
            times = torch.bincount(draw, minlength=1000)
            assert all(times[pool == k].max() <= -(-m // (pool == k).sum()) for k, m in zip((0, 1, 7), counts))
    tens = pool[real_draws(pool, 330, 0, torch.tensor([0] * 200 + [1] * 100 + [7] * 30))[0]].unfold(0, 10, 10)
    assert len({(ten == 0).sum().item() for ten in tens}) > 3  # in order of the classes: 10, something, 0


# ----------------------------------------------------------------------------------------------------------------------
# Classes, pixels, neighbours, the two-sample test

def test_class_figures_by_counting():
    probabilities = torch.full((4, 10), 0.01)
    for i, (digit, p) in enumerate([(3, 0.95), (3, 0.91), (7, 0.89), (7, 0.99)]):
        probabilities[i, digit] = p
    figures = class_figures(Digits(None, torch.tensor([3, 7, 7, 7]), None, probabilities))
    assert figures == pytest.approx({"class_entropy": math.log10(2), "confident": 0.75, "label_agreement": 0.75})
    alone = class_figures(Digits(None, None, None, probabilities[:1]))
    assert str(alone["class_entropy"]) == "0.0" and alone["label_agreement"] is None


def test_pixel_figures_by_counting():
    image = torch.tensor([0, 0, 0, 0, 1, 12, 13, 255], dtype=torch.uint8).view(1, 1, 2, 4)
    reference = torch.tensor([0, 0, 0, 0, 0, 0, 0, 255], dtype=torch.uint8).view(1, 1, 2, 4)
    assert pixel_figures(image, reference) == {"zeros": 0.5, "faint": 0.25, "grey_distance": 3 / 8}


def test_nearest_neighbours_by_brute_force(mnist):
    queries, pool = mnist["test"][0][:40], mnist["train"][0][:300]
    pool = torch.cat([pool, queries[7:8]])
    distances, indices = nearest_neighbours(queries, pool, chunk=16)
    all_pairs = torch.cdist(queries.flatten(1).double() / 255, pool.flatten(1).double() / 255,
                            compute_mode="donot_use_mm_for_euclid_dist")
    assert torch.equal(indices, all_pairs.argmin(dim=1))
    assert torch.allclose(distances, all_pairs.amin(dim=1)) and distances[7] == 0 and indices[7] == 300


def test_memorisation_figures():
    distances, test_distances = torch.tensor([0.0, 1, 2, 5]).double(), torch.tensor([0.5, 1.5]).double()
    figures = memorisation_figures(distances, test_distances)
    assert figures["nearest_neighbour_ratio"] == 2 and figures["copied"] == 0.25
    # relative variances of the means: 3.5 / 4 / 2^2 and 0.25 / 2 / 1^2
    assert figures["nearest_neighbour_ratio_stderr"] == pytest.approx(2 * math.sqrt(3.5 / 16 + 0.25 / 2))
    alone = memorisation_figures(distances[1:2], test_distances)
    assert alone == {"nearest_neighbour_ratio": 1, "nearest_neighbour_ratio_stderr": None, "copied": 0}


def test_two_sample_test_sees_what_an_eye_does_not(mnist):
    """In the upper left of the images, which is enough for it."""
    real, test = mnist["train"][0][:400, :, :16, :16], mnist["test"][0][:400, :, :16, :16]
    faint = torch.where(real == 0, torch.randint(0, 3, real.shape, generator=seeded()).to(torch.uint8), real)
    assert 0.3 < two_sample_figures(real, test, epochs=1, repeats=1)["two_sample_accuracy"] < 0.6
    assert two_sample_figures(faint, test, epochs=4, repeats=1)["two_sample_accuracy"] > 0.95


def test_the_two_sample_figure_is_the_mean_of_three_and_their_range(mnist, monkeypatch):
    """Networks that know the answer, and are told to be right 8, 5 and 6 times in 10."""
    monkeypatch.setattr(metrics, "fit", lambda net, *args, **kwargs: net.eval())
    right = iter([8, 5, 6])

    def answer(net, images):
        said = torch.arange(2).repeat_interleave(5) ^ (torch.arange(10) >= next(right))
        return None, torch.nn.functional.one_hot(said, 2).float()

    monkeypatch.setattr(metrics, "classify", answer)
    figures = two_sample_figures(mnist["train"][0][:10], mnist["test"][0][:10])
    assert figures == {"two_sample_accuracy": pytest.approx(19 / 30), "two_sample_accuracy_low": 0.5,
                       "two_sample_accuracy_high": 0.8}


def test_the_two_sample_test_is_on_images_that_it_was_not_trained_on(mnist, monkeypatch):
    seen = []
    monkeypatch.setattr(metrics, "fit", lambda net, images, *args, **kwargs: seen.append(images) or net.eval())
    monkeypatch.setattr(metrics, "classify", lambda net, images: seen.append(images) or classify(net, images))
    with torch.no_grad():
        two_sample_figures(mnist["train"][0][:20], mnist["test"][0][:20])
    assert len(seen) == 6
    for both in zip(seen[::2], seen[1::2]):
        assert len(torch.cat(both)) == len(torch.cat(both).flatten(1).unique(dim=0)) == 40
    assert not torch.equal(seen[0], seen[2]), "each repetition has other halves"


def test_the_two_sample_test_follows_from_the_seed_alone(mnist, monkeypatch):
    """Untrained here: its networks, and which images are held out. The global generator is left as it was."""
    monkeypatch.setattr(metrics, "fit", lambda net, *args, **kwargs: net.eval().requires_grad_(False))
    nets = []
    monkeypatch.setattr(metrics, "classify", lambda net, images: nets.append((net, images)) or classify(net, images))
    for seed in 0, 0, 1:
        torch.rand(1)
        state = torch.get_rng_state()
        two_sample_figures(mnist["train"][0][:40], mnist["test"][0][:30], seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
    for (one, held_out), (again, held_out_again), (other, _) in zip(nets[:3], nets[3:6], nets[6:], strict=True):
        assert torch.equal(held_out, held_out_again) and len(held_out) == 2 * 15   # half of as many of each
        assert torch.equal(one.head.weight, again.head.weight)
        assert not torch.equal(one.head.weight, other.head.weight)
    assert len({net.head.weight.sum().item() for net, _ in nets[:3]}) == 3, "each repetition has another network"


# ----------------------------------------------------------------------------------------------------------------------
# Tells

def drawn(*pixels):
    """One black image with (row, column, level) set."""
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    for row, column, level in pixels:
        image[0, row, column] = level
    return image


def test_tells_of_images_drawn_by_hand():
    """A box of 20 rows; one of 20 columns and 21 rows; one of 19; and nothing at all."""
    tall, long, short, empty = (drawn((4, 5, 9), (23, 5, 9)), drawn((0, 27, 9), (20, 8, 9)),
                                drawn((1, 0, 9), (19, 12, 9)), drawn())
    wide = drawn((9, 3, 1), (9, 22, 1), (20, 4, 1))
    assert [tell_figures(image[None])["box"] for image in (tall, long, short, empty, wide)] == [1, 0, 0, 0, 1]
    assert tell_figures(torch.stack([tall, long, short, wide]))["box"] == 0.5

    # Between the pixels 13 and 15, where the middle lies; half a pixel beside it is just inside.
    middle, inside, low, right = (drawn((14, 14, 9)), drawn((14, 14, 9), (15, 13, 9)), drawn((13, 14, 9), (17, 14, 9)),
                                  drawn((14, 14, 100), (14, 15, 102)))
    assert [tell_figures(image[None])["centred"] for image in (middle, inside, low, right, empty)] == [1, 1, 0, 0, 0]
    assert tell_figures(torch.stack([middle, right]))["centred"] == 0.5

    # Neighbours are all eight, and the border has fewer.
    specks = drawn((0, 0, 1), (1, 1, 1), (5, 5, 1), (27, 27, 255), (8, 8, 3), (8, 9, 3))
    assert tell_figures(specks[None])["specks"] == 2
    assert tell_figures(torch.stack([tall, empty]))["specks"] == 1

    # Two of three in the commonest; an image without any does not count; 251 is not white.
    ink = drawn((0, 0, 254), (0, 1, 254), (0, 2, 252), (0, 3, 251), (0, 4, 251), (0, 5, 251))
    assert tell_figures(torch.stack([ink, tall]))["ink"] == pytest.approx(2 / 3)
    assert tell_figures(torch.stack([ink, drawn((3, 3, 255))]))["ink"] == pytest.approx(5 / 6)
    assert tell_figures(tall[None])["ink"] is None
    assert tell_figures(torch.stack([ink, tall]))["levels"] == (4 + 2) / 2


def test_tells_of_real_digits(mnist):
    """LeCun et al. 1998: the digits were fitted into a box of 20 x 20, and their centre of mass into the middle of the
    image. The other figures were counted elsewhere."""
    figures = tell_figures(mnist["test"][0])
    assert figures["box"] > 0.99 and figures["centred"] > 0.99 and figures["specks"] < 0.02
    assert 0.75 < figures["ink"] < 0.87 and 60 < figures["levels"] < 75


# ----------------------------------------------------------------------------------------------------------------------
# Digits that were tampered with move the figures that should see it

@pytest.fixture(scope="module")
def honest(mnist, seen, test_digits):
    """The figures of 1,000 training digits."""
    real = seen(mnist["train"][0][:1000], mnist["train"][1][:1000])
    return distribution_figures(real, test_digits, 0) | class_figures(real)


def figures_of(images, labels, seen, test_digits):
    digits = seen(images, labels)
    return distribution_figures(digits, test_digits, 0) | class_figures(digits)


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
    assert class_figures(seen(images, labels))["label_agreement"] > 0.98
    assert class_figures(seen(images.flip(3), labels))["label_agreement"] < 0.8
    near, far = (nearest_neighbours(x, mnist["train"][0])[0] for x in (images, images.roll(4, dims=3)))
    assert memorisation_figures(far, near)["nearest_neighbour_ratio"] > 1.2


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
    test_distances, _ = nearest_neighbours(test, train)
    copies, _ = nearest_neighbours(train[:300], train)
    slightly, _ = nearest_neighbours((train[:300].int() - 3).clamp(0).to(torch.uint8), train)
    fresh, _ = nearest_neighbours(mnist["test"][0][300:600], train)
    assert honest["frechet"] < 0.3  # of 1,000 copies of training digits: nothing wrong with them there
    for distances in copies, slightly:
        figures = memorisation_figures(distances, test_distances)
        assert figures["nearest_neighbour_ratio"] < 0.1 and figures["copied"] == 1
    figures = memorisation_figures(fresh, test_distances)
    assert figures["nearest_neighbour_ratio"] == pytest.approx(1, abs=0.1) and figures["copied"] < 0.02


# ----------------------------------------------------------------------------------------------------------------------
# Bits per dimension

def harmonic_model(T):
    """A model whose bound is known: L_t = 1 / (t + 1) bits, plus what the noise adds (0 on average), prior 0.25."""
    ddpm = types.SimpleNamespace(
        T=T, prior_bits=lambda x0: torch.full((len(x0),), 0.25),
        bound_term=lambda model, x0, t, noise: 1 / (t + 1) + 0.01 * noise.flatten(1).mean(dim=1))
    return types.SimpleNamespace(ddpm=ddpm, network=torch.nn.Linear(1, 1))


def test_exact_bits_are_the_sum_over_all_timesteps(mnist):
    figures = bits_figures(harmonic_model(50), mnist["test"][0][:300], exact=True)
    harmonic = sum(1 / t for t in range(1, 51))
    assert figures["bits_per_dim"] == pytest.approx(0.25 + harmonic, abs=2e-3)
    assert figures["bits_decoder"] == pytest.approx(1, abs=1e-3) and figures["bits_prior"] == 0.25
    assert figures["bits_diffusion"] == pytest.approx(harmonic - 1, abs=2e-3)


@pytest.mark.parametrize("T", [1, 2, 37, 1000])
def test_estimated_bits_are_unbiased_and_their_error_honest(T, mnist):
    expected = 0.25 + sum(1 / t for t in range(1, T + 1))
    runs = [bits_figures(harmonic_model(T), mnist["test"][0][:100], seed=s) for s in range(30)]
    values = np.array([r["bits_per_dim"] for r in runs])
    error = np.mean([r["bits_per_dim_stderr"] for r in runs])
    assert abs(values.mean() - expected) < 4 * error / math.sqrt(30)
    assert 0.6 < values.std(ddof=1) / error < 1.6


def test_estimated_bits_follow_from_the_seed(mnist):
    def bits(seed):
        return bits_figures(harmonic_model(1000), mnist["test"][0][:20], seed=seed)

    assert bits(3) == bits(3) != bits(4)


def test_exact_bits_agree_with_ddpm(mnist):
    settings = {"network": "unet", "image_size": 28, "image_channels": 1, "classes": 10, "width": 8, "depth": 1}
    model, images = Model(build_network(settings), DDPM(cosine_betas(12)), settings), mnist["test"][0][:60]
    figures = bits_figures(model, images, exact=True)
    expected = model.ddpm.bits_per_dim(model, to_float(images))["total"].mean().item()
    assert figures["bits_per_dim"] == pytest.approx(expected, rel=0.02)  # each draws noise of its own


def test_how_long_the_two_sample_test_trains(monkeypatch):
    """A network that trains too briefly sees nothing."""
    trained = []
    monkeypatch.setattr(metrics, "fit", lambda net, images, labels, *, generator, name, **how:
                        trained.append((len(images), how)) or net.eval())
    monkeypatch.setattr(metrics, "classify", lambda net, images: (None, torch.ones(len(images), 2)))
    for n, epochs, batch_size in (4000, 8, 100), (1000, 32, 100), (40, 800, 20):
        black = torch.zeros(n, 1, 28, 28, dtype=torch.uint8)
        metrics.two_sample_figures(black, black)
        assert trained.pop() == (n, {"epochs": epochs, "batch_size": batch_size, "lr": 0.05})
