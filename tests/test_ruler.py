"""The ruler in use: is it unbiased, and its error honest, on real digits? Do real digits measure as real digits?

The formulas of the figures: test_metrics.py. What evaluate.py does with them: test_evaluate.py.
"""
import json
import math

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
from helpers import call, seeded
from utils.classifier import DigitNet, classify, fit, load_classifier
from utils.data import DATASETS, load_dataset, to_float
from utils.metrics import (FEWEST, Validation, frechet_distance, frechet_spread, kernel_distance, manifold_figures,
                           real_draws)

N = 500  # samples of the generator below
DRAWS = 60


# ----------------------------------------------------------------------------------------------------------------------
# Distances of samples with fixed shares, and of free ones

@pytest.fixture(scope="module")
def world():
    """A generator that draws from 1,000 training digits, and 800 test digits as the reference: their features, in 32
    dimensions, and the generator's labels. A tenth too bright, so that it differs from the reference."""
    classifier, turn = load_classifier(), torch.randn(128, 32, dtype=torch.float64, generator=seeded())
    turn, features = torch.linalg.qr(turn).Q, []
    for train, n in (True, 1000), (False, 800):
        images, labels = load_dataset("MNIST", train=train)
        chosen = torch.randperm(len(images), generator=seeded(1))[:n]
        features.append((classify(classifier, images[chosen])[0] @ turn, labels[chosen]))
    (pool, labels), (reference, _) = features
    return 1.1 * pool, labels, reference


def sampled(pool, labels, fixed, seed):
    """Which N of the pool are drawn, with replacement: each class in its share, exactly, or freely."""
    if not fixed:
        return torch.randint(len(pool), (N,), generator=seeded(seed))
    places = [(labels == k).nonzero().flatten() for k in range(10)]
    return torch.cat([place[torch.randint(len(place), (count,), generator=seeded(100 * seed + k))]
                      for k, (place, count) in enumerate(zip(places, shared_out(labels)))])


def shared_out(labels):
    """How many of N samples are of each class."""
    ends = (labels.bincount().cumsum(0) * N / len(labels)).round().long().tolist()
    return np.diff([0, *ends]).tolist()


