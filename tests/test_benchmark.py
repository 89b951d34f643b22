"""The benchmark's arithmetic. What it measures is not asserted anywhere: timings belong to a machine."""
import json
import sys
from pathlib import Path

import pytest
import torch

import benchmark
from ddpm import DDPM
from diffusion_model import Model, build_network
from diffusion_schedules import cosine_betas, linear_betas
from helpers import NETWORK, assert_one_line, call, start

SETTINGS = NETWORK | {"network": "unet", "depth": 2}


def test_training_flops_are_those_of_its_layers():
    """Counted by hand: two operations to a multiply-add, twice as many backward as forward, but for what has no
    gradient to pass on: the first layer's image and the time's sines."""
    fine, width = 3, 8
    convolutions = 9 * (4 * fine + 2 * fine * fine + (2 * fine * fine + fine * fine) + 4 * fine) * 14 * 14
    convolutions += 2 * fine * fine * 14 * 14                               # the 1x1 beside the block after the skip
    convolutions += 2 * 4 * fine * width * 7 * 7                            # down and up: 2x2
    convolutions += 2 * 2 * 9 * width * width * 7 * 7
    mixing = 2 * width * 49 * 49
    linear = 64 * 128 + 128 * 128 + 128 * 2 * (fine + fine + 2 * width)     # time; scale and shift
    first = 9 * 4 * fine * 14 * 14 + 64 * 128
    assert benchmark.training_flops(SETTINGS) == pytest.approx(2 * (3 * (convolutions + mixing + linear) - first))


def test_it_is_run_by_its_path_from_anywhere(tmp_path):
    process = start("tests/benchmark.py", "--help", cwd=tmp_path)
    out, err = process.communicate(timeout=900)
    assert (process.returncode, err) == (0, "") and "--minutes" in out


def test_command_tells_time_and_memory_of_a_process(monkeypatch, tmp_path):
    """Of that process alone, however large the one that asks (this one has torch in it); in the folder of train.py."""
    monkeypatch.chdir(tmp_path)
    code = "import time; open('train.py').close(); x = b'x' * 100_000_000; time.sleep(0.5)"
    seconds, memory = benchmark.command("-c", code)
    assert 0.5 < seconds < 30 and 1e8 < memory < 1.5e8


def test_command_fails_with_the_last_line_that_was_said():
    with pytest.raises(RuntimeError, match="ValueError: no such thing"):
        benchmark.command("-c", "raise ValueError('no such thing')")


def test_sampling_clock_has_a_time_for_each_batch(monkeypatch):
    monkeypatch.setattr(benchmark, "BATCH", 4)
    model = Model(build_network(SETTINGS), DDPM(cosine_betas(10)), SETTINGS)
    times = benchmark.sampling_clock(model, 12, steps=2)
    assert len(times) == 4 and times[0] == 0 and times == sorted(times)


def test_timed_does_not_count_the_first_calls(monkeypatch):
    clock = iter([0, 1, 0, 5, 0, 2])
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    calls = []
    assert benchmark.timed(lambda: calls.append(1), repeats=3) == 2 and len(calls) == 5


def test_machine_rate_is_a_rate(monkeypatch):
    """The better of its two, in operations per second."""
    seconds = iter([2.0, 1.0])
    monkeypatch.setattr(benchmark, "timed", lambda function: next(seconds))
    assert benchmark.machine_rate() == max(2 * 2048 ** 3 / 2, 2 * 64 * 128 * 128 * 9 * 28 * 28)


@pytest.mark.parametrize("flags", [["--minutes", "0"], ["--minutes", "nan"], ["--minutes", "-1"], ["--peer", "x"],
                                   ["--minutes", "1", "--peer"], ["--minutes", "1", "--profile"]])
