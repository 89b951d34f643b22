"""The command: what it measures, of which images, what it writes, what it refuses. (The figures: test_metrics.py.)"""
import contextlib
import io
import functools
import itertools
import json
import math
import os
import re
import sys
import types
import zipfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import evaluate
from ddpm import SAMPLERS
from diffusion_model import build_network
from helpers import ROOT, assert_one_line, call
from utils import classifier, metrics
from utils.checkpoint import load_checkpoint, load_model, save_checkpoint
from utils.data import DATASETS, class_of, load_dataset
from utils.settings import AUTOGUIDANCE, AUTOGUIDANCE_INTERVAL, GUIDANCE

SETTINGS = {"schedule": "cosine", "timesteps": 12, "network": "unet", "image_size": 28, "image_channels": 1,
            "classes": 10, "width": 8, "depth": 1, "dataset": "MNIST", "class_shares": [0.1] * 10}


@pytest.fixture(scope="module")
def mnist():
    """Real digits, with labels, in random order: 2,000 training digits, 60 others of them, and 300 test digits."""
    sets = {}
    for train, n in (True, 2060), (False, 300):
        images, labels = load_dataset("MNIST", train=train)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[:n]
        sets[train] = images[order], labels[order]
    return {"train": [x[:2000] for x in sets[True]], "others": [x[2000:] for x in sets[True]], "test": sets[False]}


