"""How fast is it on a CPU? python tests/benchmark.py prints ratios of things measured in the same run.

Absolute times tell little, since machines differ by a factor of ten and the same machine by a third from one hour to
the next. So each figure stands beside what it is a share of: the machine's own best rate, the start-up of its
libraries, another size of the same job and, with --peer, the network of another library doing the same.

The commands are run as a user runs them, each in a process of its own, one after another.
"""
import concurrent.futures
import csv
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ddpm import DDPM
from diffusion_model import Model, build_network
from diffusion_schedules import linear_betas
from sample import generate
from utils.checkpoint import load_model
from utils.cli import Parser, faster_in_bf16, keep_memory, number, run
from utils.settings import SHORT_RUN

BATCH = 64  # images in the network at a time, where the settings do not say
PEER_STEPS = 20  # in sampling, one call of the network each


def parse_flags():
    """The command line as a namespace."""
    parser = Parser(__doc__)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--peer", action="store_true",
                       help="also train and sample diffusers' UNet2DModel (pip install diffusers), by our loss and "
                       f"{PEER_STEPS} steps of our dpm++")
    modes.add_argument("--minutes", type=number(0.05, 600), metavar="M",
                       help="instead, train for M minutes from scratch and measure 10,000 samples with evaluate.py")
    modes.add_argument("--profile", action="store_true",
                       help="instead, show where the network's time goes in a training step")
    modes.add_argument("--processes", action="store_true",
                       help="instead, train the default network in one process and in two, which torchrun starts")
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# Clocks

def timed(function, repeats=7):
    """The median time of a call, in seconds, after two calls that do not count."""
    function(), function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times)


@torch.no_grad()
def machine_rate():
    """What the machine can do at best, in fp32 operations per second (two to a multiply-add): the better of a large
    matrix product and a large 3x3 convolution. On some processors either is less than half of the other."""
    a = torch.randn(2048, 2048)
    x = torch.randn(64, 128, 28, 28).contiguous(memory_format=torch.channels_last)
    w = torch.randn(128, 128, 3, 3).contiguous(memory_format=torch.channels_last)
    return max(2 * 2048 ** 3 / timed(lambda: a @ a),
               2 * 64 * 128 * 128 * 9 * 28 * 28 / timed(lambda: F.conv2d(x, w, padding=1)))


# Runs a command and prints the seconds it took and its peak memory. In a small process between, since the peak that the
# system tells of a process is at least the size of the one that started it.
RUNNER = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def command(*words, **env):
    """Runs a Python command in a process of its own. Returns (seconds, peak resident memory in bytes).

    Raises:
        RuntimeError: it failed; with the last line it said.
    """
    done = subprocess.run([sys.executable, "-c", RUNNER, sys.executable, *map(str, words)], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | env)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(f"{' '.join(map(str, words))} failed: {lines[-1] if lines else done.returncode}")
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak) * (1 if sys.platform == "darwin" else 1024)


# ----------------------------------------------------------------------------------------------------------------------
# What is measured

def training_flops(settings):
    """Operations (two to a multiply-add) of convolutions and matrix products for one image, forward and backward."""
    network = build_network(settings)
    x, t = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 1000, (BATCH,))
    with FlopCounterMode(display=False) as counter:
        network(x, t).square().mean().backward()
    return counter.get_total_flops() / BATCH


def train_for_a_while(folder, precision, settings, steps=200, processes=1, **env):
    """Trains with train.py a network of some width by some batch size. Returns (images per second over whole steps,
    median of the reports but the first; peak memory of the largest process)."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "--"]
    _, memory = command(*torchrun * (processes > 1), "train.py", "--out", folder, "--max-steps", steps,
                        "--report-every", 50, "--precision", precision, "--device", "cpu",
                        "--network", settings["network"], "--width", settings["width"],
                        "--batch-size", settings["batch_size"], **env)
    with open(Path(folder) / "metrics.csv", newline="") as file:
        rates = [float(row["images_per_second"]) for row in csv.DictReader(file)]
    return median(rates[1:]), memory


def sampling_clock(model, n, **settings):
    """Samples n images and BATCH more before them. Returns the seconds passed after each batch, 0 after the first."""
    times = []
    for _, process in generate(model, n + BATCH, batch_size=BATCH, **settings):
        for _ in process:
            pass
        times.append(time.perf_counter())
    return [t - times[0] for t in times]


def calls_per_image(model):
    """How often a network looks at an image in sampling by default, the early one included."""
    seen = []
    hooks = [network.register_forward_hook(lambda network, x, out: seen.append(len(out)))
             for network in (model.network, model.early) if network]
    sampling_clock(model, BATCH)
    for hook in hooks:
        hook.remove()
    return sum(seen) / (2 * BATCH)


def peer_rates():
    """`_peer_rates` in a process of its own, where freed memory is kept, as train.py does."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, keep_memory) as process:
        return process.submit(_peer_rates).result()


