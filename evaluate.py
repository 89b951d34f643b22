"""How good are the samples? python evaluate.py measures the shipped model, --npz FILE any generator of 28x28 digits.

Every figure comes with two others of its kind, measured in the same run: the floor, for which real digits take the
samples' place, and, where it tells something, the ceiling, for which pure noise does. The references are the 10,000
test digits, which neither a model nor the classifier was trained on.

The story: read or draw the samples, look at them through the classifier that ships with the repo, compare them with the
test digits (Frechet and kernel distance, precision and recall, density and coverage), with the training digits (are
they copies?), pixel by pixel (are they black where digits are black?), and let a network of its own try to tell them
apart. With a checkpoint there is also the bound on its likelihood.

How to read the Frechet distance: at n = 10,000 training digits come out at 0.016, with a standard deviation of 0.004
over draws. (That the classifier knows them makes no difference one can measure: 5,000 of them are as far from 5,000
test digits as 5,000 other test digits are.) It sees the shares of the classes too. Training digits with each class
equally often come out at 0.039, for MNIST has 11.4 % ones and 8.9 % fives: a generator asked for 0, 1, 2, ... in turn
starts from there.
"""
import hashlib
import io
import json
import math
import reprlib
import time
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from checkpoint import atomic_write, check_target, load_model
from cli import (EVERYWHERE, Parser, UsageError, add_sampling_flags, generate, has_bf16, integer, known_classes,
                 knows_both, path, pick_device, run, sampling_defaults)
from data import DATASETS, enlarge, load_dataset, make_grid, save_png, to_float, to_uint8

CLASSIFIER = Path(__file__).resolve().parent / "assets" / "classifier.pt"
# 99.76 % of the test digits right, in the half precision that ships. Another classifier is another ruler.
CLASSIFIER_SHA256 = "7741364bb2321cebc82761739eb1dcca5ddec09a82286872da93525b485d2812"
CLASSIFIER_WIDTH = 32

LARGEST_ARCHIVE = 1_000_000  # images; 784 MB once unpacked
LARGEST_HEADER = 1 << 14  # bytes, of an array in it; numpy refuses what is longer, but reads all of it before
FLOOR_SETS = 5  # sets of training digits that the floor is the mean of
GROUPS = 20  # that the jackknife leaves out in turn
PAIRS = 64  # in the picture of nearest neighbours
# Below these many samples a figure says more about their number than about the generator, and is left out.
FEWEST = {"frechet": 256, "kid": 100, "manifold": 100, "two_sample": 200}

# By sampler: few ancestral steps are hopeless, and many deterministic ones no better than fifty.
SWEEP_STEPS = {"dpm++": (5, 8, 10, 15, 20, 50), "ddim": (5, 10, 20, 50), "ddpm": (20, 100, 250, 1000)}
SWEEP_GUIDANCE = (0.0, 0.5, 1.0, 1.25, 1.5, 2.0, 3.0)


# ----------------------------------------------------------------------------------------------------------------------
# The classifier, whose last hidden layer is the feature space of the distances

class DigitNet(nn.Module):
    """Six convolutions with batch norm, the first two at full resolution, and a mean over what is left of the image.

    Args:
        width: channels at full resolution; the features are four times as many.
        outputs: number of logits.
    """

    def __init__(self, width, outputs):
        super().__init__()

        def convolution(channels_in, channels_out):
            return [nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out),
                    nn.ReLU()]

        self.body = nn.Sequential(
            *convolution(1, width), *convolution(width, width),
            nn.MaxPool2d(2),                                                        # [B, width, 14, 14]
            *convolution(width, 2 * width), *convolution(2 * width, 2 * width),
            nn.MaxPool2d(2),                                                        # [B, 2 width, 7, 7]
            *convolution(2 * width, 4 * width), *convolution(4 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1), nn.Flatten())                                  # [B, 4 width]
        self.head = nn.Linear(4 * width, outputs)
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def forward(self, x):
        """Float [B, 1, 28, 28] in [-1, 1] -> features [B, 4 width], logits [B, outputs]."""
        features = self.body((x + 1).contiguous(memory_format=torch.channels_last))  # black is 0, as is the padding
        return features, self.head(features)