@pytest.fixture
def small_world(mnist, monkeypatch, tmp_path):
    """evaluate.py among a few hundred digits, with classifiers that are trained briefly, in a folder of its own."""
    monkeypatch.setitem(DATASETS, "MNIST", lambda root, train: tuple(mnist["train" if train else "test"]))
    for module in classifier, metrics:
        monkeypatch.setattr(module, "fit", lambda *args, epochs, fit=module.fit, **how: fit(*args, epochs=1, **how))
    monkeypatch.setattr(evaluate, "two_sample_figures", functools.partial(metrics.two_sample_figures, repeats=1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def quick_classifier(monkeypatch):
    """One that knows nothing, and looks at images in a tenth of the time, where figures do not matter."""
    torch.manual_seed(0)
    net = classifier.DigitNet(4, 10).eval()
    monkeypatch.setattr(evaluate, "load_classifier", lambda device: net)


@pytest.fixture
def few_suffice(monkeypatch):
    """40 samples are not too few for any figure."""
    for figure in metrics.FEWEST:
        monkeypatch.setitem(metrics.FEWEST, figure, 40)


def untrained(path, **settings):
    """A checkpoint of a network that was never trained."""
    torch.manual_seed(0)
    settings = SETTINGS | settings
    save_checkpoint(path, {"settings": settings, "ema": build_network(settings).state_dict()})
    return path


@pytest.fixture
def tiny_checkpoint(tmp_path):
    return untrained(tmp_path / "tiny.pt")


def figures_of(*flags):
    """What python evaluate.py with these flags writes as JSON, and what it prints."""
    result = call(evaluate, *flags, "--json", "figures.json")
    assert result.code == 0 and result.err == "", result.err
    return json.loads(Path("figures.json").read_text()), result.out


def save_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# What is measured

KEYS = {"n", "seed", "classifier_sha256", "sampler", "steps", "guidance", "guide", "guidance_from", "guidance_to",
        "frechet", "frechet_stderr", "frechet_ratio", "kid", "kid_stderr", "precision", "recall", "density", "coverage",
        "class_entropy", "confident", "label_agreement", "nearest_neighbour_ratio", "copied", "two_sample_accuracy",
        "two_sample_accuracy_low", "box", "centred", "specks", "ink", "levels", "zeros", "bits_per_dim",
        "bits_per_dim_stderr",
        "frechet_real", "frechet_real_stderr", "box_real", "ink_noise", "kid_real", "precision_real", "recall_real",
        "density_real", "coverage_real",
        "class_entropy_real", "confident_real", "two_sample_accuracy_real", "zeros_real", "frechet_noise",
        "kid_noise", "zeros_noise"}


def test_npz_is_measured_whatever_its_order(small_world, few_suffice, mnist):
    images, labels = mnist["others"]
    results = []
    for order in torch.arange(60), torch.randperm(60, generator=torch.Generator().manual_seed(5)):
        save_npz("a.npz", images=images[order], labels=labels[order])
        results.append(figures_of("--npz", "a.npz", "--pairs", "out/pairs.png"))
    (figures, out), (other, _) = results
    assert figures == other and figures["n"] == 60
    assert KEYS <= figures.keys() and not [key for key in figures if "floor" in key or "ceiling" in key]
    assert {f"{key}{place}" for key, _, _ in evaluate.ROWS for place in ("", "_real", "_noise")} <= figures.keys()
    assert {key for key in figures if figures[key] is None and not key.endswith("_noise")} == {
        key for key in figures if key.startswith("bits_") and not key.endswith("_noise")} | {
        "frechet_ratio_real_stderr", "sampler", "steps", "guidance", "guide", "guidance_from", "guidance_to"}
    assert None not in [figures[f"{key}_noise"] for key in ("frechet", "kid", "recall", "confident", "faint")]
    assert figures["frechet_ratio"] == figures["frechet"] / figures["frechet_real"]
    assert 0.2 < figures["frechet_ratio"] < 5 < figures["frechet_ratio_noise"]
    assert figures["nearest_neighbour_ratio"] == pytest.approx(1, abs=0.1)
    # of standard normal noise, what rounds to 0 lies below -1 + 1/255
    assert figures["zeros_noise"] == pytest.approx((1 + math.erf((-1 + 1 / 255) / math.sqrt(2))) / 2, abs=0.005)
    assert f"{figures['zeros']:.4f}" in out and "n = 60: these are figures" in out  # table, and a warning
    assert (small_world / "out/pairs.png").read_bytes().startswith(b"\x89PNG")


def test_too_few_samples_leave_figures_out_and_say_so(small_world, quick_classifier, mnist):
    save_npz("one.npz", images=mnist["train"][0][:1])
    figures, out = figures_of("--npz", "one.npz")
    for key in "frechet", "frechet_real", "kid", "precision", "coverage", "two_sample_accuracy", "label_agreement":
        assert figures[key] is None
    assert figures["class_entropy"] == 0 and figures["nearest_neighbour_ratio"] == 0  # one digit, a copy
    assert "left out" in out


def test_what_is_compared_with_what(small_world, few_suffice, mnist, monkeypatch):
    """Samples, training digits and noise each with the test digits; neighbours are looked for among training digits."""
    images, labels = mnist["others"]
    sets = {"samples": images, "train": mnist["train"][0], "test": mnist["test"][0]}
    calls, arguments, results, figures_of_distributions = [], [], [], evaluate.distribution_figures

    def kind(x):
        first = getattr(x, "images", x)[0]
        return next((name for name, those in sets.items() if (those == first).flatten(1).all(dim=1).any()), "noise")

    def spied(name, function):
        def spy(a, b, *args, **kwargs):
            calls.append((name, kind(a), kind(b)))
            arguments.append((a, b))
            results.append(function(a, b, *args, **kwargs))
            return results[-1]
        return spy

    names = "distribution_figures", "pixel_figures", "nearest_neighbours", "two_sample_figures"
    for name in names:
        monkeypatch.setattr(evaluate, name, spied(name, getattr(evaluate, name)))
    tells, tell = [], evaluate.tell_figures
    monkeypatch.setattr(evaluate, "tell_figures", lambda images: tells.append(kind(images)) or tell(images))
    figures, _ = evaluate.evaluate(images, labels)
    distances, pixels, neighbours, two_sample = ([call[1:] for call in calls if call[0] == name] for name in names)
    assert distances == [("samples", "test"), ("noise", "test")] + 5 * [("train", "test")]
    assert pixels == [("samples", "test"), ("train", "test"), ("noise", "test")]
    assert tells == ["samples", "train", "noise"]
    assert neighbours == [("samples", "train"), ("test", "train")]
    assert two_sample == [("samples", "test"), ("train", "test")]
    assert results[0] == results[0] | figures_of_distributions(*arguments[0], 0)   # nothing is taken from another set
    for digits, _ in arguments[2:7]:
        assert torch.equal(digits.labels.bincount(), labels.bincount())
    of_real = [result["frechet"] for call, result in zip(calls, results) if call[:2] == (names[0], "train")]
    assert len(set(of_real)) == 5 and figures["frechet_real"] == pytest.approx(np.mean(of_real))
    assert figures["frechet_real_stderr"] == pytest.approx(np.std(of_real, ddof=1))
    assert figures["frechet_ratio_noise"] == pytest.approx(figures["frechet_noise"] / figures["frechet_real"])
    # what needs no distribution, of real digits: of test digits, as many as there are samples
    samples, test = arguments[0]
    spreads = [evaluate.frechet_spread(samples.features, test.features, of, 0) for of in (labels, None)]
    assert figures["frechet_stderr"] == spreads[0] != spreads[1]  # chance in the classes is no part of it
    expected = evaluate.class_figures(evaluate.Digits(*(of[:60] for of in test)))
    assert figures["confident_real"] == expected["confident"] > 0.9
    assert figures["label_agreement_real"] == expected["label_agreement"] > 0.98
    (of_samples, _), (of_test, _) = [result for call, result in zip(calls, results) if call[0] == names[2]]
    assert figures["nearest_neighbour_ratio_real"] == (of_test[:60].mean() / of_test[60:].mean()).item()
    assert figures["nearest_neighbour_ratio"] == (of_samples.mean() / of_test[60:].mean()).item()
    # but for the classes: those of training digits
    assert figures["class_entropy_real"] == evaluate.class_figures(arguments[2][0])["class_entropy"]


def test_samples_without_labels_are_compared_with_digits_drawn_freely(small_world, few_suffice, mnist, monkeypatch):
    """By chance, as such samples are, not with the classes in their shares."""
    asked, figures_of_distributions = [], evaluate.distribution_figures
    monkeypatch.setattr(evaluate, "two_sample_figures", lambda *args: {})
    monkeypatch.setattr(evaluate, "distribution_figures", lambda digits, *args: asked.append(digits)
                        or figures_of_distributions(digits, *args))
    figures, notes = evaluate.evaluate(mnist["others"][0])
    assert len(asked) == 7 and [digits.labels for digits in asked] == 7 * [None]
    assert len({tuple(digits.probabilities.argmax(dim=1).bincount().tolist()) for digits in asked[2:]}) == 5
    assert figures["frechet_real_stderr"] > 0 and figures["label_agreement"] is None
    counts = asked[0].probabilities.argmax(dim=1).bincount(minlength=10)
    said, = [note.split(": ")[1] for note in notes if note.startswith("share of 0 to 9 in samples: ")]
    assert [float(share) for share in said.split()] == pytest.approx((counts / 60).tolist(), abs=6e-4)


def test_the_picture_shows_each_sample_beside_its_neighbour(small_world, quick_classifier, mnist):
    train = mnist["train"][0]
    images = torch.cat([mnist["others"][0][:30], train[700:702]])                  # two copies among 30 others
    evaluate.evaluate(images, pairs="pairs.png")
    picture = iio.imread("pairs.png")[::2, ::2]
    first, beside, second, its = (picture[2:30, 2 + 30 * k:30 + 30 * k] for k in range(4))
    assert (first == beside).all() and (second == its).all()
    assert {first.tobytes(), second.tobytes()} == {image.numpy().tobytes() for image in train[700:702]}


def test_the_table_has_a_column_for_each(capsys):
    figures = evaluate.merge({"frechet": 1.5, "frechet_stderr": 0.25, "copied": 0.0, "two_sample_accuracy": 0.5,
                              "two_sample_accuracy_low": 0.4, "two_sample_accuracy_high": 0.6, "kid": 0.00123,
                              "density": -0.5, "coverage": 0.01},
                             {"frechet": 0.5, "frechet_stderr": 0.125}, {"frechet": 40.0})
    evaluate.print_table(figures)
    header, *lines = capsys.readouterr().out.splitlines()
    ends = [header.index(name) + len(name) for name in ("samples", "real digits", "noise")]
    starts = [max(len(name) for _, name, _ in evaluate.ROWS), *ends]
    cells = {key: [line[start:end].strip() for start, end in zip(starts, ends)]
             for (key, _, _), line in zip(evaluate.ROWS, lines, strict=True)}
    assert cells["frechet"] == ["1.5000 ± 0.25", "0.5000 ± 0.12", "40"]
    assert cells["copied"] == ["0.0000", "-", "-"] and cells["kid"] == ["0.00123", "-", "-"]
    assert cells["density"][0] == "-0.5000" and cells["coverage"][0] == "0.0100"
    assert cells["two_sample_accuracy"] == ["0.5000 (0.400-0.600)", "-", "-"]


def test_flags_reach_what_they_are_for(small_world, tiny_checkpoint, mnist, monkeypatch):
    seen = {}

    def spy(name, result):
        monkeypatch.setattr(evaluate, name, lambda *args, **kwargs: seen.update({name: (args, kwargs)}) or result)

    spy("draw", [x[:9] for x in mnist["train"]])
    spy("evaluate", (evaluate.merge({}, {}, {}) | {"n": 9}, []))
    spy("bits_figures", {})
    spy("load_model", load_model(tiny_checkpoint))
    flags = {"sampler": "ddim", "steps": 4, "guidance": 3, "guide": "label", "seed": 5, "batch_size": 6}
    assert call(evaluate, "--checkpoint", tiny_checkpoint, "--n", 9, "--no-clip", "--no-ema", "--precision", "bf16",
                "--exact", "--device", "cpu", "--guidance-interval", 2, 7.5, "--pairs", "p.png",
                *[f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]).code == 0
    assert seen["load_model"][0] == (str(tiny_checkpoint), torch.device("cpu"), False, "bf16")
    (_, n), settings = seen["draw"]
    assert n == 9 and settings == flags | {"clip": False, "guidance_interval": (2, 7.5), "together": True}
    assert seen["evaluate"][1] == {"seed": 5, "device": torch.device("cpu"), "pairs": "p.png"}
    (_, images, seed, exact), _ = seen["bits_figures"]
    assert (seed, exact) == (5, True)
    assert {x.numpy().tobytes() for x in images} == {x.numpy().tobytes() for x in mnist["test"][0]}
    assert not torch.equal(images, mnist["test"][0])  # in random order, since an estimate takes the first of them


def test_a_file_or_a_folder_is_measured_all_of_it_or_n_of_it(small_world, mnist, monkeypatch):
    measured, (images, labels) = [], mnist["others"]
    monkeypatch.setattr(evaluate, "evaluate", lambda images, labels, **how: measured.append((images, labels))
                        or (evaluate.merge({}, {}, {}) | {"n": len(images)}, []))
    save_npz("a.npz", images=images, labels=labels)
    Path("folder").mkdir()
    for i, image in enumerate(images):
        iio.imwrite(f"folder/{i:02}.png", image[0].numpy())
    for place, labelled in ("a.npz", True), ("folder", False):
        for flags, n in ([], 60), (["--n", 7], 7):
            assert call(evaluate, "--npz", place, *flags).code == 0
            made, theirs = measured.pop()
            assert len(made) == n and (theirs is not None) == labelled
            assert {x.numpy().tobytes() for x in made} <= {x.numpy().tobytes() for x in images}


def test_how_much_is_drawn_by_default(small_world, tiny_checkpoint, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "draw", lambda model, n, **how: sys.exit(asked.append(n) or 0))
    monkeypatch.setattr(evaluate, "sweep", lambda model, n, *rest: asked.append(n))
    monkeypatch.setattr(evaluate, "load_classifier", lambda device: None)
    for flags in [], ["--sweep", "x.png"]:
        assert call(evaluate, "--checkpoint", tiny_checkpoint, "--device", "cpu", *flags).code == 0
    assert asked == [10_000, 1000]


def test_test_digits_come_in_the_random_order_of_the_seed(small_world, quick_classifier, few_suffice, mnist,
                                                          monkeypatch):
    """The first of them, with which fewer samples are compared, are easier to read."""
    seen, measure = [], evaluate.distribution_figures
    monkeypatch.setattr(evaluate, "two_sample_figures", lambda *args: {})
    monkeypatch.setattr(evaluate, "distribution_figures", lambda digits, test, *args: seen.append(test)
                        or measure(digits, test, *args))
    for seed in 0, 1:
        evaluate.evaluate(mnist["others"][0], seed=seed)
    (images, labels), one, other = mnist["test"], seen[0], seen[-1]
    assert not torch.equal(one.images, images) and not torch.equal(one.images, other.images)
    known = dict(zip((image.numpy().tobytes() for image in images), labels.tolist()))
    assert [known.pop(image.numpy().tobytes()) for image in one.images] == one.labels.tolist() and not known


# ----------------------------------------------------------------------------------------------------------------------
# A model's samples

def test_checkpoint_is_measured(small_world, quick_classifier, tiny_checkpoint):
    figures, _ = figures_of("--checkpoint", tiny_checkpoint, "--n", 101, "--steps", 3, "--guidance", 2, "--seed", 4,
                            "--device", "cpu", "--batch-size", 30, "--guidance-interval", 0.05, 7.5)
    assert None not in (figures["bits_per_dim"], figures["label_agreement"])
    assert (figures["n"], figures["sampler"], figures["steps"], figures["guidance"], figures["seed"]) \
        == (101, "dpm++sde", 3, 2, 4)
    assert (figures["guide"], figures["guidance_from"], figures["guidance_to"]) == ("label", 0.05, 7.5)
    assert figures["bits_per_dim"] > 3 and figures["precision"] < 0.1             # it was never trained
    assert figures["bits_per_dim_noise"] == 8 and figures["bits_per_dim_real"] is None


def test_a_model_that_always_had_labels_is_not_measured_without(small_world, quick_classifier):
    """--label-dropout 0: its bits and its guidance mean nothing."""
    flags = "--checkpoint", untrained("only.pt", label_dropout=0.0), "--steps", 1
    figures, _ = figures_of(*flags, "--n", 3)
    assert figures["bits_per_dim"] is None and figures["guidance"] == 1 and figures["label_agreement"] is not None
    assert figures["guide"] is figures["guidance_from"] is figures["guidance_to"] is None  # as it guides nowhere


def test_a_model_that_knows_its_early_self_is_guided_by_it(small_world, quick_classifier, tiny_checkpoint,
                                                           monkeypatch):
    monkeypatch.setattr(evaluate, "bits_figures", lambda *args: {})
    state = load_checkpoint(tiny_checkpoint)
    save_checkpoint("early.pt", state | {"early": state["ema"]})
    for flags, expected in ([], (AUTOGUIDANCE, "early", *AUTOGUIDANCE_INTERVAL)), (
            ["--guide", "label"], (GUIDANCE, "label", 1.3, 35)):
        figures, _ = figures_of("--checkpoint", "early.pt", "--n", 3, "--steps", 8, *flags)
        assert tuple(figures[name] for name in ("guidance", "guide", "guidance_from", "guidance_to")) == expected


@pytest.mark.parametrize("change, name", [({"dataset": "KMNIST"}, "KMNIST"), ({"image_size": 32}, "MNIST"),
                                          ({"dataset": "a\nb"}, "other images")], ids=str)
def test_models_of_other_images_are_refused(change, name, small_world):
    result = call(evaluate, "--checkpoint", untrained("other.pt", **change), "--n", 9, "--steps", 1)
    assert_one_line(result, 1, f"was trained on {name}", "only models of MNIST digits")


# ----------------------------------------------------------------------------------------------------------------------
# The sweep

def test_sweep_prints_a_table_and_saves_a_plot(small_world, few_suffice, tiny_checkpoint, mnist, monkeypatch, capsys):
    model, ticks, told, sets, references = load_model(tiny_checkpoint), itertools.count(), [], [], []
    draw, real_draws, figures_of_distributions = evaluate.draw, evaluate.real_draws, evaluate.distribution_figures
    monkeypatch.setattr(evaluate, "distribution_figures",
                        lambda *args: references.append(args[1].features) or figures_of_distributions(*args))
    monkeypatch.setattr(evaluate, "draw", lambda *args, **how: told.append(how) or draw(*args, **how))
    monkeypatch.setattr(evaluate, "real_draws", lambda *args: sets.extend(real_draws(*args)) or sets)
    monkeypatch.setattr(evaluate, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    flags = types.SimpleNamespace(device="cpu", seed=3, guidance=1.0, sampler="ddim", steps=2, batch_size=20,
                                  clip=False, guidance_interval=(0, 20), guide=None, json=None)
    rows = evaluate.sweep(model, 40, "sweep.png", flags, guidance=(0, 2),
                          steps={"ddpm": (), "ddim": (1, 3), "dpm++": (1, 12, 1000), "dpm++sde": ()})
    # 1,000 steps are more than the model has, 12 are all; guidance 2 takes two predictions in the second step, whose
    # noise level is below 20, and one in the first, whose is above
    assert [(row["sampler"], row["calls"]) for row in rows] == [
        ("ddim", 1), ("ddim", 3), ("dpm++", 1), ("dpm++", 12), ("ddim", 2), ("ddim", 3)]
    assert [(how["seed"], how["clip"], how["batch_size"]) for how in told] == 6 * [(3, False, 20)]
    # Each set of real digits has the classes of the samples. Drawn freely they would lie farther from the test digits.
    wanted = torch.tensor([class_of(i, [0.1] * 10) for i in range(40)]).bincount(minlength=10)
    assert sets and all(torch.equal(mnist["train"][1][one].bincount(minlength=10), wanted) for one in sets)
    assert all(row["seconds"] == pytest.approx(1000 / 40) for row in rows)         # by that clock each took a second
    # Test digits in random order, as precision and recall look at the first so many, and the first are easier.
    in_order = evaluate.classify(evaluate.load_classifier("cpu"), mnist["test"][0])[0]
    assert all(sorted(one.sum(1).tolist()) == pytest.approx(sorted(in_order.sum(1).tolist())) for one in references)
    assert not any(torch.allclose(one[:5], in_order[:5]) for one in references)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    of_real = float(lines[2].split("|")[5])
    assert rows[0]["ratio"] == pytest.approx(rows[0]["frechet"] / of_real, rel=1e-3)
    assert len(lines) == 3 + 6 and len({line.count("|") for line in lines}) == 1   # header, rule, real digits, runs
    for line, row in zip(lines[3:], rows):
        assert [float(cell) for cell in line.split("|")[4:-1] if cell.strip()] == pytest.approx(
            [row[name] for name in ("calls", "frechet", "ratio", "precision", "recall", "label_agreement", "seconds")
             if row[name] is not None], rel=1e-3)
        assert (row["label_agreement"] is None) == (row["guidance"] == 0)  # then nobody asked for a label
    assert (small_world / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_is_written_whatever_becomes_of_its_plot(small_world, quick_classifier, few_suffice, tiny_checkpoint,
                                                         monkeypatch):
    """All samplers over their steps, then the one asked for over guidance: guided in all steps, by two calls."""
    def fail(*args, **kwargs):
        raise RuntimeError("no fonts")

    for sampler, steps in {"ddpm": (), "ddim": (1,), "dpm++": (8,), "dpm++sde": ()}.items():
        monkeypatch.setitem(evaluate.SWEEP_STEPS, sampler, steps)
    monkeypatch.setattr(Figure, "savefig", fail)
    result = call(evaluate, "--sweep", "sweep.png", "--n", 40, "--checkpoint", tiny_checkpoint, "--steps", 2,
                  "--device", "cpu", "--json", "s.json")
    assert result.code == 0 and result.err.count("\n") == 1 and "sweep.png" in result.err and "no fonts" in result.err
    rows = json.loads(Path("s.json").read_text())
    assert [(row["sampler"], row["steps"], row["guidance"], row["calls"]) for row in rows] == [
        ("ddim", 1, GUIDANCE, 2), ("dpm++", 8, GUIDANCE, 16),
        *[("dpm++sde", 2, w, 2 if w in (0, 1) else 4) for w in evaluate.SWEEP_GUIDANCE]]
    assert result.out.splitlines()[-2:] == ["sweep.png", "s.json"]
    assert not (small_world / "samples").exists()  # for pairs, which a sweep does not look for


def test_a_sweep_counts_the_calls_of_the_early_network(small_world, quick_classifier, few_suffice, tiny_checkpoint,
                                                       monkeypatch):
    for sampler in SAMPLERS:
        monkeypatch.setitem(evaluate.SWEEP_STEPS, sampler, ())
    state = load_checkpoint(tiny_checkpoint)
    save_checkpoint("early.pt", state | {"early": state["ema"], "settings": state["settings"] | {"label_dropout": 0.0}})
    rows, _ = figures_of("--sweep", "sweep.png", "--n", 40, "--checkpoint", "early.pt", "--steps", 2)
    assert [row["calls"] for row in rows] == [2 if w == 1 else 4 for w in evaluate.SWEEP_GUIDANCE if w]


def test_a_sweep_visits_a_sampler_that_was_added(small_world, quick_classifier, few_suffice, monkeypatch):
    """At OTHER_STEPS. (Guidance is left out, which a model that always had labels does not have.)"""
    path, ddim = untrained("only.pt", label_dropout=0.0, timesteps=10), SAMPLERS["ddim"]
    for name in reversed(list(SAMPLERS)):  # they come back in their order
        monkeypatch.delitem(SAMPLERS, name)
    monkeypatch.setitem(SAMPLERS, "new", ddim._replace(steps=7))
    rows, out = figures_of("--sweep", "sweep.png", "--n", 40, "--checkpoint", path, "--sampler", "new")
    steps = [steps for steps in evaluate.OTHER_STEPS if steps <= 10]
    assert [(row["sampler"], row["steps"], row["guidance"], row["calls"]) for row in rows] == [
        ("new", n, 1, n) for n in steps] and len(steps) > 1
    assert out.count("| new | ") == len(steps)


def test_a_sweep_of_more_steps_than_there_are_is_refused_at_once(small_world, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(evaluate, "draw", lambda *args, **kwargs: pytest.fail("it was measured"))
    result = call(evaluate, "--sweep", "sweep.png", "--checkpoint", tiny_checkpoint, "--steps", 1001)
    assert_one_line(result, 2, "--steps 1001")


def test_a_sweep_with_guidance_that_the_model_has_not_learned_is_refused_at_once(small_world, monkeypatch):
    monkeypatch.setattr(evaluate, "classify", lambda *args, **kwargs: pytest.fail("it was measured"))
    path = untrained(Path("plain.pt"), label_dropout=1.0)
    result = call(evaluate, "--sweep", "sweep.png", "--checkpoint", path, "--n", 256, "--guidance", 2)
    assert_one_line(result, 2, "--guidance 2")


def test_a_sweep_with_an_interval_that_holds_no_step_of_one_sampler_is_refused_at_once(small_world, tiny_checkpoint,
                                                                                       monkeypatch):
    monkeypatch.setattr(evaluate, "draw", lambda *args, **kwargs: pytest.fail("it was measured"))
    result = call(evaluate, "--sweep", "sweep.png", "--checkpoint", tiny_checkpoint, "--n", 256, "--guidance-interval",
                  0.9, 0.91)
    assert_one_line(result, 2, "--guidance-interval 0.9 0.91")


def test_a_sweep_over_too_few_samples_is_refused(small_world):
    assert_one_line(call(evaluate, "--sweep", "sweep.png", "--n", 255), 2, "256")
    assert not (small_world / "sweep.png").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Another classifier

def test_train_classifier_writes_one_that_loads_and_says_where_its_checksum_goes(small_world, monkeypatch):
    monkeypatch.setattr(classifier, "CLASSIFIER_WIDTH", 4)
    before = classifier.CLASSIFIER.read_bytes()
    result = call(evaluate, "--train-classifier", "new.pt")
    assert result.code == 0, result.err
    net = classifier.load_classifier(path="new.pt", checksum=result.out.split("SHA-256 ")[1].split()[0])
    assert not net.training and classifier.CLASSIFIER.read_bytes() == before
    assert classifier.CLASSIFIER_SHA256 in (ROOT / re.search(r"[\w/]+\.py", result.out)[0]).read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Failures

class Gone(io.StringIO):
    """The stdout of a command whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError


def test_the_file_is_not_lost_with_the_table(small_world, quick_classifier, mnist, monkeypatch):
    save_npz("a.npz", images=mnist["train"][0][:3])
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--npz", "a.npz", "--json", "a.json"])
    with contextlib.redirect_stdout(Gone()), pytest.raises(BrokenPipeError):
        evaluate.main()
    assert json.loads(Path("a.json").read_text())["n"] == 3


def test_the_table_is_not_lost_with_the_file(small_world, quick_classifier, mnist, monkeypatch):
    def full(source, target, replace=os.replace):
        if str(target).endswith(".json"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    save_npz("a.npz", images=mnist["train"][0][:3])
    monkeypatch.setattr(os, "replace", full)
    result = call(evaluate, "--npz", "a.npz", "--json", "a.json")
    assert_one_line(result, 1, "a.json", "No space left on device")
    assert "class entropy" in result.out and not Path("a.json").exists()


def test_figures_are_not_lost_with_the_bits(small_world, quick_classifier, tiny_checkpoint, monkeypatch):
    """Which, by --exact, take hours."""
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "bits_figures", interrupted)
    result = call(evaluate, "--checkpoint", tiny_checkpoint, "--n", 3, "--steps", 1, "--device", "cpu")
    assert_one_line(result, 130, "interrupted")
    assert "class entropy" in result.out and "bits per dimension" in result.out


def test_a_wrong_classifier_is_found_before_the_sampling(small_world, tiny_checkpoint, monkeypatch):
    def wrong(device):
        raise ValueError("another ruler")

    monkeypatch.setattr(evaluate, "load_classifier", wrong)
    monkeypatch.setattr(evaluate, "draw", lambda *args, **settings: pytest.fail("samples are drawn"))
    for flags in [], ["--sweep", "x.png"]:
        assert_one_line(call(evaluate, "--checkpoint", tiny_checkpoint, "--n", 40, *flags), 1, "another ruler")


def test_figures_are_not_lost_with_the_picture(small_world, quick_classifier, mnist, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    save_npz("a.npz", images=mnist["train"][0][:3])
    monkeypatch.setattr(iio, "imwrite", fail)
    result = call(evaluate, "--npz", "a.npz", "--json", "a.json", "--pairs", "p.png")
    assert result.code == 0 and result.err.count("\n") == 1 and "warning: " in result.err and "p.png" in result.err
    assert "class entropy" in result.out and Path("a.json").exists() and not Path("p.png").exists()


@pytest.mark.parametrize("flag", ["--json", "--pairs"])
def test_a_file_that_cannot_be_written_is_found_out_before_the_work(flag, small_world, mnist, monkeypatch):
    save_npz("a.npz", images=mnist["train"][0][:3])
    monkeypatch.setattr(evaluate, "evaluate", lambda *args, **kwargs: pytest.fail("it was measured"))
    assert_one_line(call(evaluate, "--npz", "a.npz", flag, small_world), 1, small_world)


def test_the_picture_is_not_put_among_the_images_that_are_measured(small_world, mnist, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *args, **kwargs: pytest.fail("it was measured"))
    Path("samples").mkdir()
    iio.imwrite("samples/0.png", mnist["train"][0][0, 0].numpy())
    assert_one_line(call(evaluate, "--npz", "samples"), 2, "--pairs samples/nearest.png", "--npz")


def test_an_unsound_file_is_refused_in_one_line(small_world):
    """Which ones are: test_data.py."""
    save_npz("floats.npz", images=np.zeros((3, 28, 28), np.float32))
    with zipfile.ZipFile("damaged.npz", "w") as archive:
        archive.writestr("images.npy", "no array")
    for name in "floats.npz", "damaged.npz", "missing.npz", ".":
        assert_one_line(call(evaluate, "--npz", name), 1, name)


@pytest.mark.parametrize("arguments", [["--n", "0"], ["--n", "60001"], ["--npz", "a.npz", "--exact"],
                                       ["--npz", "a.npz", "--checkpoint", "b.pt"], ["--nonsense"],
                                       ["--npz", "a.npz", "--steps", "3"], ["--npz", "a.npz", "--no-clip"],
                                       ["--npz", "a.npz", "--guidance-interval", "0", "9"],
                                       ["--npz", "a.npz", "--sweep"], ["--sweep", "a.png", "--exact"],
                                       ["--sweep", "a.png", "--pairs", "b.png"],
                                       ["--train-classifier", "a.pt", "--json", "a.json"],
                                       ["--train-classifier", "a.pt", "--n", "5"],
                                       ["--train-classifier", "a.pt", "--guidance", "2"]], ids=" ".join)
def test_bad_usage_is_told_apart(arguments, monkeypatch):
    monkeypatch.setattr(evaluate, "pick_device", lambda name: pytest.fail("it began its work"))
    assert_one_line(call(evaluate, *arguments), 2)