def test_bad_flags_are_usage_errors(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse_flags()
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_profile_prints_a_table_of_operations(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "BATCH", 4)
    model = Model(build_network(SETTINGS), DDPM(linear_betas(1000)), SETTINGS)
    benchmark.profile(model)
    assert "convolution" in capsys.readouterr().out


@pytest.fixture
def canned(monkeypatch):
    """No command runs: each is noted in the list returned, and leaves what it would have left. The machine does 1e12
    operations per second, the network takes 6e9 an image, and half a second per step for a batch of 64 images. The
    small one, told by its width of 64, takes half of both."""
    commands = []

    def command(name, *flags):
        commands.append([name, *map(str, flags)])
        given = dict(zip(commands[-1], commands[-1][1:]))
        if name == "train.py":
            Path(given["--out"]).mkdir(parents=True)
            rates = (1, 900, 1100, 1000) if given.get("--width") == "64" else (1, 300, 500, 400)
            (Path(given["--out"]) / "metrics.csv").write_text("".join(
                ["step,images_per_second\n", *(f"{50 * i},{rate}\n" for i, rate in enumerate(rates, 1))]))
        if name == "evaluate.py":
            Path(given["--json"]).write_text(json.dumps(
                {"frechet": 0.0275, "frechet_ratio": 1.5, "confident": 0.99, "label_agreement": 0.98}))
        if name == "train.py":
            return 90.0, 1.1e9 if given.get("--precision") == "fp32" else 1e9
        return {"sample.py": (3.0, 7e8)}.get(name, (2.0, 5e8))

    monkeypatch.setattr(benchmark, "command", command)
    monkeypatch.setattr(benchmark, "machine_rate", lambda: 1e12)
    monkeypatch.setattr(benchmark, "training_flops", lambda settings: 6e9 if settings["width"] == 8 else 3e9)
    monkeypatch.setattr(benchmark, "faster_in_bf16", lambda device: True)
    peers = iter([(90, 1, 5e6), (110, 3, 5e6)])  # once before ours and once after
    monkeypatch.setattr(benchmark, "peer_rates", lambda: next(peers))
    monkeypatch.setattr(benchmark, "sampling_clock", lambda model, n, steps=10, guidance=2: [
        k * 0.5 * steps * (0.5 if model.precision == "bf16" else 1) * min(guidance, 2) / 2
        * (0.5 if model.settings["width"] == 64 else 1) for k in range(n // 64 + 1)])
    settings = SETTINGS | {"batch_size": 64}
    model = Model(build_network(settings), DDPM(cosine_betas(10)), settings)
    monkeypatch.setattr(benchmark, "load_model", lambda: model)
    monkeypatch.setattr(benchmark, "calls_per_image", lambda model: 8)
    return commands


def test_calls_are_counted(monkeypatch):
    """Of a model that knows labels and their lack: 24 steps, five of them guided; seven if by its early self."""
    monkeypatch.setattr(benchmark, "BATCH", 4)
    settings = SETTINGS | {"label_dropout": 0.1, "width": 8}
    model = Model(build_network(settings), DDPM(linear_betas(1000)), settings)
    assert benchmark.calls_per_image(model) == 29
    model.early = build_network(settings)
    assert benchmark.calls_per_image(model) == 31


def figures_of(result):
    """name -> figure, of the table that was printed."""
    assert result.code == 0, result.err
    return {line[:72].strip(): line[72:].split()[0] for line in result.out.splitlines() if len(line) > 72}


def test_the_table_by_hand(canned):
    figures = figures_of(call(benchmark, "--peer"))
    expected = {
        "multiply-adds for an image, in millions": "1000",
        "small network, multiply-adds for an image, in millions": "500",
        "training, fp32: images per second": "400",  # the median of the reports but the first
        "training, bf16: share of the machine's best fp32 rate": "2.40",  # 400 * 6e9 / 1e12
        "training, small network, fp32: images per second": "1,000",
        "training, small network, bf16: share of the machine's best fp32 rate": "3.00",
        "training: peak memory, GB": "1.10",  # the largest
        "sample.py --n 64 --gif, over python -c 'import torch, torchvision'": "1.50",
        "sampling, fp32: images per second, 8 calls": "13",  # 256 in 4 * 5 s
        "sampling, bf16: images per second, 8 calls": "26",
        "sampling, small network, fp32: images per second, 8 calls": "26",
        "peer, fp32: images per second in sampling, 20 calls": "2.0",
        "training, fp32: ours over the peer's": "4.00",
        "sampling, fp32: ours over the peer's": "6.40",
        "sampling, bf16: ours over the peer's": "12.80",
        "sampling, bf16: ours over the peer's, call by call": "5.12",
        "training, small network, fp32: ours over the peer's": "10.00",
        "sampling, small network, bf16: ours over the peer's": "25.60",
        "sampling 10,000 images: time of the last quarter over that of the first": "1.00",
        "sampling: cost of an image at n = 10,000 over that at n = 256": "1.00",
        "sampling: time of 40 steps over time of 10": "4.00",
        "sampling: peak memory for 10,000 images, GB": "0.70",
    }
    assert {name: figures.get(name) for name in expected} == expected
    assert [flags[flags.index("--precision") + 1] for flags in canned if flags[0] == "train.py"] == 2 * ["fp32", "bf16"]
    sizes = [(flags[flags.index("--width") + 1], flags[flags.index("--batch-size") + 1])
             for flags in canned if flags[0] == "train.py"]
    assert sizes == 2 * [("8", "64")] + 2 * [("64", "64")]


def test_the_peer_is_left_out_unasked(canned, monkeypatch):
    """And so is bf16 where the processor has none."""
    monkeypatch.setattr(benchmark, "faster_in_bf16", lambda device: False)
    figures = figures_of(call(benchmark))
    assert figures and not [name for name in figures if "peer" in name or "bf16" in name]


def test_minutes_train_and_evaluate_and_nothing_else(canned):
    figures = figures_of(call(benchmark, "--minutes", 5))
    assert [flags[0] for flags in canned] == ["train.py", "evaluate.py"]
    assert canned[0][canned[0].index("--minutes") + 1] == "5.0"
    assert canned[1][canned[1].index("--checkpoint") + 1] == str(
        Path(canned[0][canned[0].index("--out") + 1]) / "checkpoint.pt")
    assert {name.removeprefix("after 5 minutes of training: "): figure for name, figure in figures.items()} == {
        "steps": "200", "Frechet distance": "0.0275", "over that of real digits": "1.50",
        "digits read with confidence above 0.9": "0.9900", "digits read as asked for": "0.9800"}


@pytest.mark.parametrize("minutes, distance, confidence", [
    (1, ["at most 0.25"], []), (5, ["at most 0.06"], ["at least 0.98"]), (30, [], [])])
def test_limits_stand_beside_the_quality_that_they_are_for(canned, minutes, distance, confidence):
    out = call(benchmark, "--minutes", minutes).out
    lines = {line[:72].strip(): line[84:].strip() for line in out.splitlines() if " of training: " in line}
    limits = {name.split(": ")[1]: limit for name, limit in lines.items() if limit}
    assert [limit for name, limit in limits.items() if name == "Frechet distance"] == distance
    assert [limit for name, limit in limits.items() if "confidence" in name] == confidence
    assert len(limits) == len(distance + confidence)


def test_a_command_that_fails_is_one_line(canned, monkeypatch):
    def command(*words):
        raise RuntimeError("train.py failed: no space left")

    monkeypatch.setattr(benchmark, "command", command)
    assert_one_line(call(benchmark, "--minutes", 5), 1, "train.py failed")


def test_profile_is_of_the_precision_that_is_trained_in(canned, monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark, "profile", lambda model: seen.append(model.precision))
    assert call(benchmark, "--profile").code == 0 and seen == ["bf16"] and not canned


def test_the_peer_trains_and_samples_as_we_do(monkeypatch):
    """Diffusers' network, with a clock that only calls."""
    pytest.importorskip("diffusers")
    monkeypatch.setattr(benchmark, "BATCH", 2)
    monkeypatch.setattr(benchmark, "timed", lambda function, repeats=7: function() or 0.5)
    torch.manual_seed(0)
    training, sampling, size = benchmark._peer_rates()
    assert training == sampling == 4 and 1e7 < size < 1e9
