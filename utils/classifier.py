"""The classifier that evaluate.py looks through: a small network that reads digits, and how it is trained."""
import hashlib
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from utils.cli import faster_in_bf16
from utils.data import load_dataset, to_float
from utils.files import atomic_write

CLASSIFIER = Path(__file__).resolve().parent.parent / "assets" / "classifier.pt"
# 99.76 % of the test digits right, in the half precision that ships. Another classifier is another ruler.
CLASSIFIER_SHA256 = "7741364bb2321cebc82761739eb1dcca5ddec09a82286872da93525b485d2812"
CLASSIFIER_WIDTH = 32


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
        mixed: multiply in bfloat16: on some CPUs twice as fast.
    """
    batches = max(1, len(images) // batch_size)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.95, nesterov=True, weight_decay=5e-4)
    # One cycle of the learning rate, and of the momentum from 0.95 to 0.85 and back.
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

    Five minutes on two CPU cores that are faster in bfloat16. Prints its accuracy on the test digits, and its checksum.
    """
    images, labels = load_dataset("MNIST", train=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitNet(CLASSIFIER_WIDTH, 10).to(device)
    fit(net, images.to(device), labels.to(device), epochs=epochs, batch_size=250, lr=0.1, change=random_affine,
        mixed=faster_in_bf16(device), generator=torch.Generator().manual_seed(seed), name="classifier")
    with atomic_write(path) as file:
        torch.save({name: value.half() if value.is_floating_point() else value
                    for name, value in net.cpu().state_dict().items()}, file)

    checksum = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    images, labels = load_dataset("MNIST", train=False)
    _, probabilities = classify(load_classifier(device, path, checksum), images)
    accuracy = (probabilities.argmax(dim=1) == labels).double().mean().item()
    print(f"{path}: {accuracy:.2%} of the test digits right, SHA-256 {checksum}")
    print(f"To measure with it, copy it to {CLASSIFIER} and set CLASSIFIER_SHA256 in utils/classifier.py. The figures "
          "it gives cannot be compared with those of another classifier.")


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
