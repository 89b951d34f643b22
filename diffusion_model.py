"""The networks, small UNets that map a noisy image to v; how v is read as noise (DDPM.clipped_noise_from_v); guidance.

A UNet may predict v itself. In BayesUNet, the default, it predicts how likely each grey level is for each pixel, and
Bayes' rule combines that with the noisy pixel.

    UNet:       x_t [B, C, 28, 28] -> fold 2x2 pixels into channels -> 14x14 -> 7x7 -> 14x14 -> unfold -> v
    BayesUNet:  x_t, and what each pixel shows by itself -> UNet -> a prior for each pixel -> x0_hat -> v

Folding (pixel unshuffle) is what makes it fast on a CPU: a whole level at full resolution would take most of the time.
BayesUNet has three layers there, without which edges come out rough. Most of the depth is at 7x7, where it is cheap and
where a 3x3 convolution spans 12 of the 28 pixels.
"""
import dataclasses
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

from ddpm import DDPM
from diffusion_schedules import make_betas

TIME_FEATURES = 64
EMBEDDING = 128  # width of the embedding of time and label


class UNet(nn.Module):
    """Two levels: 3/8 `width` channels at half the image's size, `width` at a quarter, where images of up to 64 pixels
    also have their positions mixed.

    Args:
        image_size: height and width, a multiple of 4.
        image_channels: at least 1.
        classes: number of labels K; 0: unconditional only.
        width: channels at the coarser level, at least 3.
        depth: residual blocks at the coarser level; the finer one has one before it and one after.
        out_channels: channels of its output; None: as many as the image has.
    Raises:
        ValueError: a size that is not divisible by 4, or a number that is too small.
    """
    # Layers next to image, time and label, and stacks of matrices: for AdamW, not for Muon (utils/muon.py).
    for_adamw = ("stem", "out", "time", "label", "mixing")

    def __init__(self, image_size=28, image_channels=1, classes=10, width=128, depth=6, out_channels=None):
        super().__init__()
        if image_size < 4 or image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, since the network halves it twice, got {image_size}")
        if image_channels < 1 or classes < 0 or width < 3 or depth < 1:
            raise ValueError("image_channels must be at least 1, classes 0, width 3 and depth 1, got "
                             f"{image_channels}, {classes}, {width} and {depth}")
        self.image_size, self.image_channels, self.classes = image_size, image_channels, classes
        positions = (image_size // 4) ** 2 if image_size <= 64 else 0  # to be mixed; of larger images, too many
        fine = width * 3 // 8  # 1/4 and 1/2 were tried: EXPERIMENTS.md, Network

        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.label = nn.Embedding.from_pretrained(torch.empty(classes + 1, EMBEDDING), freeze=False)  # last: no label
        if not self.label.weight.is_meta:  # on meta, where checkpoints are read, it loads torch's compiler: 0.15 GB
            nn.init.normal_(self.label.weight)

        self.stem = nn.Conv2d(4 * image_channels, fine, 3, padding=1)
        self.down = ResidualBlock(fine, fine)
        self.downsample = nn.Conv2d(fine, width, 2, stride=2)
        self.middle = nn.ModuleList(ResidualBlock(width, width, positions) for _ in range(depth))
        self.upsample = nn.ConvTranspose2d(width, fine, 2, stride=2)
        self.up = ResidualBlock(2 * fine, fine)
        self.norm = norm(fine)
        self.out = nn.Conv2d(fine, 4 * (out_channels or image_channels), 3, padding=1)
        # At first it puts out 0 everywhere, as in Ho et al.'s own code.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_t, t, labels=None):
        """
        Args:
            x_t: float [B, C, H, W].
            t: LongTensor [B].
            labels: LongTensor [B] in 0..K, where K stands for "no label"; None: no label for any image.
        Returns:
            float [B, out_channels, H, W]: v, or features for the layers that follow.
        Raises:
            ValueError: images of another size than the network was built for.
        """
        check_shape(x_t, self.image_channels, self.image_size)
        if labels is None:
            labels = torch.full_like(t, self.classes)
        emb = F.silu(self.time(time_features(t)) + self.label(labels))  # [B, EMBEDDING]

        x = F.pixel_unshuffle(x_t, 2)                                   # [B, 4C, H/2, W/2]
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # [B, fine, H/2, W/2]
        skip = x = self.down(x, emb)
        x = self.downsample(x)                                          # [B, width, H/4, W/4]
        for block in self.middle:
            x = block(x, emb)
        x = torch.cat([self.upsample(x), skip], dim=1)                  # [B, 2 fine, H/2, W/2]
        x = self.up(x, emb)                                             # [B, fine, H/2, W/2]
        x = self.out(F.silu(self.norm(x)))                              # [B, 4 out_channels, H/2, W/2]
        return F.pixel_shuffle(x, 2)                                    # [B, out_channels, H, W]


class BayesUNet(nn.Module):
    """A UNet that says what each pixel of x_0 is likely to be. Bayes' rule combines that with the noisy pixel.

    Noise is independent from pixel to pixel. So, given x_t, the probability of a grey level is proportional to its
    probability given all other noisy pixels, times the probability density of the noise that turns it into the pixel we
    see. The second factor is known. The UNet only has to learn the first, which is called the prior here. (Nothing
    keeps the UNet from looking at the pixel, too. It then learns a first factor that makes the product right.)

    The prior is a mixture. Each of `levels` has a probability of its own, since many pixels have exactly that level:
    most of MNIST's are black, and many as white as its ink. Normal distributions stand for all other levels. The mean
    of x_0 given x_t, x0_hat, then has a closed form. Where there is little noise, a UNet that predicts v hardly learns
    what this form gives for free (EXPERIMENTS.md, Bayes' rule).

    Args:
        image_size, image_channels, classes, width, depth: as UNet's.
        levels: the grey levels, in 0..255, that have a probability of their own.
        schedule, timesteps: those of the process, as make_betas takes them.
    Raises:
        ValueError: as UNet and make_betas.
    """
    also_takes = ("levels", "schedule", "timesteps")
    for_adamw = (*UNet.for_adamw, "pixel", "scale_shift", "shares")  # scale_shift would take half of Muon's time
    NORMALS = 2  # the number of normal distributions in each mixture

    def __init__(self, image_size=28, image_channels=1, classes=10, width=128, depth=6, levels=(), schedule="logsnr",
                 timesteps=1000):
        super().__init__()
        self.image_channels, seen = image_channels, image_channels * (2 + len(levels))
        hidden = max(8, width // 4)  # channels at full resolution
        self.unet = UNet(image_size, seen, classes, width, depth, out_channels=hidden)
        self.shares = nn.Parameter(torch.zeros(len(levels) + 1, 1, 1))  # logits of their shares, and of the rest
        self.pixel = nn.Conv2d(seen, hidden, 1)
        self.full = nn.Conv2d(hidden, hidden, 3, padding=1)
        self.out = nn.Conv2d(hidden, image_channels * (len(levels) + 3 * self.NORMALS), 3, padding=1)
        # At first the prior is the same everywhere, and x0_hat is what each pixel shows by itself.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        with torch.device("cpu"):  # even where checkpoints are checked, on meta: there they would have no numbers
            alpha_bars = DDPM(make_betas(schedule, timesteps)).alpha_bars
            tables = {"scale": alpha_bars.sqrt(), "variance": (1 - alpha_bars) / alpha_bars,
                      "levels": torch.tensor(levels, dtype=torch.float64) / 127.5 - 1}
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)  # not saved: they follow from the settings

    def forward(self, x_t, t, labels=None):
        """Arguments, Returns, Raises: as UNet.forward."""
        check_shape(x_t, self.image_channels, self.unet.image_size)
        scale, variance = (table[t].view(-1, 1, 1, 1, 1) for table in (self.scale, self.variance))
        # y = x_t / sqrt(alpha_bar_t) = x_0 + sqrt(variance_t) noise,  variance_t = (1 - alpha_bar_t) / alpha_bar_t
        y = x_t[:, :, None] / scale  # [B, C, 1, H, W]; the third dimension is for the components of a mixture

        # For the UNet to see: the posterior of each pixel by itself. N(0, 1) is the prior of all other levels.
        shown, _ = self.posterior(y, variance, self.shares, torch.zeros_like(y), torch.ones_like(y))
        seen = torch.cat([x_t, shown.flatten(1, 2)], dim=1).contiguous(memory_format=torch.channels_last)
        # The prior. Convolutions at full resolution, since the UNet puts out each of four folded pixels by itself.
        h = F.silu(self.unet(seen, t, labels) + self.pixel(seen))
        prior = self.out(F.silu(self.full(h))).float()
        L, K = len(self.levels), self.NORMALS
        logits, means, stds = prior.unflatten(1, (self.image_channels, -1)).split([L + K, K, K], dim=2)
        # They start apart: normal distributions that start alike have the same gradients, and stay alike.
        means = means + torch.linspace(-0.5, 0.5, K, device=y.device).view(-1, 1, 1)
        # Between 0 and 1: where a normal distribution has no weight, nothing else would keep its std from overflowing.
        _, x0_hat = self.posterior(y, variance, logits, means, stds.sigmoid())
        # v = (sqrt(alpha_bar_t) x_t - x_0) / sqrt(1 - alpha_bar_t),  x_t = scale y,  1 - alpha_bar_t = scale^2 variance
        return ((scale ** 2 * y - x0_hat) / (scale * variance.sqrt()))[:, :, 0]

    def posterior(self, y, variance, logits, means, stds):
        """Bayes' rule for each pixel y = x_0 + sqrt(variance) noise, where x_0 comes from a mixture of the L levels and
        K normal distributions.

        Args:
            y: float [B, C, 1, H, W].
            variance: float [B, 1, 1, 1, 1].
            logits: log p(component), up to a constant, the levels first: [B, C, L + K, H, W], or broadcast to it.
            means, stds: of the normal distributions, [B, C, K, H, W].
        Returns:
            p(component | y), [B, C, L + K, H, W], and x0_hat = E[x_0 | y], [B, C, 1, H, W].
        """
        B, C, _, H, W = means.shape
        L, levels = len(self.levels), self.levels.view(-1, 1, 1).expand(B, C, -1, H, W)
        means = torch.cat([levels, means], dim=2)
        own = torch.cat([torch.zeros_like(levels), stds.square()], dim=2)  # each one's variance; a level has 0
        total = variance + own
        # p(y | component) = N(y; mean, variance + own)
        log_p = -(y - means).square() / (2 * total) - total.log() / 2
        # E[x_0 | y, component] = (variance mean + own y) / (variance + own)
        x0_hats = (variance * means + own * y) / total
        # A normal distribution is continuous, but x_0 is a whole grey level, and where there is little noise, y shows
        # which. This corrects for that. It takes the distribution for flat from one level to the next.
        log_whole, to_whole = whole_levels(127.5 * (y + 1), 127.5 * variance.sqrt())
        log_p[:, :, L:] += log_whole
        x0_hats[:, :, L:] += to_whole / 127.5
        # p(component | y) = p(component) p(y | component) / p(y), and p(y) makes their sum 1
        p = torch.softmax(logits + log_p, dim=2)
        return p, (p * x0_hats).sum(dim=2, keepdim=True)


def whole_levels(u, sigma):
    """log p(u) and E[k | u] - u for u = k + sigma noise, where k may be any whole number, all equally likely. p is
    scaled to have mean 1.

    A sigma below 0.15 is taken for 0.15, so that four terms of the series are enough. Even there u rounds to k in all
    but one case in a thousand.
    """
    # p is a row of equal bells, one level apart. So it has a Fourier series:
    # p(u) = sum over k of N(u; k, sigma^2) = 1 + 2 sum over n >= 1 of q^(n^2) cos(2 pi n u),  q = exp(-2 pi^2 sigma^2)
    # (Poisson's summation formula)
    # E[k | u] = u + sigma^2 p'(u) / p(u)  (Tweedie's formula: Efron 2011, eq. 1.4)
    u, sigma = u - u.round(), sigma.clamp(min=0.15)
    q = torch.exp(-2 * math.pi ** 2 * sigma ** 2)
    p, slope = 1, 0
    for n in range(1, 5):  # the next term would be q^25, which is below 2e-5
        angle = 2 * math.pi * n * u
        p = p + 2 * q ** n ** 2 * angle.cos()
        slope = slope - 4 * math.pi * n * q ** n ** 2 * angle.sin()
    return p.log(), sigma ** 2 * slope / p


def check_shape(x_t, channels, size):
    """Raises ValueError unless the images are [B, channels, size, size]."""
    if x_t.shape[1:] != (channels, size, size):
        raise ValueError(f"this network takes images [{channels}, {size}, {size}], got {list(x_t.shape[1:])}")


class ResidualBlock(nn.Module):
    """x + two 3x3 convolutions, between which time and label scale and shift the channels. Given a number of positions
    (H W), a Mixing layer runs beside the first convolution, which must then keep the number of channels."""

    def __init__(self, channels_in, channels_out, positions=0):
        super().__init__()
        self.norm1, self.norm2 = norm(channels_in), norm(channels_out)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)  # shift stands in for its bias
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.scale_shift = nn.Linear(EMBEDDING, 2 * channels_out)
        self.mixing = Mixing(channels_in, positions) if positions else None
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        for layer in self.conv2, self.scale_shift:  # every block starts as its skip
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, emb):
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm1(x))
        h = self.conv1(h) + self.mixing(h) if self.mixing else self.conv1(h)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(F.silu(h))