def fit(net, images, labels, *, epochs, batch_size, lr, generator, change=None, mixed=False, name=""):
    """Trains a DigitNet on uint8 images [N, 1, 28, 28] and labels [N], all on one device; leaves it in eval mode.

    Args:
        change: callable (x, generator) -> x, applied to each batch: augmentation.
        mixed: multiply in bfloat16: on a CPU that has it twice as fast.
    """
    batches = max(1, len(images) // batch_size)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * batches, pct_start=0.15)
    net.train()
    with tqdm(total=epochs * batches, desc=name, unit="step", leave=False, disable=None) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator).to(images.device)
            for batch in order[:batches * batch_size].split(batch_size):
                x = to_float(images[batch])
                if change:
                    x = change(x, generator)
                with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed):
                    _, logits = net(x)
                loss = F.cross_entropy(logits.float(), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return net.eval().requires_grad_(False)


def random_affine(x, generator):
    """Turns (by up to 15 degrees), shears, scales (by up to 15 %) and moves (by up to 2 pixels) each image at random.

    Float [B, 1, H, W] in [-1, 1]; what comes in from outside is black.
    """
    u = torch.rand(6, len(x), generator=generator).to(x.device) * 2 - 1                # [6, B], in -1..1
    angle, shear, wide, high = 0.26 * u[0], 0.26 * u[1], 1 + 0.15 * u[2], 1 + 0.15 * u[3]
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.stack([wide * cos, high * (shear * cos - sin), u[4] * 2 / 14,       # 14: half of the image is 1
                          wide * sin, high * (shear * sin + cos), u[5] * 2 / 14], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, x.shape, align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def train_classifier(path, device, seed=0, epochs=14):
    """Trains the classifier on the 60,000 training digits and writes it to `path` in half precision.

    Five minutes on two CPU cores that have bfloat16. Prints its accuracy on the test digits, and its checksum.
    """
    images, labels = load_dataset("MNIST", train=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitNet(CLASSIFIER_WIDTH, 10).to(device)
    fit(net, images.to(device), labels.to(device), epochs=epochs, batch_size=250, lr=0.1, change=random_affine,
        mixed=has_bf16(device), generator=torch.Generator().manual_seed(seed), name="classifier")
    with atomic_write(path) as file:
        torch.save({name: value.half() if value.is_floating_point() else value
                    for name, value in net.cpu().state_dict().items()}, file)

    checksum = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    images, labels = load_dataset("MNIST", train=False)
    _, probabilities = classify(load_classifier(device, path, checksum), images)
    accuracy = (probabilities.argmax(dim=1) == labels).double().mean().item()
    print(f"{path}: {accuracy:.2%} of the test digits right, SHA-256 {checksum}")
    print(f"To measure with it, copy it to {CLASSIFIER} and set CLASSIFIER_SHA256 in evaluate.py. The figures it gives "
          "cannot be compared with those of another classifier.")


def load_classifier(device="cpu", path=CLASSIFIER, checksum=CLASSIFIER_SHA256):
    """The classifier that ships with the repo, in eval mode.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its SHA-256 sum is not `checksum`: figures from it could not be compared with any other.
    """
    content = Path(path).read_bytes()
    if hashlib.sha256(content).hexdigest() != checksum:
        raise ValueError(f"{path} is not the classifier that this code measures with (its SHA-256 sum is another); "
                         "restore it with git checkout")
    net = DigitNet(CLASSIFIER_WIDTH, 10)
    net.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    return net.eval().requires_grad_(False).to(device)


@torch.no_grad()
def classify(classifier, images, chunk=250):
    """Looks at images through the classifier.

    Args:
        images: uint8 [N, 1, 28, 28], on any device.
    Returns:
        features float64 [N, 128] and class probabilities float32 [N, 10], on the CPU.
    """
    device = classifier.head.weight.device
    features = torch.empty(len(images), classifier.head.in_features, dtype=torch.float64)
    probabilities = torch.empty(len(images), classifier.head.out_features)
    for start in tqdm(range(0, len(images), chunk), desc="classifier", unit="chunk", leave=False, disable=None):
        part = slice(start, start + chunk)
        seen, logits = classifier(to_float(images[part].to(device)))
        features[part], probabilities[part] = seen.cpu(), logits.softmax(dim=1).cpu()
    return features, probabilities


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


def frechet_spread(features, reference, seed=0):
    """The standard deviation of `frechet_distance` over other samples of the same generator, by the jackknife.

    Next to the floor it comes out up to 1.5 times too large: there the distance is no longer linear in the samples.
    """
    groups = shuffled_groups(features, seed)
    return jackknife(lambda keep: frechet_distance(torch.cat([x for x, kept in zip(groups, keep) if kept]), reference))


def shuffled_groups(x, seed):
    """Cuts x [N, ...] at random into GROUPS parts of the same size, give or take one."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))].tensor_split(GROUPS)


def jackknife(statistic):
    """The standard error of a statistic, from how much it moves as one group of the data is left out (Efron 1982).

    Args:
        statistic: callable (keep, bool [GROUPS]) -> number, computed from the groups to keep.
    """
    # variance = (G - 1) / G sum over g of (statistic without g - mean of those)^2
    return float(np.std([statistic(~g) for g in torch.eye(GROUPS, dtype=torch.bool)]) * math.sqrt(GROUPS - 1))


def kernel_distance(features_a, features_b, seed=0):
    """Squared maximum mean discrepancy with a cubic kernel, without bias: KID, Binkowski et al. 2018, section 4.

    Returns:
        (distance, standard error). Two sets from one distribution give 0 on average, and so less than 0 at times.
    """
    groups = shuffled_groups(features_a, seed) + shuffled_groups(features_b, seed)
    sizes_a, sizes_b = torch.tensor([len(group) for group in groups]).view(2, GROUPS)

    def kernel(dots):
        # k(x, y) = (x . y / D + 1)^3
        base = dots / features_a.shape[1] + 1
        return base * base * base  # pow is ten times slower

    # Summed over each pair of groups, but for the pairs of a sample and itself: [2 GROUPS, 2 GROUPS]. As numbers, since
    # small tensors that outlive the large ones between them leave holes in the memory: here up to 3 GB of them.
    sums = torch.tensor([[kernel(x @ y.T).sum().item() for y in groups] for x in groups], dtype=torch.float64)
    sums -= torch.tensor([kernel(x.square().sum(dim=1)).sum().item() for x in groups], dtype=torch.float64).diag()
    aa, ab, bb = sums[:GROUPS, :GROUPS], sums[:GROUPS, GROUPS:], sums[GROUPS:, GROUPS:]

    def distance(keep):
        # MMD^2 = mean over x != x' of k(x, x') + mean over y != y' of k(y, y') - 2 mean over x, y of k(x, y)
        n, m = sizes_a[keep].sum(), sizes_b[keep].sum()
        within = aa[keep][:, keep].sum() / (n * (n - 1)) + bb[keep][:, keep].sum() / (m * (m - 1))
        return (within - 2 * ab[keep][:, keep].sum() / (n * m)).item()

    return distance(torch.ones(GROUPS, dtype=torch.bool)), jackknife(distance)


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
        real_reach: what `_reach(real)` returns, where it is known.
    Returns:
        dict: precision, recall, density, coverage.
    """
    real_reach3, real_reach5 = real_reach or _reach(real, chunk)
    fake_reach3, _ = _reach(fake, chunk)
    precision = density = 0
    recalled = torch.zeros(len(real), dtype=torch.bool)
    nearest_fake = torch.full((len(real),), torch.inf, dtype=real.dtype)
    for part, reach in zip(fake.split(chunk), fake_reach3.split(chunk)):
        d = squared_distances(part, real)                                           # [chunk, N]
        # precision = 1/M sum over fake j of [there is a real i with d_ji <= reach3_i]
        precision += (d <= real_reach3).any(dim=1).sum().item()
        # recall = 1/N sum over real i of [there is a fake j with d_ji <= reach3_j]
        recalled |= (d <= reach[:, None]).any(dim=0)
        # density = 1/(k M) sum over fake j, real i of [d_ji <= reach5_i]
        density += (d <= real_reach5).sum().item()
        # coverage = 1/N sum over real i of [there is a fake j with d_ji <= reach5_i]
        nearest_fake = torch.minimum(nearest_fake, d.amin(dim=0))
    return {"precision": precision / len(fake), "recall": recalled.double().mean().item(),
            "density": density / (5 * len(fake)), "coverage": (nearest_fake <= real_reach5).double().mean().item()}


def _reach(features, chunk=100):
    """Squared distances to the 3rd and the 5th nearest of the others, [N] each."""
    # Allocated before the loop: small results that outlive large chunks leave holes in the memory, gigabytes in all.
    nearest = torch.empty(len(features), 5, dtype=features.dtype)
    for start in range(0, len(features), chunk):
        d = squared_distances(features[start:start + chunk], features)
        d[torch.arange(len(d)), torch.arange(start, start + len(d))] = torch.inf  # not itself
        nearest[start:start + chunk] = d.topk(5, largest=False).values
    return nearest[:, 2], nearest[:, 4]


def distribution_figures(samples, test, seed, reach=None):
    """How far the samples are from the test digits, in the classifier's features. Both are Digits; figures that so few
    samples do not bear are None. `reach` is the test digits' own, where it is known: see `manifold_figures`."""
    n = len(samples.features)
    figures = dict.fromkeys(("frechet", "kid", "kid_stderr", "precision", "recall", "density", "coverage"))
    if n >= FEWEST["frechet"]:
        figures["frechet"] = frechet_distance(samples.features, test.features)
    if n >= FEWEST["kid"]:
        figures["kid"], figures["kid_stderr"] = kernel_distance(samples.features, test.features, seed)
    if n >= FEWEST["manifold"]:
        n = min(n, len(test.features))
        figures |= manifold_figures(test.features[:n], samples.features[:n], real_reach=reach)
    return figures


def floor_draws(labels, n, seed):
    """Which real digits take the samples' place: up to FLOOR_SETS tensors of n places in `labels` [N], no place in two
    of them. n must not be larger than N.

    Each set has the classes in the shares that they have in `labels`, as our samples have them. Digits drawn without
    regard to their class would lie farther from the test digits, by that chance alone.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    # Lined up so that any n in a row are such a set: of the m digits of a class, the i-th stands at (i + 1/2) / m.
    stands = torch.empty(len(labels), dtype=torch.float64)
    for k in labels.unique():
        of_class = shuffled[labels[shuffled] == k]
        stands[of_class] = (torch.arange(len(of_class), dtype=torch.float64) + 0.5) / len(of_class)
    line = stands.argsort(stable=True)
    return [line[k * n:(k + 1) * n][torch.randperm(n, generator=generator)]
            for k in range(min(FLOOR_SETS, len(labels) // n))]


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
        come out below 1 as well, as they are nearer to everything), its standard error nearest_neighbour_ratio_stderr,
        and copied, the share of samples nearer than any test digit is.
    """
    ratio = (distances.mean() / test_distances.mean()).item()
    # the error of a quotient: relative errors add in squares
    relative = [(d.var(correction=0) / len(d) / d.mean() ** 2).item() if d.mean() > 0 else 0.0
                for d in (distances, test_distances)]
    return {"nearest_neighbour_ratio": ratio, "nearest_neighbour_ratio_stderr": ratio * math.sqrt(sum(relative)),
            "copied": (distances < test_distances.min()).double().mean().item()}


def two_sample_figures(images, others, device="cpu", seed=0, epochs=8):
    """The classifier two-sample test, Lopez-Paz & Oquab 2017 (arXiv 1610.06545): can a fresh network, trained on half
    of both sets, tell the other halves apart?

    It works at full resolution and trains for long enough: a small strided net sees nothing where this one is right
    nearly always.

    Args:
        images, others: uint8 [N, 1, 28, 28], as many of each as the shorter one has are used.
    Returns:
        dict: two_sample_accuracy on the halves held out (0.5: it cannot, 1: always), and the ends of its 95 %
        confidence interval, two_sample_accuracy_low and _high.
    """
    n = min(len(images), len(others))
    half = n // 2
    generator = torch.Generator().manual_seed(seed)
    mixed = [x[torch.randperm(len(x), generator=generator)[:n]].to(device) for x in (images, others)]
    train = torch.cat([x[:half] for x in mixed])
    held_out = torch.cat([x[half:] for x in mixed])
    truth = torch.arange(2).repeat_interleave(half).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitNet(16, 2).to(device)
    # With few images more passes, so that there are enough steps.
    fit(net, train, truth, epochs=epochs * max(1, 2000 // half), batch_size=min(100, half), lr=0.05,
        generator=generator, name="two-sample test")
    _, probabilities = classify(net, held_out)
    truth = torch.arange(2).repeat_interleave(n - half)
    right = (probabilities.argmax(dim=1) == truth).sum().item()
    low, high = wilson_interval(right, len(truth))
    return {"two_sample_accuracy": right / len(truth), "two_sample_accuracy_low": low, "two_sample_accuracy_high": high}


def wilson_interval(successes, n, z=1.96):
    """The 95 % confidence interval of a share: Wilson 1927."""
    # (p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n)
    p = successes / n
    middle, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - reach) / (1 + z * z / n)), min(1.0, (middle + reach) / (1 + z * z / n))


# ----------------------------------------------------------------------------------------------------------------------
# The bound on the likelihood

def bits_figures(model, images, seed=0, exact=False, estimate_images=2000, strata=10, batch_size=128):
    """Bits per dimension: the variational bound of Ho et al. 2020, eq. 5, without labels, averaged over test digits.

    The bound is a sum over all timesteps, each a call of the network. By default it is estimated: the timesteps are cut
    into strata, short ones where the terms are large and change fast (t = 0 is one of its own) and long ones towards
    T-1, and from each stratum one timestep is drawn per image and stands for all of it. That is without bias, and the
    standard error over images covers both the choice of images and that of timesteps. (Images differ more than that:
    with 40 strata instead of 10 the error was the same, and the time three times as long.)

    Args:
        model: a checkpoint.Model.
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
        # 0, 1, ... T: geometric, as the terms fall about like 1 / t
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
                terms.append((end - first) * model.ddpm.bound_term(model.denoiser, x0, t, noise))
                bar.update(len(x0))
            terms, prior = torch.stack(terms, dim=1).cpu().double(), model.ddpm.prior_bits(x0).cpu().double()
            parts.append(torch.stack([prior, terms[:, 1:].sum(dim=1), terms[:, 0]], dim=1))
    parts = torch.cat(parts)                                                        # [N, 3]
    prior, diffusion, decoder = parts.mean(dim=0).tolist()
    return {"bits_per_dim": prior + diffusion + decoder,
            "bits_per_dim_stderr": (parts.sum(dim=1).std() / math.sqrt(len(parts))).item() if len(parts) > 1 else None,
            "bits_prior": prior, "bits_diffusion": diffusion, "bits_decoder": decoder}


# ----------------------------------------------------------------------------------------------------------------------
# Samples from a file, samples from a model

def read_npz(path):
    """Reads `images` uint8 [N, 28, 28] or [N, 1, 28, 28] and, where there, `labels` int [N] of 0..9 from an .npz file.

    Returns:
        images uint8 [N, 1, 28, 28], labels int64 [N] or None, also if all are -1, as sample.py writes them for a model
        without classes.
    Raises:
        FileNotFoundError, ValueError: with one line that says what is wrong.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no file at {path}; python sample.py --n 10000 --npz FILE writes one")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; --npz wants an .npz file")
    images, labels = _read_array(path, "images"), _read_array(path, "labels")
    if images is None:
        raise ValueError(f"{path} has no array `images`; it must be uint8 [N, 28, 28]")
    if images.dtype != np.uint8:
        broken = " and hold NaN or infinity" if images.dtype.kind == "f" and not np.isfinite(images).all() else ""
        raise ValueError(f"{path}: images are {images.dtype}{broken}; they must be uint8, grey levels 0 to 255 "
                         "(data.to_uint8 makes them from [-1, 1])")
    if images.ndim == 4 and images.shape[1] == 1:
        images = images[:, 0]
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(f"{path}: images have shape {list(images.shape)}; it must be [N, 28, 28] or [N, 1, 28, 28]")
    if not len(images):
        raise ValueError(f"{path} holds no image")
    images = torch.from_numpy(images).unsqueeze(1)
    if labels is None:
        return images, None
    if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise ValueError(f"{path}: labels are {labels.dtype} {list(labels.shape)}; they must be whole numbers "
                         f"[{len(images)}], one for each image")
    if (labels == -1).all():
        return images, None
    if not ((labels >= 0) & (labels <= 9)).all():
        raise ValueError(f"{path}: labels run from {labels.min()} to {labels.max()}; digits go from 0 to 9")
    return images, torch.from_numpy(labels.astype(np.int64))


def _read_array(path, name):
    """One array of an .npz file, None if it has none of that name. Nothing is allocated before its size is known."""
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, about headers: a failure is one line
            member = f"{name}.npy"
            if member not in archive.namelist():
                return None
            entry = archive.getinfo(member)
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("its compression is none of numpy's")  # zipfile unpacks others by the gigabyte
            with archive.open(entry) as file:
                start = io.BytesIO(file.read(LARGEST_HEADER))
                version = np.lib.format.read_magic(start)
                read_header = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                               else np.lib.format.read_array_header_2_0)
                shape, _, dtype = read_header(start)
            if dtype.hasobject or dtype.names:
                raise ValueError(f"{name} are no plain numbers")
            size = math.prod(shape) * dtype.itemsize
            if 0 <= size <= LARGEST_ARCHIVE * 28 * 28:
                if size > entry.file_size:
                    raise ValueError(f"it is shorter than the shape {reprlib.repr(shape)} of {name} asks for")
                with archive.open(entry) as file:
                    return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # zipfile, zlib, numpy and ast raise whatever comes up in a file that is none
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]  # some quote all of the file
        raise ValueError(f"{path} is damaged or is no .npz file ({reason})") from error
    raise ValueError(f"{path}: {name} has, by its header, the shape {reprlib.repr(shape)} of {dtype}; this command "
                     f"reads {LARGEST_ARCHIVE:,} images at most")