def _peer_rates():
    """Images per second of diffusers' UNet2DModel in training, by our loss and AdamW, and in sampling, by PEER_STEPS of
    our sampler, in fp32: (training, sampling, multiply-adds of an image)."""
    from diffusers import UNet2DModel

    network = UNet2DModel(
        sample_size=28, in_channels=1, out_channels=1, block_out_channels=(32, 64, 64), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")).to(memory_format=torch.channels_last)
    ddpm, x = DDPM(linear_betas(1000)), torch.randn(BATCH, 1, 28, 28)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=True)

    def model(x_t, t):
        return network(x_t.contiguous(memory_format=torch.channels_last), t).sample

    def step():
        ddpm.loss(model, x, torch.randint(0, 1000, (BATCH,)), torch.randn_like(x)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def sample():
        for _ in ddpm.sample(model, x, sampler="dpm++", steps=PEER_STEPS):
            pass

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, torch.zeros(BATCH, dtype=torch.long))
    return BATCH / timed(step), BATCH / timed(sample, repeats=1), counter.get_total_flops() / BATCH / 2


def profile(model):
    """Prints the operations of the network's part of a training step by the time they take."""
    model.network.train().requires_grad_(True)
    x, t = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 1000, (BATCH,))

    def step():
        model.ddpm.loss(model, x, t, torch.randn_like(x)).mean().backward()

    step()
    with torch.profiler.profile() as profiler:
        for _ in range(5):
            step()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40,
                                        max_shapes_column_width=0))


# ----------------------------------------------------------------------------------------------------------------------

def row(name, value, limit="", form="{:.2f}"):
    """Prints a line of the table as soon as it is known: a name, a number in a format, and what it should be."""
    print(f"{name:<72}{form.format(value):>10}  {limit}".rstrip(), flush=True)


def quality(minutes, folder):
    """Trains for some minutes and measures what came of it."""
    command("train.py", "--out", folder / "run", "--minutes", minutes, "--device", "cpu")
    command("evaluate.py", "--checkpoint", folder / "run" / "checkpoint.pt", "--json", folder / "run.json",
            "--pairs", folder / "pairs.png", "--device", "cpu")
    with open(folder / "run" / "metrics.csv", newline="") as file:
        steps = int(list(csv.DictReader(file))[-1]["step"])
    figures = json.loads((folder / "run.json").read_text())
    name = f"after {minutes:g} minute{'s' * (minutes != 1)} of training: "
    row(name + "steps", steps, form="{:,.0f}")
    limits = {1: ("at most 0.25", ""), 5: ("at most 0.06", "at least 0.98")}.get(minutes, ("", ""))
    row(name + "Frechet distance", figures["frechet"], limits[0], form="{:.4f}")
    row(name + "over that of real digits", figures["frechet_ratio"])
    row(name + "digits read with confidence above 0.9", figures["confident"], limits[1], form="{:.4f}")
    row(name + "digits read as asked for", figures["label_agreement"], form="{:.4f}")


