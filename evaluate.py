"""How good are the samples?"""
import hashlib
import io
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import cli
from checkpoint import atomic_write
from data import load_dataset, to_float

CLASSIFIER = Path(__file__).resolve().parent / "assets" / "classifier.pt"
CLASSIFIER_SHA256 = "7741364bb2321cebc82761739eb1dcca5ddec09a82286872da93525b485d2812"


class Classifier(nn.Module):
    """A small convolutional network that reads digits; its last hidden layer is the feature space of the distances."""

    FEATURES = 128

    def __init__(self):
        super().__init__()

        def block(in_channels, out_channels):
            return [nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels),
                    nn.ReLU()]

        self.body = nn.Sequential(
            *block(1, 32), *block(32, 32), nn.MaxPool2d(2),        # [B, 32, 14, 14]
            *block(32, 64), *block(64, 64), nn.MaxPool2d(2),       # [B, 64, 7, 7]
            *block(64, 128), *block(128, 128),                     # [B, 128, 7, 7]
            nn.AdaptiveAvgPool2d(1), nn.Flatten())                 # [B, 128]
        self.head = nn.Linear(self.FEATURES, 10)
        self.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def forward(self, x):
        """float [B, 1, 28, 28] in [-1, 1] -> features [B, 128] and logits [B, 10]."""
        features = self.body((x + 1).contiguous(memory_format=torch.channels_last))  # black is 0, as is the padding
        return features, self.head(features)


def train_classifier(path, device, seed=0, epochs=14, batch_size=250):
    """Trains the classifier on the 60,000 training digits, writes it to `path` in half precision."""
    images, labels = load_dataset("MNIST", train=True)
    images, labels = images.to(device), labels.to(device)
    torch.manual_seed(seed)
    classifier = Classifier().to(device)
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps, pct_start=0.15)
    progress = tqdm(range(steps), desc="classifier")
    for step in progress:
        if step % (steps // epochs) == 0:
            order = torch.randperm(len(images), device=device)
        batch = order[step % (steps // epochs) * batch_size:][:batch_size]
        x = random_affine(to_float(images[batch]))
        with torch.autocast(device.type, torch.bfloat16):
            _, logits = classifier(x)
        loss = F.cross_entropy(logits.float(), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    state = {name: value.half() if value.is_floating_point() else value
             for name, value in classifier.cpu().state_dict().items()}
    with atomic_write(path) as file:
        torch.save(state, file)


def random_affine(x):
    """Every image turned (15 degrees at most), scaled (15 %), sheared and moved (2 pixels) at random; float [B, 1, H, W]."""
    angle, shear = (torch.rand(2, len(x), device=x.device) * 2 - 1) * 0.26
    scale_x, scale_y = 1 + (torch.rand(2, len(x), device=x.device) * 2 - 1) * 0.15
    dx, dy = (torch.rand(2, len(x), device=x.device) * 2 - 1) * 2 / 14
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack([scale_x * cos, scale_y * (shear * cos - sin), dx,
                         scale_x * sin, scale_y * (shear * sin + cos), dy], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1  # + 1: what comes in from outside is black, 0


def load_classifier(device, path=CLASSIFIER):
    content = Path(path).read_bytes()
    if CLASSIFIER_SHA256 and hashlib.sha256(content).hexdigest() != CLASSIFIER_SHA256:
        raise RuntimeError(f"{path} is damaged: its SHA-256 sum is wrong; restore it with git checkout")
    classifier = Classifier()
    classifier.load_state_dict(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    return classifier.eval().requires_grad_(False).to(device)


@torch.no_grad()
def classify(classifier, images, chunk=500):
    """uint8 [N, 1, 28, 28] -> features float64 [N, 128] and class probabilities float32 [N, 10], on the CPU."""
    device = classifier.head.weight.device
    features, probabilities = [], []
    for part in images.split(chunk):
        f, logits = classifier(to_float(part.to(device)))
        features.append(f.cpu().double())
        probabilities.append(logits.softmax(dim=1).cpu())
    return torch.cat(features), torch.cat(probabilities)


def frechet_distance(features_a, features_b):
    mean_a, mean_b = features_a.mean(dim=0), features_b.mean(dim=0)
    cov_a, cov_b = torch.cov(features_a.T), torch.cov(features_b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    middle = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * middle).item()


def main():
    parser = cli.Parser(description="How good are the samples?")
    parser.add_argument("--train-classifier", metavar="FILE", nargs="?", const="runs/classifier.pt")
    args = parser.parse_args()
    train_classifier(args.train_classifier, torch.device("cpu"))


if __name__ == "__main__":
    cli.run(main)
