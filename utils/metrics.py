"""The ruler: how far samples are from real digits, what gives them away, whether they are copies, whether a network
can tell the two apart, and the bound on their likelihood.

How to read the Frechet distance: it sees the shares of the classes too. Of the test digits 11.4 % are ones and 8.9 %
fives, so a generator asked for 0, 1, 2, ... in turn does not reach the distance of real digits (EXPERIMENTS.md, The
ruler).
"""
import math
from functools import lru_cache, partial
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ddpm import ImageNoise, fold_in
from utils.classifier import DigitNet, classify, fit
from utils.data import load_dataset, to_float
from utils.images import load_images

REAL_SETS = 5  # sets of training digits whose mean stands for real digits
GROUPS = 20  # that the jackknife leaves out in turn
# Below this many samples a figure says more about their number than about the generator, and is left out.
FEWEST = {"frechet": 256, "kid": 100, "manifold": 100, "two_sample": 200}


class Validation:
    """L_simple on test images at fixed timesteps with fixed noise, so that one report compares with the next."""

    IMAGES = 2000

    def __init__(self, settings, root, device):
        images, labels, _ = load_images(settings, root, train=False)
        shape = [settings["image_channels"], settings["image_size"], settings["image_size"]]
        if list(images.shape[1:]) != shape:
            raise ValueError(f"{settings['dataset']} has test images {list(images.shape[1:])}, and others, {shape}, to "
                             "train on")
        if labels.max() >= settings["classes"]:
            raise ValueError(f"{settings['dataset']} has the label {labels.max()} among its test images, and none "
                             f"above {settings['classes'] - 1} to train on")
        if settings["label_dropout"] == 1:
            labels = torch.full_like(labels, settings["classes"])  # "no label", the only one that is trained
        n = min(self.IMAGES, len(images))
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n]  # the first are easier
        self.images, self.labels = images[chosen].to(device), labels[chosen].to(device)
        self.t = torch.arange(n, device=device) * settings["timesteps"] // n  # spread over 0..T-1, in order
        self.batch_size = min(100, settings["batch_size"])

    @torch.no_grad()
    def losses(self, model):
        """The mean loss over each quarter of the timesteps, a list of 4 floats: from least to most noise."""
        losses = []
        for i in torch.arange(len(self.t)).split(self.batch_size):
            x0, y, t = to_float(self.images[i]), self.labels[i], self.t[i]
            losses.append(model.ddpm.loss(partial(model, labels=y), x0, t, ImageNoise(0, i.tolist())(x0)))
        return [quarter.mean().item() for quarter in torch.cat(losses).tensor_split(4)]


class Digits(NamedTuple):
    """Images as the figures need them: uint8 [N, 1, 28, 28], labels int64 [N] or None, and what `classify` returns."""
    images: torch.Tensor
    labels: torch.Tensor | None
    features: torch.Tensor
    probabilities: torch.Tensor


# ----------------------------------------------------------------------------------------------------------------------
# Distances between distributions. All features are float64 [N, D].

