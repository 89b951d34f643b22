"""How fast is it? python benchmark.py prints figures that compare: ratios of things measured in the same run.

Absolute times tell little, since machines differ by a factor of ten and the same machine by a third from one hour to
the next. So each figure stands beside what it is a share of: the machine's own best rate, the start-up of its
libraries, another size of the same job and, with --peer, the network of another library doing the same.

The commands are run as a user runs them, each in a process of its own. Takes about five minutes on two cores.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from checkpoint import SHIPPED, build_network, load_model
from cli import Parser, generate, integer, number, run
from ddpm import DDPM
from diffusion_schedules import linear_betas

HERE = Path(__file__).resolve().parent


def parse_flags():
    """The command line as a namespace."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", action="store_true",
                        help="also train and sample diffusers' UNet2DModel of similar size (pip install diffusers)")
    parser.add_argument("--minutes", type=number(0.05, 600), metavar="M",
                        help="also train for M minutes from nothing and measure 10,000 samples with evaluate.py")
    parser.add_argument("--profile", action="store_true", help="instead, show where the time of a training step goes")
    parser.add_argument("--images", type=integer(512, 100_000), default=10_000, metavar="N",
                        help="how many images to sample for the growth of time with their number")
    return parser.parse_args()


def timed(function, repeats=9):
    """The median time of a call, in seconds, after two calls that do not count."""
    function(), function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times)


def machine_rate():
    """What the machine can do at best, in fp32 operations per second: the better of a large matrix product and a large
    3x3 convolution."""
    with torch.no_grad():
        a = torch.randn(2048, 2048)
        x = torch.randn(64, 128, 28, 28).contiguous(memory_format=torch.channels_last)
        w = torch.randn(128, 128, 3, 3).contiguous(memory_format=torch.channels_last)
        return max(2 * 2048 ** 3 / timed(lambda: a @ a),
                   2 * 64 * 128 * 128 * 9 * 28 * 28 / timed(lambda: F.conv2d(x, w, padding=1)))


def command(*words, cwd=None):
    """Runs a Python command in a process of its own. Returns (seconds, peak memory in bytes)."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd or HERE, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    error = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))} failed: {error.strip().splitlines()[-1] if error else ''}")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def training_flops(network, batch_size=64):
    """Operations of convolutions and matrix products, forward and backward, for one image."""
    x, t = torch.randn(batch_size, 1, 28, 28), torch.randint(0, 1000, (batch_size,))
    with FlopCounterMode(display=False) as counter:
        network(x, t).square().mean().backward()
    return counter.get_total_flops() / batch_size


def training(folder, settings):
    """Trains for 400 steps with train.py. Returns (images per second of the median of the last reports, peak memory)."""
    _, memory = command("train.py", "--out", folder, "--max-steps", 400, "--report-every", 50, *settings)
    rows = (Path(folder) / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("images_per_second")
    return median(float(row.split(",")[column]) for row in rows[3:]), memory


def sampling_times(model, n, steps=20):
    """Samples n images by 20 steps. Returns the seconds that passed after each batch of 64, the first one being 0."""
    times = []
    for _, process in generate(model, n + 64, steps=steps, batch_size=64):
        for _ in process:
            pass
        times.append(time.perf_counter())
    return [t - times[0] for t in times]


def peer_network():
    """diffusers' UNet2DModel with 32, 64 and 64 channels, 1.1 million parameters, as a callable (x_t, t) -> noise."""
    from diffusers import UNet2DModel

    return UNet2DModel(sample_size=28, in_channels=1, out_channels=1, block_out_channels=(32, 64, 64), layers_per_block=1,
                       norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
                       up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")).to(memory_format=torch.channels_last)


def peer_rates():
    """(images per second in training, in sampling by 20 steps) of the peer's network in our loop's place, in fp32."""
    network, ddpm = peer_network(), DDPM(linear_betas(1000))
    model = lambda x_t, t: network(x_t, t).sample
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=True)
    x = torch.randn(64, 1, 28, 28)

    def step():
        ddpm.loss(model, x, torch.randint(0, 1000, (64,)), torch.randn_like(x)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def sample():
        for _ in ddpm.sample(model, x, sampler="dpm++", steps=20):
            pass

    return 64 / timed(step), 64 / timed(sample, repeats=3)


def profile():
    """Prints the operations of a training step by the time they take, and nothing else."""
    network = build_network(load_model().settings).to(memory_format=torch.channels_last)
    x, t = torch.randn(64, 1, 28, 28), torch.randint(0, 1000, (64,))
    network(x, t).square().mean().backward()
    with torch.profiler.profile() as profiler:
        for _ in range(5):
            network(x, t).square().mean().backward()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))


