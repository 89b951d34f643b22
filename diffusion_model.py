"""The network: a small UNet that looks at a noisy image and says what noise is in it, and how labels guide it.

    x_t [B, C, 28, 28] -> fold 2x2 pixels into channels -> 14x14 -> 7x7 -> 14x14 -> unfold -> [B, C, 28, 28]

Folding (pixel unshuffle) is what makes it fast on a CPU: a full-resolution level would cost most of the time and see
little that the folded pixels do not show. This file knows no noise schedule: ddpm.py does.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


class UNet(nn.Module):
    """Two levels: `width` channels at half the image's size, twice as many at a quarter.

    Args:
        image_size: height and width, a multiple of 4.
        image_channels: 1 or 3.
        classes: number of labels K; 0: unconditional only.
        width: channels at the finer level, a multiple of 8.
        depth: residual blocks at each of the three places (down, middle, up).
    Raises:
        ValueError: a size that does not divide.
    """

    def __init__(self, image_size=28, image_channels=1, classes=10, width=64, depth=1):
        super().__init__()
        if image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, since the network halves it twice, got {image_size}")
        if width % 8:
            raise ValueError(f"width must be a multiple of 8, got {width}")
        self.image_size, self.image_channels, self.classes = image_size, image_channels, classes
        folded, wide, embedding = 4 * image_channels, 2 * width, 2 * width

        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(classes + 1, embedding)  # the last one: no label

        self.stem = nn.Conv2d(folded, width, 3, padding=1)
        self.down = nn.ModuleList(ResidualBlock(width, width, embedding) for _ in range(depth))
        self.shrink = nn.Conv2d(width, wide, 2, stride=2)
        self.middle = nn.ModuleList(ResidualBlock(wide, wide, embedding) for _ in range(depth))
        self.grow = nn.ConvTranspose2d(wide, width, 2, stride=2)
        self.up = nn.ModuleList(
            ResidualBlock(2 * width if i == 0 else width, width, embedding) for i in range(depth))
        self.norm = ChannelNorm(width)
        self.out = nn.Conv2d(width, folded, 3, padding=1)
        # At first the network says 0 everywhere: the mean of what it has to learn.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x_t, t, labels=None):
        """
        Args:
            x_t: float [B, C, H, W].
            t: LongTensor [B].
            labels: LongTensor [B] in 0..K, where K stands for "no label"; None: no label for any image.
        Returns:
            float [B, C, H, W]: the noise, or whatever else it is trained to predict.
        Raises:
            ValueError: images of another size than the network was built for.
        """
        if x_t.shape[1:] != (self.image_channels, self.image_size, self.image_size):
            raise ValueError(f"this network takes images [{self.image_channels}, {self.image_size}, {self.image_size}], "
                             f"got {list(x_t.shape[1:])}")
        if labels is None:
            labels = torch.full_like(t, self.classes)
        e = F.silu(self.time(time_features(t)) + self.label(labels))   # [B, E]

        x = F.pixel_unshuffle(x_t, 2)                                   # [B, 4C, H/2, W/2]
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # [B, width, H/2, W/2]
        for block in self.down:
            x = block(x, e)
        skip = x
        x = self.shrink(x)                                              # [B, 2 width, H/4, W/4]
        for block in self.middle:
            x = block(x, e)
        x = torch.cat([self.grow(x), skip], dim=1)                      # [B, 2 width, H/2, W/2]
        for block in self.up:
            x = block(x, e)                                             # [B, width, H/2, W/2]
        x = self.out(F.silu(self.norm(x)))                              # [B, 4C, H/2, W/2]
        return F.pixel_shuffle(x, 2)                                    # [B, C, H, W]


class ResidualBlock(nn.Module):
    """x + two 3x3 convolutions, the second of which is told time and label by a scale and a shift of its channels."""

    def __init__(self, channels_in, channels_out, embedding):
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels_in), ChannelNorm(channels_out)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.scale_shift = nn.Linear(embedding, 2 * channels_out)
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        for layer in self.conv2, self.scale_shift:  # every block starts as the identity
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, e):
        scale, shift = self.scale_shift(e)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(F.silu(h))


class ChannelNorm(nn.GroupNorm):
    """GroupNorm over groups of 8 channels."""

    def __init__(self, channels):
        super().__init__(channels // 8, channels)


TIME_FEATURES = 64


def time_features(t):
    """Sines and cosines of t [B] at TIME_FEATURES / 2 frequencies from 1 to 1/10,000, float [B, TIME_FEATURES]: Vaswani
    et al. 2017, section 3.5, as in Ho et al. 2020, appendix B."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def drop_labels(labels, probability, classes, generator=None):
    """Replaces each label, by itself, with "no label" (the value `classes`) with this probability: what makes a network
    learn both noise predictions that guidance needs (Ho & Salimans 2022, arXiv 2207.12598, algorithm 1).

    Args:
        labels: LongTensor [B]; the generator must be on its device.
    """
    dropped = torch.rand(labels.shape, generator=generator, device=labels.device) < probability
    return torch.where(dropped, classes, labels)


def guided(model, labels, guidance=1.0):
    """Classifier-free guidance: a callable (x_t, t) -> noise from a model (x_t, t, labels) -> noise.

    Args:
        labels: LongTensor [B], the class wanted for each image.
        guidance: 0: the label is ignored; 1: the model's prediction for the label, no guidance; larger: the difference
            the label makes is exaggerated, for clearer but less varied images. (Ho & Salimans' w is guidance - 1.)
            Other than 0 and 1 it takes both predictions, and so twice the time.
    """
    def denoiser(x_t, t):
        if guidance == 0:
            return model(x_t, t, None)
        if guidance == 1:
            return model(x_t, t, labels)
        # noise = noise_theta(x_t, t) + guidance (noise_theta(x_t, t, label) - noise_theta(x_t, t)), eq. 6
        without, with_label = model(x_t, t, None), model(x_t, t, labels)
        return torch.lerp(without, with_label, guidance)
    return denoiser