def pick(images, labels, n, seed):
    """At most n images [N, 1, 28, 28], with their labels, drawn by the seed and whatever the order they came in."""
    order = sorted(range(len(images)), key=lambda i: images[i].numpy().tobytes())
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:n]
    chosen = torch.tensor(order)[shuffled]
    return images[chosen], None if labels is None else labels[chosen]


def draw(model, n, *, steps, batch_size, name="samples", **settings):
    """n samples of a model, by cli.generate and its settings: images uint8 [n, 1, 28, 28], labels int64 [n] or None."""
    images, labels = [], []
    with tqdm(total=n, desc=name, unit="image", leave=False, disable=None) as bar:
        for batch_labels, process in generate(model, n, steps=steps, batch_size=batch_size, **settings):
            for _, x, _ in process:
                pass
            if not torch.isfinite(x).all():
                raise RuntimeError("the samples have NaN or infinite pixels; leave --no-clip out, or train on")
            images.append(to_uint8(x).cpu())
            labels.append(batch_labels)
            bar.update(len(x))
    return torch.cat(images), None if labels[0] is None else torch.cat(labels)


def load_digit_model(flags):
    """The checkpoint.Model of --checkpoint.

    Raises:
        FileNotFoundError, ValueError: the file is not sound, or the model makes something else than MNIST digits.
    """
    model = load_model(flags.checkpoint, pick_device(flags.device), flags.ema, flags.precision)
    settings, dataset = model.settings, model.settings.get("dataset", "MNIST")
    if (settings["image_channels"], settings["image_size"]) != (1, 28) or dataset != "MNIST":
        raise ValueError(f"{flags.checkpoint} was trained on {dataset if dataset in DATASETS else 'other images'}; "
                         "classifier and references are MNIST's, so that only models of MNIST digits can be measured")
    return model