def speed(model, folder, peer):
    """Prints the table of everything but quality: of the network that ships, and of the small one that a run of few
    minutes trains, whose speed does not depend on its weights."""
    settings = model.settings | SHORT_RUN
    networks = {"": model, "small network, ": Model(build_network(settings).eval(), model.ddpm, settings)}
    precisions = ["fp32"] + ["bf16"] * faster_in_bf16(torch.device("cpu"))
    variants = list(itertools.product(networks, precisions))
    flops = {name: training_flops(network.settings) for name, network in networks.items()}
    for name in networks:  # two operations to a multiply-add, and backward has twice as many as forward
        row(f"{name}multiply-adds for an image, in millions", flops[name] / 6e6, form="{:.0f}")

    peers = [peer_rates()] if peer else []  # before ours, and again after it, as the machine may have become slower
    training, peaks = {}, []
    for name, precision in variants:
        before = machine_rate()
        training[name, precision], peak = train_for_a_while(folder / (name + precision), precision,
                                                            networks[name].settings)
        machine = (before + machine_rate()) / 2
        peaks.append(peak)
        row(f"training, {name}{precision}: images per second", training[name, precision], form="{:,.0f}")
        row(f"training, {name}{precision}: share of the machine's best fp32 rate",
            training[name, precision] * flops[name] / machine,
            "at least 0.75" if (name, precision) == ("", precisions[-1]) else "")
    row("training: peak memory, GB", max(peaks) / 1e9, "below 1.2")

    digits = "sample.py", "--n", 64, "--gif", "--out", folder / "samples", "--device", "cpu"
    pairs = [(command("-c", "import torch, torchvision")[0], command(*digits)[0])
             for _ in range(5)]  # in turn, so that a slow minute hits both
    row("sample.py --n 64 --gif, over python -c 'import torch, torchvision'",
        median(ours for _, ours in pairs) / median(imports for imports, _ in pairs), "at most 1.5")

    sampling, calls = {}, {name: calls_per_image(network) for name, network in networks.items()}
    for name, precision in variants:
        networks[name].precision = precision
        sampling[name, precision] = 256 / median(sampling_clock(networks[name], 256)[-1] for _ in range(3))
        row(f"sampling, {name}{precision}: images per second, {calls[name]:g} calls",
            sampling[name, precision], form="{:,.0f}")
    model.precision = "fp32"
    if peer:
        peer_training, peer_sampling, peer_size = map(mean, zip(*peers, peer_rates()))
        row("peer: multiply-adds for an image, in millions", peer_size / 1e6, form="{:.0f}")
        row("peer, fp32: images per second in training", peer_training, form="{:,.0f}")
        for name, precision in variants:
            row(f"training, {name}{precision}: ours over the peer's", training[name, precision] / peer_training)
        row(f"peer, fp32: images per second in sampling, {PEER_STEPS} calls", peer_sampling, form="{:,.1f}")
        for name, precision in variants:
            ratio = sampling[name, precision] / peer_sampling
            row(f"sampling, {name}{precision}: ours over the peer's", ratio,
                "at least 10" if precision == precisions[-1] else "")
            row(f"sampling, {name}{precision}: ours over the peer's, call by call", ratio * calls[name] / PEER_STEPS)

    few = {"steps": 2, "guidance": 1.0}  # what grows with the number of images does so whatever the steps
    seconds = sampling_clock(model, 10_000 // BATCH * BATCH, **few)
    # The first 256 images are too few to time once, so it is the median of all runs of 256 within the 10,000.
    runs = [b - a for a, b in zip(seconds[::4], seconds[4::4])]
    quarter = len(runs) // 4
    row("sampling 10,000 images: time of the last quarter over that of the first",
        sum(runs[-quarter:]) / sum(runs[:quarter]), "1 is linear")
    row("sampling: cost of an image at n = 10,000 over that at n = 256",
        seconds[-1] / (len(seconds) - 1) / (median(runs) / 4), "at most 1")
    ten, forty = (median(sampling_clock(model, 128, steps=steps, guidance=1.0)[-1] for _ in range(3))
                  for steps in (10, 40))
    row("sampling: time of 40 steps over time of 10", forty / ten, "4 is linear")
    for n in 64, 10_000:
        _, memory = command("sample.py", "--n", n, "--steps", 2, "--guidance", 1, "--npz", folder / "a.npz", "--gif",
                            "--out", folder / "samples", "--device", "cpu")
        row(f"sampling: peak memory for {n:,} images, GB", memory / 1e9, "below 0.9")


def scaling(model, folder, steps=100):
    """Prints what two processes of one thread do that share the batch of one process: of one with two threads, and of
    one with one thread and half of the batch (weak scaling)."""
    precision = "bf16" if faster_in_bf16(torch.device("cpu")) else "fp32"
    rates, whole = {}, model.settings["batch_size"]
    for processes, threads, batch in [(1, 2, whole), (2, 1, whole), (1, 1, whole // 2)] * 2:  # in turn
        settings, env = model.settings | {"batch_size": batch}, {"OMP_NUM_THREADS": str(threads)}
        out = Path(tempfile.mkdtemp(dir=folder))
        rate, memory = train_for_a_while(out, precision, settings, steps, processes, **env)
        rates.setdefault((processes, threads), []).append(rate)
        row(f"{processes} processes, {threads} threads each, {batch} images, {precision}: images per second", rate,
            f"{memory / 1e9:.2f} GB", form="{:,.0f}")
    rate = {key: mean(values) for key, values in rates.items()}
    row("2 processes of 1 thread over 1 process of 2", rate[2, 1] / rate[1, 2], "at least 0.95")
    row("weak scaling from 1 thread to 2 processes", rate[2, 1] / rate[1, 1], "2 is best")


def main():
    flags = parse_flags()
    model = load_model()
    if flags.profile:
        model.precision = "bf16" if faster_in_bf16(torch.device("cpu")) else "fp32"
        return profile(model)
    start = time.perf_counter()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n"
          "beside a figure stands what this project holds itself to\n")
    with tempfile.TemporaryDirectory() as folder:
        if flags.processes:
            scaling(model, Path(folder))
        elif flags.minutes:
            quality(flags.minutes, Path(folder))
        else:
            speed(model, Path(folder), flags.peer)
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    run(main)
