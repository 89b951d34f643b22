"""Whole commands on devices that are not there, to their last number: nothing may meet a tensor of another device, and
nothing on MPS may be float64."""
import contextlib
import functools
import json
import sys
from types import SimpleNamespace

import pytest
import torch

import evaluate
import sample
import train
from ddpm import DDPM, SAMPLERS
from diffusion_schedules import make_betas
from fake_device import Elsewhere, pretend
from helpers import FLAGS, call, metrics, run_in, same, trained
from utils import classifier, pictures
from utils import metrics as ruler
from utils.checkpoint import load_model
from utils.data import DATASETS, load_dataset, read_npz

DEVICES = ["cuda", "mps"]


def there(device):
    """pretend(device), unless it is the CPU."""
    return pretend(device) if device != "cpu" else contextlib.nullcontext()


@pytest.fixture(scope="module")
def digits():
    """Real digits, few of them: train and test images with their labels."""
    return {train_set: tuple(x[:n].clone() for x in load_dataset("MNIST", train=train_set))
            for train_set, n in [(True, 200), (False, 60)]}


@pytest.fixture(autouse=True)
def small_world(monkeypatch, digits, tmp_path):
    """The commands among these digits, in a folder of their own, and without plots, which know no device. Returns a
    checkpoint."""
    checkpoint = trained()
    monkeypatch.setitem(DATASETS, "MNIST", lambda root, train: digits[train])
    monkeypatch.setattr(ruler.Validation, "IMAGES", 16)
    monkeypatch.setattr(pictures, "plot_losses", lambda *arguments: None)
    monkeypatch.setattr(evaluate, "plot_sweep", lambda *arguments: None)
    monkeypatch.setattr(train, "draw", lambda model, n, **how: sample.draw(model, 4, steps=2, **how))
    monkeypatch.setattr(evaluate, "two_sample_figures", functools.partial(ruler.two_sample_figures, repeats=1))
    monkeypatch.setattr(ruler, "REAL_SETS", 1)
    monkeypatch.setattr(ruler, "GROUPS", 4)
    for figure in ruler.FEWEST:
        monkeypatch.setitem(ruler.FEWEST, figure, 40)
    monkeypatch.chdir(tmp_path)
    return checkpoint


# ----------------------------------------------------------------------------------------------------------------------
# The three commands

def training(out, device, *flags):
    """6 steps with reports, stopped once; returns the checkpoint."""
    flags = ["--report-every", 3, "--precision", "fp32", *flags, "--device", device]
    run_in(out, *flags, "--max-steps", 4)
    return run_in(out, *flags, "--max-steps", 6, "--resume")


@pytest.mark.parametrize("flags", [[], ["--precision", "bf16"], ["--optimizer", "adamw"]], ids=str)
def test_training_on_a_gpu_ends_as_on_the_cpu(tmp_path, flags):
    """Bit for bit, since the pretended one computes as the CPU does. Optimizers, moving average, validation, sample
    grids, --resume and all."""
    with pretend("cuda"):
        there = training(tmp_path / "there", "cuda", *flags)
    here = training(tmp_path / "here", "cpu", *flags)
    assert same(there, here) and same(metrics(tmp_path / "there"), metrics(tmp_path / "here"))
    assert not same(there["model"], there["ema"])


def test_training_on_mps_ends_nearly_as_on_the_cpu(tmp_path):
    """Up to sums in float32 and another implementation of AdamW. A step of Muon is 1e-3 here, and it makes more of what
    is rounded in directions that the gradient hardly has."""
    with pretend("mps"):
        there = training(tmp_path / "there", "mps")
    here = training(tmp_path / "here", "cpu")
    for name in "model", "ema":
        for key, value in there[name].items():
            torch.testing.assert_close(value, here[name][key], rtol=3e-4, atol=1e-5)
    for a, b in zip(metrics(tmp_path / "there"), metrics(tmp_path / "here"), strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-5)
        assert float(a["validation_loss"]) == pytest.approx(float(b["validation_loss"]), rel=1e-4)


def test_a_run_moves_from_one_device_to_another(tmp_path):
    flags = [*FLAGS, "--out", tmp_path, "--max-steps"]
    with pretend("cuda"):
        assert call(train, *flags, 2, "--device", "cuda", "--precision", "fp32").code == 0
    with pretend("mps"):
        result = call(train, *flags, 4, "--resume", "--device", "auto")
        assert result.code == 0 and "device      mps" in result.out, result.err
    assert call(train, *flags, 6, "--resume", "--device", "cpu").code == 0