class Mixing(nn.Module):
    """Mixes positions: each output position is a weighted sum of all input positions. Each group of channels has a
    matrix of weights of its own. Unlike a convolution's, they depend on where both positions are. So more digits are
    exactly as long as real ones (EXPERIMENTS.md, The clear end). This is the token mixing of Tolstikhin et al. 2021
    (arXiv 2105.01601), but linear."""

    def __init__(self, channels, positions):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(math.gcd(8, channels), positions, positions))

    def forward(self, x):
        """x, and what is returned: float [B, channels, H, W]."""
        B, C, H, W = x.shape
        groups = x.permute(0, 2, 3, 1).reshape(B, H * W, len(self.weight), -1)  # [B, positions, groups, channels each]
        # y_q = sum over positions p of W_pq x_p,  with a W for each group
        mixed = torch.einsum("bpgc,gpq->bqgc", groups, self.weight)
        return mixed.reshape(B, H, W, C).permute(0, 3, 1, 2)


def norm(channels):
    """GroupNorm with one group and nothing to learn: as good as groups of 8 with weights, and faster (EXPERIMENTS.md,
    Network)."""
    return nn.GroupNorm(1, channels, affine=False)


def time_features(t):
    """Sines and cosines of t [B] at TIME_FEATURES / 2 frequencies from 1 down to about 1/7,500: float [B,
    TIME_FEATURES]. Vaswani et al. 2017, section 3.5, as in Ho et al. 2020, appendix B."""
    # sin(f_k t) and cos(f_k t),  f_k = 10,000^(-k / half)
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