def true_distance(pool, labels, reference, fixed):
    """What KID estimates: the kernel's mean over the pool, each class by its share, and over pairs of the reference."""
    def k(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    counts = torch.tensor(shared_out(labels), dtype=torch.float64)
    weights = (counts / N / labels.bincount())[labels] if fixed else torch.full((len(pool),), 1 / len(pool)).double()
    of_reference = k(reference, reference)
    pairs = len(reference) * (len(reference) - 1)
    return (weights @ k(pool, pool) @ weights + (of_reference.sum() - of_reference.trace()) / pairs
            - 2 * weights @ k(pool, reference).mean(dim=1)).item()


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed shares", "free"])
def test_kid_of_digits_is_unbiased_and_its_error_honest(world, fixed):
    """The control: as free samples, those with fixed shares come out below the truth, with an error far too large."""
    pool, labels, reference = world
    truth, draws = true_distance(*world, fixed), [sampled(pool, labels, fixed, seed) for seed in range(DRAWS)]
    distances, errors = np.array([kernel_distance(pool[i], reference, labels[i] if fixed else None) for i in draws]).T
    spread = distances.std(ddof=1)
    assert abs(distances.mean() - truth) < 4 * spread / math.sqrt(DRAWS)
    assert 1 / 1.6 < errors.mean() / spread < 1.6
    if fixed:
        biased, too_large = np.array([kernel_distance(pool[i], reference) for i in draws]).T
        assert biased.mean() - truth < -10 * spread / math.sqrt(DRAWS) and too_large.mean() > 2 * spread


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed shares", "free"])
def test_frechet_spread_of_digits_is_honest(world, fixed):
    pool, labels, reference = world
    draws = [sampled(pool, labels, fixed, seed) for seed in range(DRAWS)]
    spread = np.std([frechet_distance(pool[i], reference) for i in draws], ddof=1)
    told = [frechet_spread(pool[i], reference, labels[i] if fixed else None) for i in draws[:10]]
    assert 1 / 1.6 < np.mean(told) / spread < 1.6
    if fixed:
        assert np.mean([frechet_spread(pool[i], reference) for i in draws[:10]]) > 2 * spread


def test_a_class_of_one_sample_moves_the_distance_by_its_share_and_no_more(world):
    """It makes no pair of its own class. (And a sample of one class only is like one without labels.)"""
    pool, labels, reference = world
    x = pool[labels == 3][:100]
    alone = torch.tensor([3] * 99 + [5])
    assert kernel_distance(x, reference, alone)[0] == pytest.approx(kernel_distance(x, reference)[0], abs=0.01)
    assert kernel_distance(x, reference, torch.full((100,), 3)) == pytest.approx(kernel_distance(x, reference))


# ----------------------------------------------------------------------------------------------------------------------
# Precision and the like

def test_density_and_coverage_do_not_count_ties_and_precision_and_recall_do():
    """As in the references: < there, <= here. Of points that come seven times the reach is 0, and so is the distance;
    of those on a line it is 2 to the third nearest and 3 to the fifth, but for the ends."""
    seven = torch.arange(4.0).double().repeat(7)[:, None]
    assert manifold_figures(seven, seven) == {"precision": 1, "recall": 1, "density": 0, "coverage": 0}
    line, away = torch.arange(100.0).double()[:, None], torch.tensor([[50.0, 3.0]]).double()
    real = torch.cat([line, torch.zeros(100, 1).double()], dim=1)
    # beside the 50th, 3 away from it and more from all others
    figures = manifold_figures(real, torch.cat([away, real[1:] + 1000]))
    assert figures == {"precision": 0, "recall": 1, "density": 0, "coverage": 0}
    # 2 away from it: within the reach of the fifth nearest of 50 and, since 1 + 4 < 9, of 49 and 51 and so on to 2 away
    nearer = manifold_figures(real, torch.cat([away - torch.tensor([[0.0, 1.0]]), real[1:] + 1000]))
    assert nearer["precision"] == 0.01 and nearer["coverage"] == 0.05 and nearer["density"] == 5 / 500


# ----------------------------------------------------------------------------------------------------------------------
# The networks that look

def test_fit_has_nesterovs_momentum():
    """Three updates by hand. OneCycleLR has the momentum fall from 0.95 to 0.85 while the rate rises to its peak, and
    rise again as it falls: here from a little after the peak."""
    images = torch.randint(0, 256, (12, 1, 28, 28), dtype=torch.uint8, generator=seeded())
    labels, (ours, theirs) = torch.arange(12) % 10, (DigitNet(2, 10).double() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    fit(theirs, images, labels, epochs=3, batch_size=12, lr=0.1, generator=seeded(),
        change=lambda x, generator: x.double())
    momenta = [torch.zeros_like(p) for p in ours.parameters()]
    peak = 0.15 * 3 - 1  # before the first step
    for step in range(3):
        fall = (1 + math.cos(math.pi * (step - peak) / (2 - peak))) / 2
        lr, mu = 0.1 / 25 / 1e4 + (0.1 - 0.1 / 25 / 1e4) * fall, 0.95 - 0.1 * fall
        loss = F.cross_entropy(ours(to_float(images).double())[1], labels)
        for p, v, gradient in zip(ours.parameters(), momenta, torch.autograd.grad(loss, list(ours.parameters()))):
            gradient = gradient + 5e-4 * p.detach()
            v.mul_(mu).add_(gradient) if step else v.copy_(gradient)
            with torch.no_grad():
                p -= lr * (gradient + mu * v)
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(other, mine.detach(), rtol=0, atol=2e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The command among all digits, through the eyes of a classifier that knows them by heart

@pytest.fixture(scope="module")
def mnist():
    """train (True or False) -> all of its images and labels."""
    return {train: load_dataset("MNIST", train=train) for train in (True, False)}


@pytest.fixture(scope="module")
def by_heart(mnist):
    """classify(classifier, images), quickly: features that tell the classes apart, and how the digit is written."""
    known = {}
    for images, labels in mnist.values():
        known |= zip(map(bytes, images.flatten(1).numpy()), labels.tolist())
    look = torch.randn(784, 12, generator=seeded()) / 100

    def see(classifier, images):
        labels = torch.tensor([known.get(bytes(image), i % 10) for i, image in enumerate(images.flatten(1).numpy())])
        one_hot = F.one_hot(labels, 10)
        return torch.cat([3 * one_hot, to_float(images).flatten(1) @ look], dim=1).double(), one_hot.float()
    return see


@pytest.fixture
def quick(monkeypatch, mnist, by_heart):
    """evaluate.evaluate without what takes long: its dict of figures, as a function of images and labels."""
    monkeypatch.setitem(DATASETS, "MNIST", lambda root, train: mnist[train])
    monkeypatch.setattr(evaluate, "classify", by_heart)
    monkeypatch.setattr(evaluate, "load_classifier", lambda device: None)
    monkeypatch.setattr(evaluate, "two_sample_figures", lambda *args: {})
    monkeypatch.setattr(evaluate, "nearest_neighbours", lambda images, others, *args, **how: (
        torch.rand(len(images), generator=seeded(len(images)), dtype=torch.float64) + 0.1, torch.arange(len(images))))
    for figure in "kid", "manifold":
        monkeypatch.setitem(FEWEST, figure, math.inf)
    return lambda *args, **how: evaluate.evaluate(*args, **how)[0]


@pytest.mark.parametrize("drawn, told", [("freely", False), ("freely", True), ("by classes", True)])
def test_real_digits_are_as_far_as_real_digits(quick, mnist, by_heart, monkeypatch, drawn, told):
    """1,000 training digits as samples: freely drawn without labels, freely drawn with their own, and with the classes
    in their shares. The control: freely drawn ones are farther than others whose classes are in their shares."""
    for figures in "pixel_figures", "tell_figures":
        monkeypatch.setattr(evaluate, figures, lambda *args: {})
    images, labels = mnist[True]
    in_shares = torch.arange(10).repeat_interleave(torch.tensor([99, 112, 99, 102, 97, 90, 99, 105, 98, 99]))
    ratios = []
    for seed in range(5):
        wanted = in_shares if drawn == "by classes" else None
        chosen = real_draws(labels, 1000, 100 + seed, wanted)[0]
        figures = quick(images[chosen], labels[chosen] if told else None, seed=seed)
        ratios.append(figures["frechet_ratio"])
        assert figures["frechet_ratio_stderr"] == pytest.approx(figures["frechet_stderr"] / figures["frechet_real"])
        assert figures["frechet_ratio_real"] == 1
    # Chance in the shares of ten classes moves one ratio by about a half.
    assert np.mean(ratios) == pytest.approx(1, abs=0.2 if told else 0.6), ratios
    if drawn == "freely" and not told:
        test, _ = by_heart(None, mnist[False][0])
        free, fair = (np.mean([frechet_distance(by_heart(None, images[draw])[0], test)
                               for draw in real_draws(labels, 1000, 0, how)]) for how in (None, in_shares))
        assert free > 2 * fair


def test_copied_is_a_share_among_as_many_test_digits_as_that_of_real_digits(quick, monkeypatch):
    """Nearer than any of m: by chance that is the share 1 / (m + 1). Of them 7,000 samples leave half and no fewer."""
    images, compared = load_dataset("MNIST", train=True)[0], []
    figures_of = evaluate.memorisation_figures
    monkeypatch.setattr(evaluate, "memorisation_figures", lambda distances, others: compared.append((distances, others))
                        or figures_of(distances, others))
    for n, left in (300, 9700), (7000, 5000):
        compared.clear()
        figures = quick(images[:n])
        (of_samples, others), (of_test, same) = compared
        assert len(others) == left and torch.equal(others, same) and len(of_test) == min(n, left)
        assert figures["copied"] == (of_samples < others.min()).double().mean()
        assert figures["copied_real"] == (of_test < others.min()).double().mean()
    tie = torch.tensor([1.0, 2.0]).double()
    assert figures_of(tie, tie)["copied"] == 0


def test_there_are_64_pairs_in_the_picture(quick, tmp_path):
    """In eight rows of eight, twice as large. The nearest are first."""
    images, _ = load_dataset("MNIST", train=True)
    quick(images[:300], pairs=tmp_path / "pairs.png")
    picture = iio.imread(tmp_path / "pairs.png")
    assert picture.shape == (2 * (8 * 30 + 2), 2 * (16 * 30 + 2))
    assert (picture[-58:-4, -58:-4] > 100).any()  # there is a digit in the last place
    distances = torch.rand(300, generator=seeded(300), dtype=torch.float64)
    assert (picture[4:60:2, 4:60:2] == images[distances.argmin(), 0].numpy()).all()


def measured(tmp_path, images, labels):
    """What python evaluate.py writes and prints of them."""
    np.savez(tmp_path / "x.npz", images=images, labels=labels)
    result = call(evaluate, "--npz", tmp_path / "x.npz", "--json", tmp_path / "x.json", "--pairs", tmp_path / "x.png")
    assert result.code == 0 and result.err == "" and "nan" not in result.out.lower()
    return json.loads((tmp_path / "x.json").read_text()), result.out


def test_what_there_is_one_of_has_no_error(tmp_path, monkeypatch, quick):
    """Neither in the table nor in the file: one sample, or, where there are too few training digits for more, one set
    of real digits."""
    small = {train: tuple(x[:500] for x in load_dataset("MNIST", train=train)) for train in (True, False)}
    monkeypatch.setitem(DATASETS, "MNIST", lambda root, train: small[train])
    images, labels = (x.numpy() for x in small[False])
    figures, out = measured(tmp_path, images[:1], labels[:1])
    assert figures["n"] == 1 and figures["nearest_neighbour_ratio"] > 0 and "±" not in out
    assert {figures[key] for key in figures if key.endswith(("_stderr", "_low", "_high"))} == {None}
    figures, out = measured(tmp_path, images[:300], labels[:300])
    assert figures["frechet_real"] > 0 and figures["frechet_real_stderr"] is None
    line, = (line for line in out.splitlines() if line.startswith("Frechet"))
    assert line.count("±") == 1 and figures["frechet_stderr"] > 0


def test_the_table_says_that_ratios_of_another_n_do_not_compare(capsys):
    figures = evaluate.merge({"frechet": 0.02, "frechet_ratio": 2.74}, {"frechet": 0.0073, "frechet_ratio": 1.0}, {})
    evaluate.print_table(figures)
    line, = (line for line in capsys.readouterr().out.splitlines() if "2.7400" in line)
    assert "same n" in line


def test_validation_has_no_label_that_training_lacks(monkeypatch):
    labels = torch.tensor([0, 1, 2, 5])
    monkeypatch.setitem(DATASETS, "MNIST", lambda root, train: (torch.zeros(4, 1, 4, 4, dtype=torch.uint8), labels))
    settings = {"dataset": "MNIST", "seed": 0, "timesteps": 20, "classes": 5, "label_dropout": 0.1, "batch_size": 4,
                "image_size": 4, "image_channels": 1}
    with pytest.raises(ValueError, match="MNIST has the label 5 among its test images, and none above 4 to train on"):
        Validation(settings, "data", torch.device("cpu"))
    Validation(settings | {"classes": 6}, "data", torch.device("cpu"))


def test_validation_is_on_a_random_subset_that_no_setting_changes(monkeypatch):
    """The first of MNIST's test digits are easier than the last. Here each digit's first two pixels say its number."""
    number = torch.arange(10_000)
    images = torch.zeros(10_000, 1, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = number // 256, number % 256
    monkeypatch.setitem(DATASETS, "MNIST", lambda root, train: (images, number % 10))
    chosen = []
    for seed in 0, 1:
        settings = {"dataset": "MNIST", "seed": seed, "timesteps": 20 + seed, "classes": 10, "label_dropout": 0.1,
                    "batch_size": 64 + seed, "image_size": 4, "image_channels": 1}
        validation = Validation(settings, "data", torch.device("cpu"))
        numbers = validation.images[:, 0, 0, 0].long() * 256 + validation.images[:, 0, 0, 1]
        assert torch.equal(validation.labels, numbers % 10)
        chosen.append(numbers)
    assert torch.equal(*chosen) and len(chosen[0].unique()) == len(chosen[0]) == 2000
    # 500 of each quarter, give or take the chance of drawing 2,000 of 10,000 without putting back: 17
    assert (torch.bincount(chosen[0] // 2500) - 500).abs().max() < 4 * 17
    # and each part of the validation, which has timesteps of its own, has digits from all over
    assert all(abs(part.double().mean() - 5000) < 4 * 2887 / math.sqrt(500) for part in chosen[0].split(500))