# ----------------------------------------------------------------------------------------------------------------------
# The whole evaluation

# key, name in the table, what a reader should know
ROWS = (
    ("frechet", "Frechet distance", "0 is best; the floor is what so many real digits get"),
    ("frechet_ratio", "  over its floor", "1: as good as real digits"),
    ("kid", "kernel distance (KID)", "0 is best"),
    ("precision", "precision", "share of samples among real digits"),
    ("recall", "recall", "share of real digits among samples"),
    ("density", "density", "real digits around a sample"),
    ("coverage", "coverage", "share of real digits with a sample near"),
    ("class_entropy", "class entropy", "1: all digits equally often"),
    ("confident", "classifier is confident", "share read with more than 0.9"),
    ("label_agreement", "classifier agrees", "share read as their label says"),
    ("nearest_neighbour_ratio", "nearest training digit", "1: as far as test digits, 0: copies"),
    ("copied", "  nearer than any test digit", "share; 0 is best"),
    ("two_sample_accuracy", "told from real ones", "0.5: cannot be told, 1: always"),
    ("zeros", "pixels that are 0", "share; as real digits is best"),
    ("faint", "pixels from 1 to 12", "share; as real digits is best"),
    ("grey_distance", "histogram of grey levels", "0: as the test digits', 1: nothing in common"),
    ("bits_per_dim", "bits per dimension", "an upper bound, without labels, by all steps of ddpm; 8: knows nothing"),
    ("bits_prior", "  of which x_T", ""),
    ("bits_diffusion", "  of which x_{T-1} ... x_1", ""),
    ("bits_decoder", "  of which x_0", ""),
)
# How far a repetition with other samples might lie off: a standard error (of the Frechet floor, the standard deviation
# over its sets of real digits), or the ends of a 95 % confidence interval.
SPREAD = {"frechet": ("_stderr",), "frechet_ratio": ("_stderr",), "kid": ("_stderr",),
          "nearest_neighbour_ratio": ("_stderr",), "two_sample_accuracy": ("_low", "_high"),
          "bits_per_dim": ("_stderr",)}