# To add a network: write a class that is built from ARGUMENTS and whose forward(x_t, t, labels) returns v, shaped like
# x_t (how v follows from an x0_hat: the end of BayesUNet.forward), and give it a name here. labels: LongTensor [B] in
# 0..classes, where `classes` means "no label"; None: no label for any image. Optional: `also_takes` names other
# settings that it is built from (a subclass inherits it), and `for_adamw` the layers that Muon leaves to AdamW:
# embeddings, the first and the last, and those for which Muon is too slow.
NETWORKS = {"bayes": BayesUNet, "unet": UNet}
ARGUMENTS = ("image_size", "image_channels", "classes", "width", "depth")


def build_network(settings):
    """An untrained network from the settings (a dict) of a run or a checkpoint."""
    network = NETWORKS[settings["network"]]
    others = {name: settings[name] for name in getattr(network, "also_takes", ()) if name in settings}
    return network(**{name: settings[name] for name in ARGUMENTS}, **others)


@dataclasses.dataclass
class Model:
    """A network and how its output becomes noise: what ddpm.py and all the rest call a model.

    Args:
        network: maps (x_t, t, labels) to v, on its device.
        ddpm: the process it was trained for.
        settings: what it was trained with, as utils.settings has them.
        precision: "fp32" or "bf16", of convolutions and matrix products. Weights and results are always fp32.
        steps: for how many steps it was trained; None: unknown.
        early: the network as it was early in its training, for autoguidance; None: not known.
    """
    network: nn.Module
    ddpm: DDPM
    settings: dict
    precision: str = "fp32"
    steps: int | None = None
    early: nn.Module | None = None

    def __call__(self, x_t, t, labels=None):
        """noise_theta(x_t, t, labels), float [B, C, H, W]; arguments as UNet.forward's."""
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            v = self.network(x_t, t, labels).float()
        return self.ddpm.clipped_noise_from_v(x_t, t, v)

    @property
    def num_classes(self):
        """How many labels it knows: 0 if it was trained without any."""
        return 0 if self.settings.get("label_dropout") == 1 else self.settings["classes"]

    @property
    def supports_guidance(self):
        """Whether it was trained both with labels and without, as classifier-free guidance needs."""
        return self.num_classes > 0 and self.settings.get("label_dropout") != 0