def frechet_distance(features_a, features_b):
    """The Frechet distance of two Gaussians with the means and covariances of the features, squared, as is the custom:
    Heusel et al. 2017, eq. 6.

    What is known as FID is this in the features of an Inception network. No unit; 0: means and covariances agree.
    """
    mean_a, mean_b = features_a.mean(dim=0), features_b.mean(dim=0)
    cov_a, cov_b = torch.cov(features_a.T), torch.cov(features_b.T)
    # d^2 = |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))
    # The product of covariances is not symmetric, and its root is ill-conditioned where it is nearly singular. But
    # tr (cov_a cov_b)^(1/2) is also the sum of the singular values of cov_a^(1/2) cov_b^(1/2), which always exist.
    cross = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def _root(covariance):
    """The symmetric square root of a covariance matrix [D, D], of whatever rank."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T  # rounding makes zeros slightly negative


def frechet_spread(features, reference, labels=None, seed=0):
    """The standard deviation of `frechet_distance` over other samples of the same generator, by the jackknife. With
    fewer than 1,000 samples, if they are as good as real digits, it comes out up to twice as large as it should.

    Args:
        labels: int64 [N], if the samples have each class as often as they should: then other samples would too, and
            chance in the classes is no part of it.
    """
    groups = random_groups(labels, len(features), seed)
    return jackknife(lambda keep: frechet_distance(
        features[torch.cat([group for group, kept in zip(groups, keep) if kept])], reference))


def random_groups(labels, n, seed):
    """Cuts 0..n-1 at random into GROUPS tensors of the same length, give or take one, each with the classes in the
    shares that they have in `labels` [n]; None: without regard to classes."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(n, generator=generator)
    labels = torch.zeros(n, dtype=torch.long) if labels is None else labels
    # Lined up so that any few in a row are such a group: of the m samples of a class, the i-th stands at (i + 1/2) / m.
    stands = torch.empty(n, dtype=torch.float64)
    for k in labels.unique():
        of_class = shuffled[labels[shuffled] == k]
        stands[of_class] = (torch.arange(len(of_class), dtype=torch.float64) + 0.5) / len(of_class)
    return stands.argsort(stable=True).tensor_split(GROUPS)


def jackknife(statistic):
    """The standard error of a statistic, from how much it moves as one group of the data is left out (Efron 1982).

    Args:
        statistic: callable (keep, bool [GROUPS]) -> number, computed from the groups to keep.
    """
    # variance = (G - 1) / G sum over g of (statistic without g - mean of those)^2
    return float(np.std([statistic(~g) for g in torch.eye(GROUPS, dtype=torch.bool)]) * math.sqrt(GROUPS - 1))


def kernel_distance(features, reference, labels=None, seed=0):
    """Squared maximum mean discrepancy with a cubic kernel, without bias: KID, Binkowski et al. 2018, section 4.

    Args:
        labels: int64 [N], if the samples have each class as often as they should. Then two samples share a class a
            little less often than two independent ones would, and weighting the pairs by class makes up for that.
    Returns:
        (distance, its standard error over other samples). Samples as good as the reference's give 0 on average, and so
        less than 0 at times.
    """
    (n, D), m = features.shape, len(reference)
    labels = torch.zeros(n, dtype=torch.long) if labels is None else labels
    classes = int(labels.max()) + 1
    block = torch.empty(n, dtype=torch.long)  # number of its group and class
    for g, group in enumerate(random_groups(labels, n, seed)):
        block[group] = g * classes + labels[group]
    one_hot = F.one_hot(block, GROUPS * classes).double()                           # [N, GK]
    # Sums of k over pairs of blocks; a sample and itself are not a pair. In chunks, since all of k is 0.8 GB.
    within = -(one_hot.T @ _kernel(features.square().mean(dim=1))).diag()
    across = torch.zeros(GROUPS * classes, dtype=torch.float64)
    for x, member in zip(features.split(500), one_hot.split(500)):
        within += member.T @ (_kernel(x @ features.T / D) @ one_hot)
        across += member.T @ _kernel(x @ reference.T / D).sum(dim=1)
    within, across = within.view(GROUPS, classes, GROUPS, classes), across.view(GROUPS, classes)
    counts = one_hot.sum(dim=0).view(GROUPS, classes)
    share = counts.sum(dim=0) / n
    yy = _mean_over_pairs(reference)

    def distance(keep):
        # MMD^2 = mean over x != x' of k(x, x') + mean over y != y' of k(y, y') - 2 mean over x, y of k(x, y), the means
        # over x by classes: sum over c, d of share_c share_d mean of k(x in c, x' in d)
        kept = counts[keep].sum(dim=0)                                              # [K]
        pairs = (kept[:, None] * kept - kept.diag()).clamp(min=1)
        xx = (share[:, None] * share * within[keep][:, :, keep].sum(dim=(0, 2)) / pairs).sum()
        xy = (share * across[keep].sum(dim=0) / (kept.clamp(min=1) * m)).sum()
        return (xx + yy - 2 * xy).item()

    return distance(torch.ones(GROUPS, dtype=torch.bool)), jackknife(distance)


