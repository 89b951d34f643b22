"""Several processes that train or sample together end as one does, stop together, and say in one line what is wrong."""
import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import evaluate
import helpers
import train
from helpers import FLAGS, ROOT, assert_one_line, before_step, call, few_digits, run_in, same, trained
from team import team
from utils import checkpoint, cli, muon, ranks
from utils.checkpoint import load_checkpoint

RUN = [*FLAGS, "--batch-size", 7, "--precision", "fp32", "--save-every", 4]  # parts of 4 and 3, or of 2, 2, 2 and 1


def noise(train_set):
    """Images that every process can make, instead of digits that it would have to read: 50 of them, with labels."""
    generator = torch.Generator().manual_seed(int(train_set))
    return torch.randint(256, (50, 1, 28, 28), dtype=torch.uint8, generator=generator), torch.arange(50) % 10


@contextlib.contextmanager
def little_data():
    with mock.patch.object(helpers, "first_digits", noise), few_digits():
        yield


@pytest.fixture(scope="module", autouse=True)
def quick():
    with little_data():
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The checkpoint of one process after 8 steps."""
    return run_in(tmp_path_factory.mktemp("alone"), *RUN, "--max-steps", 8)


def distance(a, b):
    """How far apart the weights of two checkpoints are, over how far they have come since the start. (By Euclid, not by
    the one weight that differs most: AdamW's first step divides a gradient by its size, and where it should be 0 that
    is rounding over rounding.)"""
    def weights(state):
        return torch.cat([state[name].flatten() for name in before])

    torch.manual_seed(0)
    before = train.build_network(a["settings"]).state_dict()  # as the run begins
    ours, theirs = weights(a["model"]), weights(b["model"])
    return ((ours - theirs).norm() / (ours - weights(before)).norm()).item()


# ----------------------------------------------------------------------------------------------------------------------
# What a process does before it begins

def few(rank):
    few.until_the_end = contextlib.ExitStack()
    few.until_the_end.enter_context(little_data())


def wrong_shares(rank):
    """The control: each process counts alike, whether its part of the batch is 4 images or 3."""
    few(rank)
    mean = train.mean_of_all
    train.mean_of_all = lambda tensors, share: mean(tensors, 1 / ranks.WORLD)


def at(step, which, number):
    """Sends process `which` a signal before a step."""
    def setup(rank):
        few(rank)
        if rank == which:
            draw_batch = train.draw_batch
            train.draw_batch = lambda now, *args: (now == step and os.kill(os.getpid(), number)
                                                   or draw_batch(now, *args))
    return setup


second_is_stopped, first_is_stopped = at(6, 1, signal.SIGTERM), at(6, 0, signal.SIGINT)
second_is_killed = at(6, 1, signal.SIGKILL)


def second_is_killed_in_the_optimizer(rank):
    """In the middle of the seventh step, when the other waits for its part of the update."""
    few(rank)
    if rank:
        steps, draw_batch, orthogonalize = [], train.draw_batch, muon.orthogonalize
        train.draw_batch = lambda step, *args: steps.append(step) or draw_batch(step, *args)
        muon.orthogonalize = lambda x: os.kill(os.getpid(), signal.SIGKILL) if 6 in steps else orthogonalize(x)


def nan_in_second(rank):
    few(rank)
    if rank:
        draw_batch = train.draw_batch
        train.draw_batch = lambda *args: (lambda x0, *rest: (x0 * float("nan"), *rest))(*draw_batch(*args))


def clocks_differ(rank):
    """That of the second process is slow."""
    few(rank)
    if rank:
        train.time = mock.Mock(wraps=time, monotonic=lambda: time.monotonic() * 0.5)


def evaluate_only_draws(rank):
    """And writes what it drew in place of the pairs."""
    def written(images, labels, pairs, **settings):
        torch.save((images, labels), pairs)
        sys.exit()
    evaluate.evaluate = written


def another_torch(rank):
    torch.__version__ = f"2.{rank}"


def impatient(rank):
    ranks.PATIENCE = 0.1


# ----------------------------------------------------------------------------------------------------------------------
# The same model

@pytest.mark.parametrize("n", [2, 4])
def test_several_processes_train_the_model_that_one_does(tmp_path, alone, n):
    results = team(n, "train", *RUN, "--max-steps", 8, "--out", tmp_path, setup="test_ranks.few",
                   env={"OMP_NUM_THREADS": 1})  # as torchrun sets it
    assert [result.code for result in results] == [0] * n, results
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert distance(alone, state) < 1e-4
    assert state["step"] == 8 and state["history"] == alone["history"] == []
    sums, expected = (torch.tensor(each["since_report"]["sums"]) for each in (state, alone))
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=0)
    # Only the first process speaks; it says how many they are.
    threads = max(1, len(os.sched_getaffinity(0)) // n)
    assert f"{threads} threads in each of {n} processes" in results[0].out and not results[0].err
    assert all(not result.out and not result.err for result in results[1:])


def test_a_share_that_is_not_that_of_the_images_would_be_seen(tmp_path, alone):
    """The control of the test above."""
    team(2, "train", *RUN, "--max-steps", 8, "--out", tmp_path, setup="test_ranks.wrong_shares")
    assert distance(alone, load_checkpoint(tmp_path / "checkpoint.pt")) > 1e-2


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (2, 2)])
def test_a_run_goes_on_in_another_number_of_processes(tmp_path, alone, before, after):
    for n, flags in (before, ["--max-steps", 3]), (after, ["--max-steps", 8, "--resume"]):
        results = team(n, "train", *RUN, *flags, "--out", tmp_path, setup="test_ranks.few")
        assert [result.code for result in results] == [0] * n, results
    assert distance(alone, load_checkpoint(tmp_path / "checkpoint.pt")) < 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# They stop together

def test_a_clock_ends_all_after_the_same_step(tmp_path):
    flags = [flag for flag in RUN if flag not in ("--save-every", 4)]
    results = team(2, "train", *flags, "--minutes", 0.02, "--out", tmp_path, setup="test_ranks.clocks_differ")
    assert [result.code for result in results] == [0, 0] and results[0].out.count("done") == 1, results


@pytest.mark.parametrize("setup, code", [("second_is_stopped", 143), ("first_is_stopped", 130)])
def test_a_signal_for_one_stops_all(tmp_path, setup, code):
    results = team(2, "train", *RUN, "--max-steps", 8, "--out", tmp_path, setup=f"test_ranks.{setup}")
    assert results[0].code == code, results
    step = load_checkpoint(tmp_path / "checkpoint.pt")["step"]
    assert step in (6, 7) and results[0].err.count("\n") == 1 and f"stopped at step {step};" in results[0].err
    assert not results[1].err


@pytest.mark.parametrize("where, saved", [("", 6), ("_in_the_optimizer", 7)])
def test_a_process_that_dies_ends_the_run_and_nothing_is_lost(tmp_path, alone, where, saved):
    first, second = team(2, "train", *RUN, "--max-steps", 8, "--out", tmp_path,
                         setup=f"test_ranks.second_is_killed{where}")
    assert second.code == -9
    assert_one_line(first, 1, "another process of this run has ended")
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == saved
    team(1, "train", *RUN, "--max-steps", 8, "--resume", "--out", tmp_path, setup="test_ranks.few")
    assert distance(alone, load_checkpoint(tmp_path / "checkpoint.pt")) < 1e-4


def test_nan_in_one_ends_all(tmp_path):
    first, second = team(2, "train", *RUN, "--max-steps", 8, "--out", tmp_path, setup="test_ranks.nan_in_second")
    assert_one_line(first, 1, "NaN", "nothing was saved yet")
    assert not second.err  # what both find is said once


# ----------------------------------------------------------------------------------------------------------------------
# One line

@pytest.mark.parametrize("flags, kwargs, code, words", [
    (["--batch-size", 1], {}, 2, ["--batch-size 1", "2 processes"]),
    (["--lr", "banana"], {}, 2, ["--lr", "banana"]),
    ([], {"own_flags": {1: ["--lr", 0.1]}}, 1, ["processes 0 and 1 differ in their flags"]),
    (["--device", "cuda"], {}, 1, ["--device cuda"]),
    ([], {"setup": "test_ranks.another_torch"}, 1, ["processes 0 and 1 differ in their version of torch"]),
])
def test_bad_usage_is_one_line(tmp_path, flags, kwargs, code, words):
    first, second = team(2, "train", *RUN, *flags, "--max-steps", 2, "--out", tmp_path / "run", **kwargs)
    assert_one_line(first, code, *words)
    assert not second.err
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("absent", [0, 1])
def test_processes_that_do_not_come_are_not_waited_for(tmp_path, absent):
    """The first one of them is where the others meet; without it nothing answers there."""
    result, = team(2, "train", *RUN, "--out", tmp_path, absent=[absent], setup="test_ranks.impatient")
    assert_one_line(result, 1, "did not find the 1 others at 127.0.0.1:", "MASTER_ADDR")


def test_a_folder_in_which_another_run_is_at_work(tmp_path):
    with checkpoint.lock_folder(tmp_path):
        first, _ = team(2, "train", *RUN, "--max-steps", 2, "--out", tmp_path)
    assert_one_line(first, 1, str(tmp_path))


def test_each_process_has_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cli, "LOCAL_RANK", 1)
    assert cli.pick_device("cuda") == torch.device("cuda")
    monkeypatch.setattr(cli, "LOCAL_WORLD", 2)
    assert cli.pick_device("auto") == cli.pick_device("cuda") == torch.device("cuda:1")
    assert cli.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(RuntimeError, match="cuda:1 is one GPU, and there are 2 processes"):
        cli.pick_device("cuda:1")
    monkeypatch.setattr(cli, "LOCAL_WORLD", 3)
    for name in "auto", "cuda":
        with pytest.raises(RuntimeError, match="3 processes need a GPU each, and there are 2"):
            cli.pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(cli, "LOCAL_WORLD", 1)
    for processes, device in (2, "cpu"), (1, "mps"):  # gloo knows no MPS, not even with one process for each machine
        monkeypatch.setattr(cli, "WORLD", processes)
        assert cli.pick_device("auto") == torch.device(device)
    monkeypatch.setattr(cli, "WORLD", 2)
    with pytest.raises(RuntimeError, match="--device mps is for one process only; .*--device cpu"):
        cli.pick_device("mps")


@pytest.mark.parametrize("env", [{"WORLD_SIZE": ""}, {"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "1"}], ids=str)
def test_odds_and_ends_of_torchrun_in_the_environment_make_no_other_process(monkeypatch, env):
    for name in "RANK", "WORLD_SIZE":
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = runpy.run_path(str(ROOT / "utils" / "ranks.py"))
    assert [found[name] for name in ("RANK", "WORLD", "LOCAL_RANK", "LOCAL_WORLD")] == [0, 1, 0, 1]


def test_torchrun_in_the_environment_makes_other_processes(monkeypatch):
    """The control of the test above."""
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    found = runpy.run_path(str(ROOT / "utils" / "ranks.py"))
    assert [found[name] for name in ("RANK", "WORLD", "LOCAL_RANK", "LOCAL_WORLD")] == [3, 4, 1, 2]


def test_the_first_process_goes_first_and_then_the_first_of_each_machine(monkeypatch):
    """Of four on two machines; all wait for each other as often."""
    waits = []
    for rank, local, before in [(0, 0, 0), (1, 1, 2), (2, 0, 1), (3, 1, 2)]:
        monkeypatch.setattr(ranks, "RANK", rank)
        monkeypatch.setattr(ranks, "LOCAL_RANK", local)
        monkeypatch.setattr(ranks, "largest", lambda *numbers: waits.append(numbers))
        waits.clear()
        with ranks.first_alone():
            assert len(waits) == before
        assert len(waits) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Sampling

@pytest.mark.parametrize("flags", [["--n", 11], ["--n", 4, "--classes"]])
def test_several_processes_draw_the_images_that_one_does(tmp_path, flags):
    """Into the same files, to the byte. (11 images in batches of 3 are 4 batches for 3 processes.)"""
    flags += ["--checkpoint", trained(), "--steps", 4, "--batch-size", 3, "--gif", "--trajectory", "--device", "cpu"]
    names = ["grid.png", "process.gif", "trajectory.png", "x.npz"]
    for n in 1, 3:
        out = tmp_path / str(n)
        results = team(n, "sample", *flags, "--out", out, "--npz", out / "x.npz")
        assert [result.code for result in results] == [0] * n, results
        assert [len(result.out.splitlines()) for result in results] == [4, 0, 0][:n]
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_several_processes_measure_what_one_does(tmp_path):
    for n in 1, 2:
        results = team(n, "evaluate", "--n", 70, "--checkpoint", trained(), "--steps", 2, "--batch-size", 8, "--pairs",
                       tmp_path / f"{n}.pt", "--device", "cpu", setup="test_ranks.evaluate_only_draws")
        assert [result.code for result in results] == [0] * n, results
    (images, labels), (others, other_labels) = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert len(images) == 70 and torch.equal(images, others) and torch.equal(labels, other_labels)


def test_each_process_has_a_dropout_of_its_own(tmp_path, monkeypatch):
    streams, fold_in = [], train.fold_in
    monkeypatch.setattr(train, "fold_in", lambda *numbers: streams.append(numbers) or fold_in(*numbers))
    for rank in 0, 1:
        monkeypatch.setattr(train, "RANK", rank)
        call(train, *FLAGS, "--max-steps", 2, "--out", tmp_path / str(rank))
    of_networks = [numbers for numbers in streams if len(numbers) == 3 and numbers[2] > 1]
    assert len(of_networks) == len(set(of_networks)) == 4


@pytest.mark.parametrize("flag", ["--npz=x.npz", "--sweep=x.png", "--train-classifier=x.pt"])
def test_what_processes_cannot_share_is_refused(monkeypatch, flag):
    monkeypatch.setattr(evaluate, "WORLD", 2)
    assert_one_line(call(evaluate, flag, "--device", "cpu"), 2, "without torchrun")


# ----------------------------------------------------------------------------------------------------------------------

def test_torchrun(tmp_path):
    """The real thing, and in it a usage error, which is said once."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    flags = [str(flag) for flag in [*RUN, "--batch-size", 1, "--max-steps", 2, "--out", tmp_path / "run"]]
    result = subprocess.run([*torchrun, str(ROOT / "train.py"), *flags], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert re.findall("train.py: error: .*", result.stderr) == [
        "train.py: error: --batch-size 1 is too small for 2 processes to share"]