def evaluate(images, labels=None, *, seed=0, device="cpu", pairs=None):
    """Measures samples, and with them the floors and ceilings at the same n.

    Args:
        images: uint8 [N, 1, 28, 28], N <= 60,000, in random order (see `pick`).
        labels: int64 [N] or None.
        pairs: where to save a picture of the samples nearest to a training digit, each beside it; None: nowhere.
    Returns:
        figures: flat dict, name -> number, or None where it does not apply (the bits do not, here): every key of ROWS,
            its _floor and _ceiling, its spread as _stderr, or as _low and _high, the ends of its confidence interval.
        notes: list of lines for the reader.
    """
    n, generator = len(images), torch.Generator().manual_seed(seed)
    classifier = load_classifier(device)
    train_images, train_labels = load_dataset("MNIST", train=True)
    test_images, test_labels = load_dataset("MNIST", train=False)
    order = torch.randperm(len(test_images), generator=generator)
    test_images, test_labels = test_images[order], test_labels[order]
    draws = floor_draws(train_labels, n, seed)

    def seen(images, labels=None):
        return Digits(images, labels, *classify(classifier, images))

    samples, test = seen(images, labels), seen(test_images, test_labels)
    noise = seen(to_uint8(torch.randn(images.shape, generator=generator)))

    reach = _reach(test.features[:n]) if n >= FEWEST["manifold"] else None
    # One set of real digits may lie nearer than another by half of the distance: the floor is the mean of several.
    stand_ins = [seen(train_images[draw], train_labels[draw]) for draw in draws]
    figures, ceilings, *each = [distribution_figures(digits, test, seed, reach) for digits in tqdm(
        [samples, noise, *stand_ins], desc="distributions", unit="set", leave=False, disable=None)]
    floors = {key: None if each[0][key] is None else float(np.mean([real[key] for real in each])) for key in each[0]}
    if figures["frechet"] is not None:
        figures["frechet_stderr"] = frechet_spread(samples.features, test.features, seed)
        floors["frechet_stderr"] = float(np.std([real["frechet"] for real in each], ddof=1)) if len(each) > 1 else None
        figures["frechet_ratio"] = figures["frechet"] / floors["frechet"]
        figures["frechet_ratio_stderr"] = figures["frechet_stderr"] / floors["frechet"]
        ceilings["frechet_ratio"] = ceilings["frechet"] / floors["frechet"]
        floors["frechet_ratio"] = 1.0

    figures |= class_figures(samples)
    # Of test digits, since the classifier is surer of those that it was trained on; but their classes are in shares of
    # their own.
    floors |= class_figures(Digits(*(of[:n] for of in test)))
    floors["class_entropy"] = class_figures(stand_ins[0])["class_entropy"]
    ceilings |= class_figures(noise)

    figures |= pixel_figures(images, test_images)
    floors |= pixel_figures(train_images[draws[0]], test_images)
    ceilings |= pixel_figures(noise.images, test_images)

    distances, nearest = nearest_neighbours(images, train_images, device)
    test_distances, _ = nearest_neighbours(test_images, train_images, device, name="nearest neighbours of test digits")
    figures |= memorisation_figures(distances, test_distances)
    half = min(n, len(test_distances) // 2)  # at most half of the test digits in the samples' place
    floors |= memorisation_figures(test_distances[:half], test_distances[half:])

    if n >= FEWEST["two_sample"]:
        figures |= two_sample_figures(images, test_images, device, seed)
        floors |= two_sample_figures(train_images[draws[0]], test_images, device, seed)

    if pairs:
        closest = distances.argsort()[:PAIRS]
        beside = torch.stack([images[closest], train_images[nearest[closest]]], dim=1).flatten(0, 1)
        save_png(pairs, enlarge(make_grid(beside, columns=16), 2))

    notes = []
    if n < 10_000:
        notes.append(f"n = {n}: these figures and their floors are those of {n} samples; compare them with no others. "
                     "10,000 is the custom")
    missing = [name for name, fewest in FEWEST.items() if n < fewest]
    if missing:
        notes.append(f"left out, as {n} samples do not bear them: " + ", ".join(
            f"{name} (from {FEWEST[name]})" for name in missing))
    for name, digits in ("samples", samples), ("test digits", test):
        counts = torch.bincount(digits.probabilities.argmax(dim=1), minlength=10).tolist()
        notes.append(f"share of 0 to 9 in {name}: " + " ".join(f"{count / sum(counts):.3f}" for count in counts))

    return {"n": n} | merge(figures, floors, ceilings), notes


def merge(figures, floors, ceilings):
    """One flat dict with every key of ROWS, each followed by its spread, its _floor and its _ceiling; None where there
    is no such figure."""
    merged = {}
    for key, _, _ in ROWS:
        for place, of in ("", figures), ("_floor", floors), ("_ceiling", ceilings):
            merged[key + place] = of.get(key)
            if place != "_ceiling":
                merged |= {key + place + spread: of.get(key + spread) for spread in SPREAD.get(key, ())}
    return merged


def print_table(figures):
    """The figures of `merge` for a reader, to stdout: value, floor and ceiling, one line each."""
    def cell(key, place):
        value = figures[key + place]
        if value is None:
            return "-"
        low, high = figures.get(f"{key}{place}_low"), figures.get(f"{key}{place}_high")
        stderr = figures.get(f"{key}{place}_stderr")
        spread = f" ± {stderr:.2g}" if stderr is not None else f" ({low:.3f}-{high:.3f})" if low is not None else ""
        return (f"{value:.4f}" if 0.01 <= abs(value) < 10 or value == 0 else f"{value:.3g}") + spread

    rows = [("", "samples", "real digits", "noise", "")]
    rows += [(name, cell(key, ""), cell(key, "_floor"), cell(key, "_ceiling"), note) for key, name, note in ROWS]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0])] + [row[i].rjust(widths[i]) for i in (1, 2, 3)] + [row[4]]).rstrip())