def _kernel(dots):
    """k(x, y) = (x . y / D + 1)^3 from x . y / D."""
    base = dots + 1
    return base * base * base  # pow is ten times slower


@lru_cache(maxsize=1)  # the reference is always the same
def _mean_over_pairs(y):
    same = sum(_kernel(part @ y.T / y.shape[1]).sum() for part in y.split(500)) - _kernel(y.square().mean(dim=1)).sum()
    return (same / (len(y) * (len(y) - 1))).item()


def squared_distances(a, b):
    """|a_i - b_j|^2 for all i, j: [N, D], [M, D] -> [N, M]."""
    return (a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * (a @ b.T)).clamp(min=0)


def manifold_figures(real, fake, chunk=100, real_reach=None):
    """Do the samples lie where real digits lie, and the other way round?

    Improved precision and recall, Kynkaanniemi et al. 2019 (arXiv 1904.06991), with k = 3: the share of samples within
    reach of a real digit, and of real digits within reach of a sample, where the reach of a point is the distance to
    the k-th nearest of its own kind.
    Density and coverage, Naeem et al. 2020 (arXiv 2002.09797), with k = 5: how many real digits reach a sample, over k,
    and the share of real digits that reach a sample. An outlier with a long reach does less to them.

    Args:
        real, fake: features [N, D], the same number of each.
        real_reach: what `reaches(real)` returns, where it is known.
    Returns:
        dict: precision, recall, density, coverage.
    """
    real_reach3, real_reach5 = real_reach or reaches(real, chunk)
    fake_reach3, _ = reaches(fake, chunk)
    precision = density = 0
    recalled = torch.zeros(len(real), dtype=torch.bool)
    nearest_fake = torch.full((len(real),), torch.inf, dtype=real.dtype)
    for part, reach in zip(fake.split(chunk), fake_reach3.split(chunk)):
        d = squared_distances(part, real)                                           # [chunk, N]
        # precision = 1/M sum over fake j of [there is a real i with d_ji <= reach3_i]
        precision += (d <= real_reach3).any(dim=1).sum().item()
        # recall = 1/N sum over real i of [there is a fake j with d_ji <= reach3_j]
        recalled |= (d <= reach[:, None]).any(dim=0)
        # density = 1/(k M) sum over fake j, real i of [d_ji < reach5_i]
        density += (d < real_reach5).sum().item()
        # coverage = 1/N sum over real i of [there is a fake j with d_ji < reach5_i]
        nearest_fake = torch.minimum(nearest_fake, d.amin(dim=0))
    return {"precision": precision / len(fake), "recall": recalled.double().mean().item(),
            "density": density / (5 * len(fake)), "coverage": (nearest_fake < real_reach5).double().mean().item()}


def reaches(features, chunk=100):
    """Squared distances to the 3rd and the 5th nearest of the others, [N] each."""
    # Allocated before the loop: small results that outlive large chunks leave holes in the memory, gigabytes in all.
    nearest = torch.empty(len(features), 5, dtype=features.dtype)
    for start in range(0, len(features), chunk):
        d = squared_distances(features[start:start + chunk], features)
        d[torch.arange(len(d)), torch.arange(start, start + len(d))] = torch.inf  # not itself
        nearest[start:start + chunk] = d.topk(5, largest=False).values
    return nearest[:, 2], nearest[:, 4]


def distribution_figures(samples, test, seed, reach=None):
    """How far the samples are from the test digits, in the classifier's features. Both are Digits. Figures for which
    the samples are too few are None. `reach` is the test digits' own, where it is known: see `manifold_figures`."""
    n = len(samples.features)
    figures = dict.fromkeys(("frechet", "kid", "kid_stderr", "precision", "recall", "density", "coverage"))
    if n >= FEWEST["frechet"]:
        figures["frechet"] = frechet_distance(samples.features, test.features)
    if n >= FEWEST["kid"]:
        figures["kid"], figures["kid_stderr"] = kernel_distance(samples.features, test.features, samples.labels, seed)
    if n >= FEWEST["manifold"]:
        n = min(n, len(test.features))
        figures |= manifold_figures(test.features[:n], samples.features[:n], real_reach=reach)
    return figures


