"""The benchmark's arithmetic. What it measures is not asserted anywhere: timings belong to a machine."""
import sys

import pytest

import benchmark
from checkpoint import Model, build_network
from ddpm import DDPM
from diffusion_schedules import linear_betas

SETTINGS = {"image_size": 28, "image_channels": 1, "classes": 10, "width": 8, "depth": 2, "class_shares": [0.1] * 10}


def test_training_flops_are_those_of_its_layers():
    """Counted by hand: two operations to a multiply-add, twice as many backward as forward, but for what has no
    gradient to pass on: the first layer's image and the time's sines."""
    fine, width = 3, 8
    convolutions = 9 * (4 * fine + 2 * fine * fine + (2 * fine * fine + fine * fine) + 4 * fine) * 14 * 14
    convolutions += 2 * fine * fine * 14 * 14                               # the 1x1 beside the block after the skip
    convolutions += 2 * 4 * fine * width * 7 * 7                            # down and up: 2x2
    convolutions += 2 * 2 * 9 * width * width * 7 * 7
    linear = 64 * 128 + 128 * 128 + 128 * 2 * (fine + fine + 2 * width)     # time; scale and shift
    first = 9 * 4 * fine * 14 * 14 + 64 * 128
    assert benchmark.training_flops(SETTINGS) == pytest.approx(2 * (3 * (convolutions + linear) - first))


def test_command_tells_time_and_memory_of_a_process():
    """Of that process alone, however large the one that asks (this one has torch in it)."""
    seconds, memory = benchmark.command("-c", "import time; x = b'x' * 100_000_000; time.sleep(0.5)")
    assert 0.5 < seconds < 30 and 1e8 < memory < 1.5e8


def test_command_fails_with_the_last_line_that_was_said():
    with pytest.raises(RuntimeError, match="ValueError: no such thing"):
        benchmark.command("-c", "raise ValueError('no such thing')")


def test_sampling_clock_has_a_time_for_each_batch(monkeypatch):
    monkeypatch.setattr(benchmark, "BATCH", 4)
    model = Model(build_network(SETTINGS), DDPM(linear_betas(10)), SETTINGS)
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


@pytest.mark.parametrize("flags", [["--minutes", "0"], ["--minutes", "nan"], ["--minutes", "-1"], ["--peer", "x"]])
def test_bad_flags_are_usage_errors(monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse_flags()
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_profile_prints_a_table_of_operations(capsys):
    model = Model(build_network(SETTINGS), DDPM(linear_betas(1000)), SETTINGS)
    benchmark.profile(model)
    assert "convolution" in capsys.readouterr().out