# ----------------------------------------------------------------------------------------------------------------------
# Quality against network calls

def sweep(model, n, path, flags, steps=SWEEP_STEPS, guidance=SWEEP_GUIDANCE):
    """Measures the samplers over steps, and the default sampler over guidance; prints a Markdown table, saves a plot.
    All are guided in every step, unless --guidance-interval says otherwise.

    Returns:
        list of dicts: sampler, steps, guidance, calls (of the network, per image), seconds (per 1,000 images), and the
        figures of `distribution_figures` and `class_figures`.
    """
    device, seed, T = pick_device(flags.device), flags.seed, model.ddpm.T
    classifier = load_classifier(device)
    train_images, train_labels = load_dataset("MNIST", train=True)
    test = Digits(None, None, *classify(classifier, load_dataset("MNIST", train=False)[0]))
    each = [distribution_figures(Digits(None, None, *classify(classifier, train_images[draw])), test, seed)
            for draw in floor_draws(train_labels, n, seed)]
    floor = {key: float(np.mean([real[key] for real in each])) for key in each[0]}

    default_steps, default_guidance, _ = sampling_defaults(model, flags.sampler, flags.steps, flags.guidance)
    runs = [(sampler, s, default_guidance) for sampler in steps for s in steps[sampler] if s <= T]
    of_steps = len(runs)
    if knows_both(model.settings):
        runs += [(flags.sampler, default_steps, w) for w in guidance]
    columns = ("calls", "frechet", "ratio", "precision", "recall", "label_agreement", "seconds")
    print("| sampler | steps | guidance | " + " | ".join(columns) + " |\n" + "|---" * (3 + len(columns)) + "|")
    print("| real digits | | | | " + " | ".join(
        [f"{floor['frechet']:.4f}", "1.00", f"{floor['precision']:.3f}", f"{floor['recall']:.3f}", "", ""]) + " |")
    rows, seen = [], {}  # seen: how many images the network has looked at
    hook = model.network.register_forward_hook(lambda network, x, out: seen.update(images=seen["images"] + len(out)))
    for sampler, s, w in tqdm(runs, desc="sweep", unit="run", disable=None):
        start = time.perf_counter()
        seen["images"] = 0
        images, labels = draw(model, n, sampler=sampler, steps=s, guidance=w, seed=seed, batch_size=flags.batch_size,
                              guidance_interval=flags.guidance_interval or EVERYWHERE, clip=flags.clip,
                              name=f"{sampler} {s}")
        seconds = (time.perf_counter() - start) * 1000 / n
        samples = Digits(images, labels, *classify(classifier, images))
        row = distribution_figures(samples, test, seed) | class_figures(samples)
        row |= {"sampler": sampler, "steps": s, "guidance": w, "calls": seen["images"] / n, "seconds": seconds,
                "ratio": row["frechet"] / floor["frechet"]}
        cells = ["" if row[c] is None else f"{row[c]:.4g}" for c in columns]
        tqdm.write(f"| {sampler} | {s} | {w:g} | " + " | ".join(cells) + " |")
        rows.append(row)
    hook.remove()
    plot_sweep(path, rows, of_steps, floor, n)
    return rows