def real_draws(pool, n, seed, labels=None):
    """Which real digits take the samples' place: up to REAL_SETS tensors of n places in `pool`, the labels [N] of real
    digits, no place in two of them.

    Args:
        labels: int64 [n], those of the samples: each set has as many digits of each class. (Drawn freely, they would
            lie farther from the test digits, by that chance alone.) None: drawn freely, as such samples are.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pool), generator=generator)
    if labels is None:
        return order.split(n)[:min(REAL_SETS, len(pool) // n)]
    wanted = {k: (labels == k).sum().item() for k in labels.unique().tolist()}
    places = {k: order[pool[order] == k] for k in wanted}
    sets = max(1, min(REAL_SETS, *(len(places[k]) // wanted[k] for k in wanted)))
    drawn = []
    for s in range(sets):
        # If a class has too few digits, they repeat.
        of_class = [places[k].repeat(1 + m // len(places[k]))[s * m:(s + 1) * m] for k, m in wanted.items()]
        drawn.append(torch.cat(of_class)[torch.randperm(n, generator=generator)])
    return drawn


# ----------------------------------------------------------------------------------------------------------------------
# Figures that need no distribution

def class_figures(samples):
    """What the classifier reads in the samples.

    Returns:
        dict: class_entropy, of the histogram of classes (1: all ten equally often, 0: one only); confident, the share
        that it gives a probability above 0.9; label_agreement, how often it reads what the label says (None without).
    """
    classes = samples.probabilities.argmax(dim=1)
    share = torch.bincount(classes, minlength=10).double() / len(classes)
    return {
        # H = -sum p log p / log 10
        "class_entropy": -torch.special.xlogy(share, share).sum().item() / math.log(10) + 0.0,
        "confident": (samples.probabilities.amax(dim=1) > 0.9).double().mean().item(),
        "label_agreement": None if samples.labels is None else (classes == samples.labels).double().mean().item(),
    }


def pixel_figures(images, test_images):
    """How grey levels are spread over the pixels. What looks black, and is not, shows here.

    Returns:
        dict: zeros, the share of pixels that are 0; faint, of those from 1 to 12; grey_distance, the total variation
        between the histogram of grey levels and that of the test digits (0: the same, 1: not one level in common).
    """
    share, reference = (torch.bincount(x.flatten().int(), minlength=256).double() / x.numel()
                        for x in (images, test_images))
    return {"zeros": share[0].item(), "faint": share[1:13].sum().item(),
            "grey_distance": (share - reference).abs().sum().item() / 2}


def tell_figures(images):
    """What gives samples away, in plain figures, where a classifier only says that they are not real.

    Args:
        images: uint8 [N, 1, 28, 28].
    Returns:
        dict: box, the share of images with a longest side of exactly 20 pixels around all that is not 0, and centred,
        that of images whose centre of mass is within half a pixel of the pixel (14, 14), counted from 0, in both
        directions, which is how MNIST was made; specks, pixels that are not 0 and have no such neighbour among the
        eight, per image; ink, the share of the commonest level among an image's pixels from 252 to 255, as each digit
        was written in one ink (None if no image has such pixels); levels, different grey levels in an image.
    """
    lit = images[:, 0] > 0                                                          # [N, 28, 28]
    sides = []
    for across in lit.any(dim=2).int(), lit.any(dim=1).int():                       # rows with ink, columns with ink
        first, after_last = across.argmax(dim=1), across.shape[1] - across.flip(1).argmax(dim=1)
        sides.append(after_last - first)
    mass, offsets = images[:, 0].double(), torch.arange(28, dtype=torch.float64) - 14
    # centre = sum over i of (i - 14) x_i / sum of all x, along columns and along rows i; NaN if all is black
    centre = torch.stack([mass.sum(dim=across) @ offsets for across in (1, 2)]) / mass.sum(dim=(1, 2))
    around = F.avg_pool2d(lit[:, None].float(), 3, stride=1, padding=1, divisor_override=1)[:, 0]  # how many of nine
    bright = torch.stack([(images == level).flatten(1).sum(dim=1) for level in range(252, 256)]).double()  # [4, N]
    some = bright.sum(dim=0) > 0
    levels = torch.zeros(len(images), 256, dtype=torch.bool).scatter_(1, images.flatten(1).long(), True)
    return {"box": (torch.maximum(*sides) == 20).double().mean().item(),
            "centred": (centre.abs().amax(dim=0) <= 0.5).double().mean().item(),
            "specks": (lit & (around == 1)).sum().item() / len(images),
            "ink": (bright.amax(dim=0) / bright.sum(dim=0))[some].mean().item() if some.any() else None,
            "levels": levels.sum(dim=1).double().mean().item()}


@torch.no_grad()
def nearest_neighbours(images, others, device="cpu", chunk=500, name="nearest neighbours"):
    """For each image the nearest among `others`, by the Euclidean distance of pixels from 0 to 1.

    Args:
        images, others: uint8 [N, 1, H, W] and [M, 1, H, W].
    Returns:
        distances float64 [N], which are exact (a copy's is 0), and indices int64 [N], on the CPU.
    """
    pool = others.flatten(1).to(device, torch.float32) / 255
    norms = pool.square().sum(dim=1)
    indices = torch.empty(len(images), dtype=torch.long)
    for start in tqdm(range(0, len(images), chunk), desc=name, unit="chunk", leave=False, disable=None):
        part = images[start:start + chunk].flatten(1).to(device, torch.float32) / 255
        # |part|^2 does not change which is nearest
        indices[start:start + chunk] = (norms - 2 * (part @ pool.T)).argmin(dim=1).cpu()
    difference = images.flatten(1).cpu().int() - others.flatten(1).cpu()[indices].int()
    return difference.square().sum(dim=1).double().sqrt() / 255, indices


def memorisation_figures(distances, test_distances):
    """Are they copies? From distances to the nearest training digit, of the samples and of test digits.

    Returns:
        dict: nearest_neighbour_ratio, of the mean distances (1: as far as new digits are, 0: copies; but blurred digits
        come out below 1 as well, as they are nearer to everything), its standard error nearest_neighbour_ratio_stderr
        (None of one sample alone), and copied, the share of samples nearer than any test digit is.
    """
    ratio = (distances.mean() / test_distances.mean()).item()
    # the error of a quotient: relative errors add in squares
    relative = [(d.var(correction=0) / len(d) / d.mean() ** 2).item() if d.mean() > 0 else 0.0
                for d in (distances, test_distances)]
    stderr = ratio * math.sqrt(sum(relative)) if len(distances) > 1 else None
    return {"nearest_neighbour_ratio": ratio, "nearest_neighbour_ratio_stderr": stderr,
            "copied": (distances < test_distances.min()).double().mean().item()}


def two_sample_figures(images, others, device="cpu", seed=0, epochs=8, repeats=3):
    """The classifier two-sample test, Lopez-Paz & Oquab 2017 (arXiv 1610.06545): can a fresh network, trained on half
    of both sets, tell the other halves apart?

    It works at full resolution and trains for long enough: a small strided net sees nothing where this one is right
    nearly always. One network's result moves by several hundredths with its seed, so it is the mean of `repeats`.

    Args:
        images, others: uint8 [N, 1, 28, 28], as many of each as the shorter one has are used.
    Returns:
        dict: two_sample_accuracy on the halves held out (0.5: it cannot, 1: always), and the lowest and the highest of
        the three, two_sample_accuracy_low and _high.
    """
    n = min(len(images), len(others))
    half = n // 2
    truth = torch.arange(2).repeat_interleave(half).to(device)
    accuracies = []
    for repeat in range(repeats):
        generator = torch.Generator().manual_seed(fold_in(seed, repeat))
        mixed = [x[torch.randperm(len(x), generator=generator)[:n]].to(device) for x in (images, others)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold_in(seed, repeat))
            net = DigitNet(16, 2).to(device)
        # With few images more passes, so that there are enough steps.
        fit(net, torch.cat([x[:half] for x in mixed]), truth, epochs=epochs * max(1, 2000 // half),
            batch_size=min(100, half), lr=0.05, generator=generator, name="two-sample test")
        _, probabilities = classify(net, torch.cat([x[half:] for x in mixed]))
        right = probabilities.argmax(dim=1) == torch.arange(2).repeat_interleave(n - half)
        accuracies.append(right.double().mean().item())
    return {"two_sample_accuracy": fmean(accuracies), "two_sample_accuracy_low": min(accuracies),
            "two_sample_accuracy_high": max(accuracies)}


# ----------------------------------------------------------------------------------------------------------------------
# The bound on the likelihood

def bits_figures(model, images, seed=0, exact=False, estimate_images=2000, strata=10, batch_size=128):
    """Bits per dimension: the variational bound of Ho et al. 2020, eq. 5, without labels, averaged over test digits.

    The bound is a sum over all timesteps, each a call of the network. By default it is estimated: the timesteps are cut
    into strata, short ones where there is least noise (t = 0 is one of its own) and long ones towards T-1, and from
    each stratum one timestep is drawn per image and stands for all of it. That is without bias, and the standard error
    over images covers both the choice of images and that of timesteps.

    Args:
        model: a diffusion_model.Model.
        images: uint8 [N, C, H, W]; the estimate takes the first `estimate_images`, so they should be in random order.
        exact: every timestep of every image, T * N calls of the network.
    Returns:
        dict: bits_per_dim, its standard error bits_per_dim_stderr, and its parts: bits_prior (L_T), bits_diffusion (the
        sum of L_1 to L_{T-1}) and bits_decoder (L_0).
    """
    T, device = model.ddpm.T, next(model.network.parameters()).device
    if exact:
        strata_edges = list(range(T + 1))
    else:
        images = images[:estimate_images]
        # 0, 1, ... T: geometric, short where there is least noise
        strata_edges = sorted({0} | {round(T ** (k / strata)) for k in range(strata + 1)})
    generator = torch.Generator().manual_seed(seed)
    parts = []                                                                      # L_T, L_1 to L_{T-1}, L_0
    with tqdm(total=len(images) * (len(strata_edges) - 1), desc="bits per dimension", leave=False, disable=None) as bar:
        for batch in images.split(batch_size):
            x0 = to_float(batch.to(device))
            terms = []
            for first, end in zip(strata_edges, strata_edges[1:]):
                t = torch.randint(first, end, (len(x0),), generator=generator).to(device)
                noise = torch.randn(x0.shape, generator=generator).to(device)
                # sum over t in the stratum of L_t = E over t uniform in the stratum of (length L_t)
                terms.append((end - first) * model.ddpm.bound_term(model, x0, t, noise))
                bar.update(len(x0))
            terms, prior = torch.stack(terms, dim=1).cpu().double(), model.ddpm.prior_bits(x0).cpu().double()
            parts.append(torch.stack([prior, terms[:, 1:].sum(dim=1), terms[:, 0]], dim=1))
    parts = torch.cat(parts)                                                        # [N, 3]
    prior, diffusion, decoder = parts.mean(dim=0).tolist()
    return {"bits_per_dim": prior + diffusion + decoder,
            "bits_per_dim_stderr": (parts.sum(dim=1).std() / math.sqrt(len(parts))).item() if len(parts) > 1 else None,
            "bits_prior": prior, "bits_diffusion": diffusion, "bits_decoder": decoder}