def drop_labels(labels, probability, classes, generator=None):
    """Replaces each label independently, with this probability, by "no label" (the value `classes`), so that a network
    learns both predictions of classifier-free guidance: Ho & Salimans 2022 (arXiv 2207.12598), algorithm 1.

    Args:
        labels: LongTensor [B]; the generator must be on its device.
    """
    dropped = torch.rand(labels.shape, generator=generator, device=labels.device) < probability
    return torch.where(dropped, classes, labels)


def guided(model, labels, guidance=1.0, acts=None, early=None):
    """Turns a model (x_t, t, labels) -> noise into (x_t, t) -> noise, and exaggerates how it differs from a weaker
    prediction: its own without the label (classifier-free guidance), or that of the network as it was early in its
    training (autoguidance, Karras et al. 2024, arXiv 2406.02507).

    Args:
        labels: LongTensor [B], the class wanted for each image; None: any.
        guidance: 0: the model without the label, even if there is `early`; 1: the model with the label, no guidance;
            larger: the difference is exaggerated (by the label: clearer but less varied images). Ho & Salimans' w is
            guidance - 1. Any value but 0 and 1 needs both predictions, two calls, in each guided step.
        acts: one bool for each call to come. True: guide. False: the model's own prediction for the label, which is one
            call of the network and not two (Kynkaanniemi et al. 2024, arXiv 2404.07724). None: always guide. A
            sampler's steps come in a known order, so t need not be read back from a GPU. Ignored at guidance 0 and 1.
        early: the model as it was early in its training, for autoguidance; None: classifier-free guidance.
    """
    acts = itertools.repeat(True) if acts is None else iter(acts)

    def guided_model(x_t, t):
        acting = next(acts)
        if guidance == 0:
            return model(x_t, t, None)
        noise = model(x_t, t, labels)
        if guidance == 1 or not acting:
            return noise
        # noise = noise_weak + guidance (noise_theta(x_t, t, label) - noise_weak),  Ho & Salimans 2022, eq. 6,
        # with noise_weak = noise_theta(x_t, t), or noise_early(x_t, t, label)
        weak = early(x_t, t, labels) if early else model(x_t, t, None)
        return torch.lerp(weak, noise, guidance)
    return guided_model