def main():
    flags = parse_flags()
    if flags.profile:
        return profile()
    if not SHIPPED.exists():
        raise FileNotFoundError(f"no {SHIPPED}; restore it with git checkout")
    rows = []

    def row(name, value, limit="", form="{:.2f}"):
        rows.append((name, form.format(value), limit))
        tqdm.write(f"{rows[-1][0]:<66}{rows[-1][1]:>10}  {limit}")

    model = load_model()
    flops = training_flops(build_network(model.settings).to(memory_format=torch.channels_last))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; limits are what this project holds itself to\n")
        row("multiply-adds of the network per image, millions", flops / 6e6, form="{:.0f}")
        for precision in ("fp32", "bf16"):
            rate = machine_rate()
            speed, memory = training(folder / precision, ["--precision", precision])
            row(f"training, {precision}: share of the machine's fp32 rate", speed * flops / rate,
                "at least 0.75" if precision == "bf16" else "")
            row(f"training, {precision}: images per second", speed, form="{:,.0f}")
        row("training: peak memory, GB", memory / 1e9, "below 1.2")

        times = []
        for _ in range(3):  # in turn, so that a slow minute hits both
            imports, _ = command("-c", "import torch, torchvision")
            ours, _ = command("sample.py", "--n", 64, "--gif", "--out", folder / "samples")
            times.append(ours / imports)
        row("sample.py --n 64 --gif over import torch, torchvision", median(times), "at most 1.5")

        seconds = sampling_times(model, flags.images)
        at = lambda n: seconds[n // 64] / (n // 64 * 64)
        row("sampling, 20 steps: images per second", 1 / at(256), form="{:,.0f}")
        row(f"sampling: cost of an image at n = {flags.images:,} over that at n = 256", at(flags.images) / at(256),
            "at most 1")
        few, many = (median(sampling_times(model, 256, steps)[-1] for _ in range(3)) for steps in (10, 40))
        row("sampling: time of 40 steps over time of 10", many / few, "4 is linear")
        _, small = command("sample.py", "--n", 64, "--npz", folder / "a.npz", "--out", folder / "samples")
        _, large = command("sample.py", "--n", 2048, "--npz", folder / "b.npz", "--out", folder / "samples")
        row("sampling: peak memory for 64 images, GB", small / 1e9, "below 0.9")
        row("sampling: peak memory for 2,048 images, GB", large / 1e9, "below 0.9")

        if flags.peer:
            train_rate, sample_rate = peer_rates()
            row("peer, training: images per second", train_rate, form="{:,.0f}")
            row("training: ours over the peer's", speed / train_rate)
            again = 256 / sampling_times(model, 256)[-1]
            row("sampling, 20 steps: ours over the peer's", again / sample_rate, "at least 10")

        if flags.minutes:
            command("train.py", "--out", folder / "run", "--minutes", flags.minutes, "--report-every", 10**6)
            command("evaluate.py", "--checkpoint", folder / "run" / "checkpoint.pt", "--json", folder / "run.json",
                    "--pairs", folder / "pairs.png")
            figures = json.loads((folder / "run.json").read_text())
            name = f"after {flags.minutes:g} minutes of training: "
            row(name + "Frechet distance", figures["frechet"], form="{:.3f}")
            row(name + "over that of real digits", figures["frechet_ratio"], form="{:.1f}")
            row(name + "digits read with confidence above 0.9", figures["confident"], form="{:.3f}")


if __name__ == "__main__":
    run(main)