@pytest.mark.parametrize("flags", [
    *[["--sampler", sampler, "--guidance", 2] for sampler in SAMPLERS],
    ["--guidance", 0], ["--guidance", 1], ["--digit", 7, "--no-clip"], ["--precision", "bf16"],
], ids=lambda flags: " ".join(map(str, flags)))
def test_sampling_draws_what_the_cpu_draws(tmp_path, small_world, flags):
    """Byte for byte, with a GIF and over several batches."""
    made = {}
    for device in ["cpu", *DEVICES]:
        out = tmp_path / device
        with there(device):
            result = call(sample, "--checkpoint", small_world, "--n", 5, "--batch-size", 3, "--steps", 4, "--gif",
                          "--out", out, "--npz", out / "x.npz", *flags, "--device", device)
        assert result.code == 0, f"on {device}: {result.err}"
        made[device] = {file: (out / file).read_bytes() for file in ("grid.png", "process.gif")} | {
            "images": read_npz(out / "x.npz")[0].tolist()}
    assert made["cuda"] == made["cpu"] and made["mps"] == made["cpu"]


def test_evaluation_measures_what_the_cpu_measures(tmp_path, small_world, monkeypatch):
    """Every figure, the bound and the two-sample test among them."""
    monkeypatch.setattr(ruler, "fit", lambda *args, epochs, real=ruler.fit, **how: real(*args, epochs=1, **how))
    made = {}
    for device in ["cpu", *DEVICES]:
        with there(device):
            result = call(evaluate, "--checkpoint", small_world, "--n", 40, "--batch-size", 40, "--steps", 3,
                          "--device", device, "--json", f"{device}.json")
        assert result.code == 0, f"on {device}: {result.err}"
        made[device] = json.loads((tmp_path / f"{device}.json").read_text())
    assert made["cuda"] == made["cpu"] and made["mps"] == made["cpu"]
    assert made["cpu"]["bits_per_dim"] > 0 and made["cpu"]["two_sample_accuracy"] > 0


@pytest.mark.parametrize("device, judge", [("cuda", "cuda"), ("mps", "cpu")])
@pytest.mark.parametrize("flags", [["--n", 4, "--steps", 2], ["--train-classifier"]], ids=str)
def test_no_judge_is_trained_on_mps(small_world, monkeypatch, flags, device, judge):
    """There some versions of torch train batch normalization wrongly, or crash."""
    judges = []
    monkeypatch.setattr(evaluate, "evaluate", lambda *images, device, **how: sys.exit(judges.append(device.type) or 0))
    monkeypatch.setattr(evaluate, "train_classifier", lambda path, device, seed: judges.append(device.type))
    model = [] if "--train-classifier" in flags else ["--checkpoint", small_world]
    with pretend(device):
        assert call(evaluate, *flags, *model, "--device", device).code == 0
    assert judges == [judge]


