"""What the commands share: which device and precision, the defaults, images by number, and how a failure is told."""
import io
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cli
from ddpm import DDPM
from diffusion_schedules import make_betas


# ----------------------------------------------------------------------------------------------------------------------
# Memory

@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the memory of glibc")
def test_freed_memory_is_kept_until_the_program_ends():
    program = """
import atexit, torch
def resident():  # MB
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 // 2**20
atexit.register(lambda: print("end", resident()))  # the first to be registered comes last
from cli import keep_memory
keep_memory()
before = resident()
buffers = [torch.ones(5 * 2**20) for _ in range(10)]  # 20 MB each
del buffers
print("kept", resident() - before)
print("before", before)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(cli.__file__).parent, text=True,
                          capture_output=True, check=True)
    megabytes = {name: int(value) for name, value in map(str.split, done.stdout.splitlines())}
    assert megabytes["kept"] > 190
    assert megabytes["end"] < megabytes["before"] + 20


# ----------------------------------------------------------------------------------------------------------------------
# Devices

@pytest.mark.parametrize("cuda, mps, best", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_takes_the_best_device_there_is(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert cli.pick_device("auto") == torch.device(best)
    for name, there in ("cuda", cuda), ("mps", mps), ("cpu", True):
        if there:
            assert cli.pick_device(name) == torch.device(name)
        else:
            with pytest.raises(RuntimeError, match=f"--device {name} .*--device cpu"):
                cli.pick_device(name)


@pytest.mark.parametrize("able, expected", [
    ({"avx512_bf16": True, "amx_bf16": False}, True), ({"amx_bf16": True}, True),
    ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True}, False), ({}, False),
])
def test_bf16_is_for_processors_that_have_it(monkeypatch, able, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or expected)
    assert cli.has_bf16(torch.device("cpu")) is expected
    assert cli.has_bf16(torch.device("cuda")) is expected
    assert not cli.has_bf16(torch.device("mps"))


# ----------------------------------------------------------------------------------------------------------------------
# Sampling

def model_of(T=20, steps=None, **settings):
    """A model that sees no noise in anything."""
    settings = {"image_channels": 1, "image_size": 4, "classes": 3, "class_shares": [0.0, 0.5, 0.5]} | settings
    return SimpleNamespace(settings=settings, steps=steps, ddpm=DDPM(make_betas("linear", T)),
                           network=torch.nn.Linear(1, 1), denoiser=lambda x_t, t, labels=None: torch.zeros_like(x_t))


@pytest.mark.parametrize("sampler, T, classes, expected", [
    ("ddpm", 1000, 10, (1000, 1.3)), ("ddim", 1000, 10, (20, 1.3)), ("dpm++", 1000, 0, (10, 1)),
    ("ddim", 19, 10, (19, 1.3)),
    ("dpm++", 7, 10, (7, 1.3)),
])
def test_steps_and_guidance_by_default(sampler, T, classes, expected):
    model = model_of(T, classes=classes, label_dropout=0.1)
    assert cli.sampling_defaults(model, sampler)[:2] == expected
    assert cli.sampling_defaults(model, sampler, steps=3, guidance=0)[:2] == (3, 0)


@pytest.mark.parametrize("steps, batch_size, expected", [
    (1, 64, 2.5), (499, 64, 2.5), (500, 64, 1.75), (500, 63, 2.5), (2999, 64, 1.75), (3000, 64, 1.5), (3000, 63, 1.75),
    (15624, 64, 1.5), (15625, 64, 1.3), (15625, 63, 1.5),
    (None, 64, 1.3), (1, None, 1.3), (1, "64", 1.3), (1, -1.0, 1.3),
])
def test_a_model_that_was_trained_briefly_is_guided_more(steps, batch_size, expected):
    """By the images that it was trained on, if it says so."""
    model = model_of(label_dropout=0.1, steps=steps, batch_size=batch_size)
    assert cli.sampling_defaults(model, "dpm++")[1] == expected
    model = model_of(label_dropout=0.0, steps=1, batch_size=64)
    assert cli.sampling_defaults(model, "dpm++")[1] == 1


def test_a_model_trained_without_labels_knows_none_and_one_trained_with_them_only_is_not_guided():
    """--label-dropout 1, as in the paper, and 0."""
    without, only, calls = model_of(label_dropout=1.0), model_of(label_dropout=0.0), []
    assert cli.sampling_defaults(without, "ddim")[1] == cli.sampling_defaults(only, "ddim")[1] == 1
    for model, guidance, how in [(without, 0, "without labels"), (without, 2, "without labels"),
                                 (only, 0, "with labels only"), (only, 1.25, "with labels only")]:
        with pytest.raises(cli.UsageError, match=f"--guidance {guidance}: .* trained {how}; leave it at 1"):
            cli.generate(model, 1, guidance=guidance)
    with pytest.raises(cli.UsageError, match="no classes"):
        cli.generate(without, 1, digit=0)
    for model in without, only:
        model.denoiser = lambda x_t, t, labels=None: calls.append(labels) or torch.zeros_like(x_t)
        for labels, process in cli.generate(model, 3, steps=1):
            list(process)
            assert (labels is None) == (model is without)
    assert [None if labels is None else labels.shape for labels in calls] == [None, (3,)]


def test_noise_and_labels_are_made_where_the_model_is():
    """The meta device has shapes and no numbers, and stands for any other."""
    model, seen = model_of(label_dropout=0.1), []
    model.network.to("meta")
    model.denoiser = lambda x_t, t, labels=None: seen.extend([x_t, t] + [labels] * (labels is not None)) or x_t
    (_, process), = cli.generate(model, 3, steps=2, guidance=2, guidance_interval=(0, 1e9))
    assert [x.device.type for _, x, _ in process] == ["meta"] * 2
    assert len(seen) == 2 * (2 + 3) and {x.device.type for x in seen} == {"meta"}


def test_guidance_acts_between_two_noise_levels():
    """Both included. There each step takes two calls of the network, elsewhere one, with the label."""
    model, seen = model_of(label_dropout=0.1), []
    model.denoiser = lambda x_t, t, labels=None: seen.append((t[0].item(), labels is None)) or torch.zeros_like(x_t)
    sigmas = ((1 - model.ddpm.alpha_bars) / model.ddpm.alpha_bars).sqrt().tolist()
    low, high = sigmas[5], sigmas[11]

    def calls(**settings):
        seen.clear()
        for _, process in cli.generate(model, 3, sampler="ddim", steps=20, **settings):
            list(process)
        return sorted(seen)

    everywhere, without = [(t, False) for t in range(20)], [(t, True) for t in range(20)]
    assert calls(guidance=2, guidance_interval=(low, high)) == sorted(everywhere + without[5:12])
    assert calls(guidance=2, guidance_interval=(0, 1e9)) == sorted(everywhere + without)
    assert calls(guidance=1, guidance_interval=(low, high)) == everywhere
    assert calls(guidance=0, guidance_interval=(low, high)) == without
    inside = [t for t in range(20) if 1.3 <= sigmas[t] <= 35]
    assert calls() == sorted(everywhere + [(t, True) for t in inside]) and 0 < len(inside) < 20


def test_guidance_is_not_lost_between_the_steps():
    """If none lies between the noise levels by default, all are guided. If none lies between those asked for, they are
    refused, unless nothing is guided anyway."""
    model = model_of(T=1000, label_dropout=0.1)
    assert cli.sampling_defaults(model, "dpm++", 8)[2] == (1.3, 35)
    assert cli.sampling_defaults(model, "dpm++", 3)[2] == cli.EVERYWHERE  # of 157, 1.25 and 0.01
    assert cli.sampling_defaults(model, "dpm++", 3, None, (1.2, 2))[2] == (1.2, 2)
    for guidance in None, 3:
        with pytest.raises(cli.UsageError, match="--guidance-interval 1.3 2 holds none of the 3 .* 0.01 to 157"):
            cli.generate(model, 1, steps=3, guidance=guidance, guidance_interval=(1.3, 2))
    for guidance in 0, 1:
        cli.generate(model, 1, steps=3, guidance=guidance, guidance_interval=(1.3, 2))


def test_labels_are_those_of_the_images_numbers():
    wanted = [cli.label(i, [0.0, 0.5, 0.5]) for i in range(7)]
    assert set(wanted) == {1, 2}
    for batch_size in 1, 3, 7:
        drawn = [labels for labels, _ in cli.generate(model_of(), 7, batch_size=batch_size)]
        assert torch.cat(drawn).tolist() == wanted


@pytest.mark.parametrize("settings, words", [
    ({"steps": 21}, "--steps 21"), ({"digit": 3}, "--digit 3.*0 to 2"), ({"guidance": 2, "classes": 0}, "--guidance 2"),
    ({"digit": 0, "classes": 0}, "no classes"), ({"guidance_interval": (3, 2)}, "--guidance-interval 3 2 holds none"),
])
def test_what_the_model_cannot_do_is_bad_usage(settings, words):
    model = model_of(**{name: settings.pop(name) for name in ("classes",) if name in settings})
    with pytest.raises(cli.UsageError, match=words):
        cli.generate(model, 1, **settings)
    cli.generate(model, 1, steps=20)


# ----------------------------------------------------------------------------------------------------------------------
# Flags and failures

@pytest.mark.parametrize("kind, good, bad", [
    (cli.integer(1, 5), ["1", "5"], ["0", "6", "1.5", "1e0", "x", ""]),
    (cli.number(0.5, 2), ["0.5", "2", "1e0"], ["0.4", "2.1", "nan", "inf", "x", ""]),
])
def test_both_ends_of_a_range_are_in_it(kind, good, bad):
    assert [kind(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(cli.argparse.ArgumentTypeError):
            kind(text)


def test_an_empty_path_is_refused():
    assert cli.path("a folder/b") == "a folder/b"
    with pytest.raises(cli.argparse.ArgumentTypeError, match="empty"):
        cli.path("")


@pytest.mark.parametrize("error, code, text", [
    (cli.UsageError("--x is wrong"), 2, "--x is wrong"), (ValueError("two\nlines"), 1, "two lines"),
    (FileNotFoundError(2, "No such file", "there.pt"), 1, "there.pt: No such file; check the path"),
    (OSError(28, "No space left on device"), 1, "No space left on device; check"),
    (KeyError("name"), 1, "KeyError: 'name'"), (KeyboardInterrupt(), 130, "interrupted"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "out of memory; try a smaller --batch-size"),
    (RuntimeError("DefaultCPUAllocator: not enough memory"), 1, "out of memory; try a smaller --batch-size"),
    (MemoryError("Unable to hold an array"), 1, "out of memory; try a smaller --batch-size"),
], ids=str)
def test_a_failure_is_one_line_and_a_code(monkeypatch, capsys, error, code, text):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["folder/train.py"])
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    out, err = capsys.readouterr()
    assert end.value.code == code and out == ""
    assert err.startswith(f"train.py: error: {text}") and err.count("\n") == 1 and err.endswith("\n")


def test_torch_and_numpy_out_of_memory_are_known_as_such(monkeypatch, capsys):
    """By what they say themselves, here."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    for allocate in (lambda: torch.empty(2**60, dtype=torch.uint8)), (lambda: np.empty(2**60, dtype=np.uint8)):
        with pytest.raises(SystemExit):
            cli.run(allocate)
        assert capsys.readouterr().err == "train.py: error: out of memory; try a smaller --batch-size\n"


def test_a_name_that_cannot_be_printed_is_printed_nevertheless(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    cli.run(lambda: print("\u6f22.png"))
    assert written.getvalue().split() == [rb"\u6f22.png"]


def test_a_flag_of_two_lines_is_refused_in_one(capsys):
    with pytest.raises(SystemExit) as end:
        cli.Parser(prog="x.py").parse_args(["--one\ntwo"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "x.py: error: unrecognized arguments: --one two (see --help)\n"


def test_stdout_may_be_closed(monkeypatch):
    """python sample.py >&-"""
    monkeypatch.setattr(sys, "stdout", None)
    cli.run(lambda: print("done"))
    assert sys.stdout.name == os.devnull
    sys.stdout.close()


def test_the_traceback_is_there_for_who_asks(monkeypatch):
    def main():
        raise ValueError("a bug")

    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError, match="a bug"):
        cli.run(main)