def plot_sweep(path, rows, of_steps, floor, n):
    """Left the Frechet distance against network calls, from the first `of_steps` rows; right against guidance."""
    import matplotlib  # here and not above: slow to import, and needed by the sweep alone
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for sampler in dict.fromkeys(row["sampler"] for row in rows[:of_steps]):
        line = [row for row in rows[:of_steps] if row["sampler"] == sampler]
        left.loglog([row["calls"] for row in line], [row["frechet"] for row in line], "o-", label=sampler)
    left.set(xlabel="network calls per image", ylabel=f"Frechet distance to the test digits, n = {n:,}")
    line = sorted(rows[of_steps:], key=lambda row: row["guidance"])
    shares = right.twinx()
    shares.set(ylim=(0, 1), ylabel="precision, recall")
    if line:
        right.semilogy([row["guidance"] for row in line], [row["frechet"] for row in line], "o-",
                       label=f"{line[0]['sampler']}, {line[0]['steps']} steps")
        for key, style in ("precision", "C1s:"), ("recall", "C2^:"):
            shares.plot([row["guidance"] for row in line], [row[key] for row in line], style, label=key)
    right.set(xlabel="guidance")
    for axes, handles in (left, []), (right, shares.get_lines()):
        axes.axhline(floor["frechet"], color="gray", linestyle="--", label="real digits")
        axes.grid(alpha=0.3)
        axes.legend(handles=axes.get_lines() + list(handles), ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------

def parse_flags():
    """The command line as a namespace."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--npz", type=path, metavar="FILE",
                        help="measure these images (uint8 [N, 28, 28], any generator's) instead of a checkpoint's")
    parser.add_argument("--n", type=integer(1, 60_000), metavar="N",
                        help="how many samples, at most as many as there are training digits for the floor (default: "
                        "10000; 1000 for each point of --sweep)")
    parser.add_argument("--json", type=path, metavar="FILE",
                        help="write every figure of the table as one flat JSON object too (with --sweep: a list of "
                        "them)")
    parser.add_argument("--pairs", type=path, default="samples/nearest.png", metavar="FILE",
                        help="picture of the samples nearest to a training digit, each beside it")
    parser.add_argument("--exact", action="store_true",
                        help="bits per dimension over every timestep of every test digit instead of an estimate")
    parser.add_argument("--sweep", type=path, nargs="?", const="assets/sweep.png", metavar="FILE",
                        help="measure the samplers over steps, and guidance (in every step unless --guidance-interval "
                        "is given), and plot them to FILE (assets/sweep.png)")
    parser.add_argument("--train-classifier", type=path, nargs="?", const="runs/classifier.pt", metavar="FILE",
                        help="train another classifier into FILE (runs/classifier.pt); the one in use stays")
    add_sampling_flags(parser)
    flags = parser.parse_args()
    needs_model = ("checkpoint", "sampler", "steps", "guidance", "guidance_interval", "batch_size", "clip", "ema",
                   "precision", "exact")
    for mode, ignored in {"train_classifier": ("npz", "sweep", "json", "pairs", "n", *needs_model),
                          "sweep": ("npz", "exact", "pairs"), "npz": needs_model}.items():
        for name in ignored:
            if getattr(flags, mode) and getattr(flags, name) != parser.get_default(name):
                option = {"clip": "no_clip", "ema": "no_ema"}.get(name, name)
                parser.error(f"--{mode} has no use for --{option}; leave one of them out".replace("_", "-"))
    return flags


def main():
    flags = parse_flags()
    device, start = pick_device(flags.device), time.perf_counter()
    n = flags.n or (1000 if flags.sweep else 10_000)
    pairs = None if flags.sweep or flags.train_classifier else flags.pairs
    for target in filter(None, (flags.json, pairs, flags.sweep, flags.train_classifier)):
        check_target(target)  # now, and not after minutes of measuring
    if flags.train_classifier:
        return train_classifier(flags.train_classifier, device, flags.seed)
    if flags.sweep:
        if n < FEWEST["frechet"]:
            raise UsageError(f"--n {n} is too few to sweep with; take {FEWEST['frechet']} or more")
        write_json(flags.json, sweep(load_digit_model(flags), n, flags.sweep, flags))
        return print("\n".join(filter(None, (flags.sweep, flags.json))))

    settings = dict.fromkeys(("sampler", "steps", "guidance", "guidance_from", "guidance_to"))
    if flags.npz:
        images, labels = read_npz(flags.npz)
    else:
        model = load_digit_model(flags)
        steps, guidance, interval = sampling_defaults(model, flags.sampler, flags.steps, flags.guidance,
                                                      flags.guidance_interval)
        settings |= {"sampler": flags.sampler, "steps": steps}
        if known_classes(model.settings):
            settings["guidance"] = guidance
            if guidance not in (0, 1):
                settings["guidance_from"], settings["guidance_to"] = interval
        images, labels = draw(model, n, clip=flags.clip, seed=flags.seed, sampler=flags.sampler, steps=flags.steps,
                              guidance=flags.guidance, guidance_interval=flags.guidance_interval,
                              batch_size=flags.batch_size)
    images, labels = pick(images, labels, n, flags.seed)
    figures, notes = evaluate(images, labels, seed=flags.seed, device=device, pairs=flags.pairs)
    if not flags.npz:
        test_images, _ = load_dataset("MNIST", train=False)
        test_images = test_images[torch.randperm(len(test_images), generator=torch.Generator().manual_seed(flags.seed))]
        figures["bits_per_dim_ceiling"] = 8.0  # each of the 256 grey levels as likely as the others: log2 256
        if model.settings.get("label_dropout") != 0:  # else it knows nothing without labels
            figures |= bits_figures(model, test_images, flags.seed, flags.exact)
    figures |= {"seed": flags.seed, "classifier_sha256": CLASSIFIER_SHA256, **settings}

    seconds = time.perf_counter() - start
    try:  # the file first, since who reads the table may have gone; and the table, should the disk be full
        write_json(flags.json, figures)
    finally:
        print_table(figures)
        print("\n".join([*notes, f"classifier {CLASSIFIER_SHA256[:12]}, seed {flags.seed}, n = {figures['n']}, "
                         f"{seconds:.0f} s", flags.pairs, *filter(None, [flags.json])]))


def write_json(path, figures):
    """Writes the figures, or a list of them, if there is a path."""
    if path:
        with atomic_write(path) as file:
            file.write((json.dumps(figures, indent=2, allow_nan=False) + "\n").encode())


if __name__ == "__main__":
    run(main)