@pytest.mark.parametrize("device", DEVICES)
def test_the_sweep_and_the_exact_bound(small_world, device):
    with pretend(device) as home:
        model = load_model(small_world, home)
        flags = SimpleNamespace(device=device, seed=0, sampler="dpm++", steps=2, guidance=None, clip=True,
                                batch_size=40, guidance_interval=None, guide=None, json=None)
        rows = evaluate.sweep(model, 40, "sweep.png", flags, dict.fromkeys(SAMPLERS, ()) | {"ddpm": (2,)}, (1.5,))
        images = load_dataset("MNIST", train=False)[0][:3]
        bits = ruler.bits_figures(model, images, exact=True)
    assert bits == ruler.bits_figures(load_model(small_world), images, exact=True)
    assert [(row["sampler"], row["steps"]) for row in rows] == [("ddpm", 2), ("dpm++", 2)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_classifier_is_trained(tmp_path, monkeypatch, capsys, device):
    """In float32, which is faster for networks as small as these."""
    monkeypatch.setattr(classifier, "CLASSIFIER_WIDTH", 4)
    Elsewhere.used.clear()
    with pretend(device) as home:
        classifier.train_classifier(tmp_path / "classifier.pt", home, epochs=1)
    assert "of the test digits right" in capsys.readouterr().out
    dtypes = {dtype for name, dtype in Elsewhere.used if name == "aten::convolution"}
    assert dtypes == {torch.float32}
    assert {x.device.type for x in torch.load(tmp_path / "classifier.pt", weights_only=True).values()} == {"cpu"}


# ----------------------------------------------------------------------------------------------------------------------
# Parts

@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_is_drawn_on_the_device_of_the_images(digits, device):
    """And so are the weights of what was drawn. The timesteps are those that the CPU draws."""
    settings = {"seed": 0, "batch_size": 70, "label_dropout": 0.1, "classes": 10}
    (images, labels), ddpm, made = digits[True], DDPM(make_betas("linear", 20)), {}
    for name in device, "cpu":
        with there(name):
            home = torch.device(name)
            p, *weights = train.objective(ddpm, "v", home)
            drawn = train.draw_batch(2, images.to(home), labels.to(home), settings, p)  # it spans two epochs
            assert [x.device.type for x in (*drawn, *weights)] == [name] * 6
            made[name] = [x.cpu() for x in (*drawn, *weights)]
    assert same(made[device], made["cpu"])


@pytest.mark.parametrize("device", DEVICES)
def test_in_bf16_the_products_are_bf16_and_the_results_are_not(small_world, device):
    for precision, dtype in ("fp32", torch.float32), ("bf16", torch.bfloat16):
        seen = set()
        with pretend(device) as home:
            model = load_model(small_world, home, precision=precision)
            for layer in model.network.unet.middle[0].conv1, model.network.unet.time[0], model.network.pixel:
                layer.register_forward_hook(lambda layer, x, out: seen.add(out.dtype))
            x = torch.zeros(3, 1, 28, 28, device=home)
            t = torch.arange(3, device=home)
            noise = model(x, t, t)
            assert noise.device == home and noise.dtype == torch.float32
        assert seen == {dtype}


@pytest.mark.parametrize("device", DEVICES)
def test_models_and_classifiers_go_where_they_are_told_and_forget_nothing(small_world, device):
    with pretend(device) as home:
        for load in (lambda device: load_model(small_world, device).network), classifier.load_classifier:
            there, here = load(home).state_dict(), load(torch.device("cpu")).state_dict()
            assert {x.device.type for x in there.values()} == {device}
            assert same({name: x.cpu() for name, x in there.items()}, dict(here))


# ----------------------------------------------------------------------------------------------------------------------
# The control: on the pretended device wrong things are wrong

MISTAKES = {
    "an operation": lambda x, home: x + torch.ones(3),
    "an operation in place": lambda x, home: torch.ones(3).add_(x),
    "one of many tensors": lambda x, home: torch.cat([x, torch.ones(3)]),
    "a list of tensors in place": lambda x, home: torch._foreach_lerp_([torch.ones(3)], [x], 0.5),
    "an index from there": lambda x, home: torch.ones(3)[torch.zeros(2, dtype=torch.long, device=home)],
    "writing into the CPU's": lambda x, home: torch.where(torch.ones(3) > 0, x, x),
    "numpy": lambda x, home: x.numpy(),
    "the CPU's generator": lambda x, home: torch.randn(3, generator=torch.Generator(), device=home),
    "a generator from there": lambda x, home: torch.randn(3, generator=torch.Generator(home)),
    "another device's autocast": lambda x, home: torch.autocast("cpu", torch.bfloat16)(torch.sin)(x),
    "a network elsewhere": lambda x, home: torch.nn.Linear(3, 3)(x),
    "images elsewhere": lambda x, home: torch.nn.Linear(3, 3).to(home)(torch.ones(3)),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_mix_up_is_an_error(mistake, device):
    with pretend(device) as home:
        with pytest.raises((RuntimeError, TypeError)):
            mistake(torch.ones(3, device=home), home)


DOUBLES = {
    "moved": lambda home: torch.ones(3, dtype=torch.float64).to(home),
    "made": lambda home: torch.zeros(3, dtype=torch.float64, device=home),
    "made from numbers": lambda home: torch.tensor([1.0], dtype=torch.float64, device=home),
    "cast": lambda home: torch.ones(3, device=home).double(),
    "summed": lambda home: torch.ones(3, device=home).sum(dtype=torch.float64),
    "in a module": lambda home: torch.nn.Linear(3, 3).double().to(home),
}


@pytest.mark.parametrize("make", DOUBLES.values(), ids=DOUBLES)
def test_mps_has_no_float64(make):
    with pretend("mps") as home, pytest.raises(TypeError, match="float64"):
        make(home)
    with pretend("cuda") as home:
        make(home)


def test_what_is_allowed_is_allowed():
    with pretend("mps") as home:
        x = torch.arange(3.0, device=home)
        assert (x * torch.tensor(2.0) + 1).cpu().tolist() == [1, 3, 5]
        assert x[torch.tensor([2, 0])].tolist() == [2, 0]
        assert torch.zeros(3).copy_(x).device.type == "cpu" and torch.zeros(3, device=home).copy_(x.cpu()).sum() == 3
        assert torch.ones(3, dtype=torch.float64).to(home, torch.float32).dtype == torch.float32
        x.requires_grad_()
        (x * x).sum().backward()
        assert x.grad.device == home and x.grad.tolist() == [0, 2, 4]
