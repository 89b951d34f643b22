"""Settings: what a run, a model and its sampling may be told, and what they do by default."""
import math
import sys
from pathlib import Path

import pytest
import torch

import train
from ddpm import DDPM
from diffusion_model import NETWORKS, Model, build_network
from diffusion_schedules import make_betas
from helpers import NETWORK, ROOT
from sample import generate
from utils.checkpoint import load_model
from utils.cli import UsageError
from utils.data import class_of, load_dataset
from utils.settings import (ADAMW, AUTOGUIDANCE, AUTOGUIDANCE_INTERVAL, EARLY_IMAGES, EVERYWHERE, GUIDANCE,
                            OF_A_MODEL, OF_THE_DATA, SETTINGS, SHORT_RUN, SHORT_RUN_MINUTES, check_settings,
                            common_levels, default_guidance, guide_of, noise_level, resumed_settings,
                            sampling_defaults, settings_of_a_run, settings_of_the_data)

ALL = [*SETTINGS, *OF_THE_DATA]
CPU = torch.device("cpu")
# For each setting: two values that it can have, and some that are of its type but out of its range.
VALUES = {
    "dataset": (["KMNIST", "EMNIST"], ["mnist", "MNIST ", ""]),
    "images": (["pictures", "/a/b c"], ["", "x" * 4097]),
    "grey": ([True, False], []),
    "skip_broken": ([True, False], []),
    "images_used": ([4, 10**9], [3, 0, -100]),
    "epochs": ([1, 1_000_000], [0, -1, 1_000_001]),
    "minutes": ([0.01, 5], [0, 0.009, -1.0, 1e7]),
    "batch_size": ([1, 100_000], [0, -64, 100_001]),
    "optimizer": (["muon", "adamw"], ["sgd", "Muon"]),
    "lr": ([1e-9, 10], [0, 0.0, -0.005, 10.1]),
    "warmup": ([0, 1_000_000], [-1, 1_000_001]),
    "weight_decay": ([0, 10.0], [-0.01, 11]),
    "clip_norm": ([1e-6, 1e6], [0, 1e-7, 1e7, -1]),
    "ema": ([0, 0.999999], [1, 1.0, -0.1]),
    "label_dropout": ([0, 1.0], [-0.1, 1.1, 2]),
    "weighting": (["simple", "balanced", "v"], ["V", "snr"]),
    "schedule": (["linear", "cosine", "logsnr"], ["quadratic", "linear\n"]),
    "timesteps": ([20, 100_000], [0, -1, 100_001]),
    "network": (["unet", "bayes"], ["resnet", "UNet"]),
    "width": ([3, 1024], [2, 0, -128, 1025]),
    "depth": ([1, 64], [0, -1, 65]),
    "precision": (["fp32", "bf16"], ["fp16", "float32"]),
    "seed": ([1, 2**32 - 1], [-1, 2**32]),
    "report_every": ([1, 10_000_000], [0, 10_000_001]),
    "image_size": ([4, 512], [3, 0, -28, 513]),
    "image_channels": ([1, 3], [0, 2, 4]),
    "classes": ([0, 10_000], [-1, 10_001]),
}


def complete(**changed):
    """Sound settings of a run on MNIST, but for what is changed."""
    settings = settings_of_a_run({}, CPU) | NETWORK | changed
    if type(settings.get("classes")) is int and 0 <= settings["classes"] <= 10_000:
        settings["class_shares"] = [1 / max(1, settings["classes"])] * settings["classes"]
    return settings


# ----------------------------------------------------------------------------------------------------------------------
# What they may be

def test_every_setting_is_tested():
    assert VALUES.keys() == set(ALL) and set(OF_A_MODEL) < set(ALL) and not SETTINGS.keys() & OF_THE_DATA.keys()


@pytest.mark.parametrize("name", ALL)
def test_what_a_setting_can_be(name):
    """Its default, where it has one, and the ends of its range."""
    default = (SETTINGS | OF_THE_DATA)[name].default
    for value in [*VALUES[name][0], *([default] if name in SETTINGS else [])]:
        settings = complete(**{name: value})
        before = dict(settings)
        check_settings("c.pt", settings, ALL)
        if name in OF_A_MODEL:
            check_settings("c.pt", settings)
        assert settings == before and settings[name] is value


class Float(float):
    """Almost a number."""


class Word(str):
    """Almost a word."""


@pytest.mark.parametrize("name", ALL)
def test_what_a_setting_cannot_be(name):
    """Values out of its range, of another type, and none at all. The error is one line that names file and setting."""
    sound, outside = VALUES[name]
    numeric = not isinstance(sound[0], str)
    whole = numeric and all(type(value) is int for value in sound)
    wrong = [*outside, str(sound[0]) if numeric else 1, [sound[0]], (sound[0],), {sound[0]: 1}, {sound[0]}, b"1", True,
             False, 1j, math.nan, math.inf, -math.inf, 10**300, -10**300, object, torch.tensor(1), torch.ones(2),
             "x" * 10_000, "two\nlines", (Float if numeric else Word)(sound[0]),
             *([float(sound[0])] if whole else []),
             *([None] if name not in ("minutes", "images", "images_used") else [])]
    for value in wrong:
        if type(value) is type(sound[0]) is bool or (name, value) == ("images", "two\nlines"):
            continue
        for names in [ALL, *([OF_A_MODEL] if name in OF_A_MODEL else [])]:
            with pytest.raises(ValueError, match=rf"^c\.pt: .*\b{name}\b") as error:
                check_settings("c.pt", complete(**{name: value}), names)
            assert "\n" not in str(error.value) and len(str(error.value)) < 1000, repr(value)[:100]
    without = complete()
    del without[name]
    with pytest.raises(ValueError, match=rf"^c\.pt: .*\b{name}\b"):
        check_settings("c.pt", without, ALL)


def test_a_run_on_a_folder_of_images_has_its_name():
    """And no other run has."""
    for dataset, images, good in [("cats/", "pictures/Cats", True), ("cats/", None, False), ("", "cats", False),
                                  (7, "cats", False), ("x" * 10_000, "cats", False), (["cats/"], "cats", False)]:
        settings = complete(dataset=dataset, images=images)
        if good:
            check_settings("c.pt", settings, ALL)
        else:
            with pytest.raises(ValueError, match=r"^c\.pt: the setting dataset") as error:
                check_settings("c.pt", settings, ALL)
            assert len(str(error.value)) < 1000


def test_what_class_shares_cannot_be():
    """(A class may be absent, or the only one.)"""
    nine = [0.1] * 9
    check_settings("c.pt", complete() | {"class_shares": [0.0] * 9 + [1.0]})
    for shares in (None, "x", (0.1,) * 10, nine, nine + [0.1] * 2, [], [1] * 10, nine + [math.nan], nine + ["0"],
                   nine + [-0.1], nine + [1.1], nine + [None], nine + [Float(0.1)], torch.full((10,), 0.1)):
        with pytest.raises(ValueError, match=r"^c\.pt: class_shares are not 10 numbers"):
            check_settings("c.pt", complete() | {"class_shares": shares})
    for settings in None, [], "linear", 5, ALL:
        with pytest.raises(ValueError, match=r"^c\.pt has no settings"):
            check_settings("c.pt", settings)


def test_what_levels_cannot_be():
    check_settings("c.pt", complete() | {"levels": [0, 1, 2, 3, 4, 5, 6, 255]})
    for levels in (None, "x", 7, (0, 255), [0.0], [-1], [256], [True], ["0"], [None], [*range(9)], torch.zeros(3)):
        with pytest.raises(ValueError, match=r"^c\.pt: levels are not whole numbers"):
            check_settings("c.pt", complete() | {"levels": levels})


def test_a_model_needs_no_other_settings_than_its_own():
    """The others are checked where they are there and sampling reads them."""
    settings = {name: value for name, value in complete().items() if name in (*OF_A_MODEL, "class_shares")}
    check_settings("c.pt", settings)
    check_settings("c.pt", settings | {"lr": "unread", "dataset": 7})
    for name, value in ("label_dropout", 2), ("label_dropout", torch.ones(2)), ("batch_size", "64"), ("batch_size", 0):
        with pytest.raises(ValueError, match=rf"^c\.pt: .*\b{name}\b"):
            check_settings("c.pt", settings | {name: value})


def test_what_is_sound_can_be_built():
    """The settings agree with the networks, at the ends of their ranges, about what there can be."""
    for name, least in ("width", 3), ("depth", 1), ("image_size", 4), ("image_channels", 1), ("classes", 0):
        for network in NETWORKS:
            settings = complete(**{name: least, "network": network})
            with torch.device("meta"):
                assert build_network(settings).state_dict(), (name, network)


@pytest.mark.parametrize("size, channels, classes", [(28, 1, 10), (32, 3, 1), (4, 1, 300)])
def test_the_data_decide(size, channels, classes):
    labels = torch.arange(600) % classes
    settings = settings_of_the_data("mine", torch.zeros(600, channels, size, size, dtype=torch.uint8), labels,
                                    classes)
    assert settings == {"image_size": size, "image_channels": channels, "classes": classes,
                        "class_shares": pytest.approx([1 / classes] * classes), "levels": [0]}


def test_the_common_levels_are_those_of_one_pixel_in_200():
    images = torch.full((200, 1, 4, 4), 7, dtype=torch.uint8)
    images[0], images[1, :, 0], images[2] = 255, 0, 3  # a 200th of the pixels, a fourth of that, a 200th
    assert common_levels(images) == [3, 7, 255]
    photograph = torch.arange(100, dtype=torch.uint8).repeat(144).view(1, 1, 120, 120)  # each has a hundredth
    photograph[0, 0, 0, 50:100] = 99
    assert common_levels(photograph) == [0, 1, 2, 3, 4, 5, 6, 99]
    assert common_levels(load_dataset("MNIST", train=True)[0]) == [0, 252, 253, 254, 255]


@pytest.mark.parametrize("shape, word", [((9, 1, 513, 513), "image_size"), ((9, 2, 28, 28), "image_channels")])
def test_data_that_no_model_is_for(shape, word):
    with pytest.raises(ValueError, match=f"^mine: .*{word}"):
        settings_of_the_data("mine", torch.zeros(shape, dtype=torch.uint8), torch.zeros(9, dtype=torch.long), 1)


# ----------------------------------------------------------------------------------------------------------------------
# Of a run

def test_presets_give_way_to_what_is_given():
    defaults = settings_of_a_run({}, CPU)
    assert {**defaults, "precision": "auto"} == {name: setting.default for name, setting in SETTINGS.items()}
    assert settings_of_a_run({"optimizer": "adamw"}, CPU) == defaults | {"optimizer": "adamw"} | ADAMW
    assert settings_of_a_run({"optimizer": "adamw", "lr": 1}, CPU)["lr"] == 1
    for minutes, device, preset in [(SHORT_RUN_MINUTES, "cpu", True), (SHORT_RUN_MINUTES + 0.1, "cpu", False),
                                    (1, "cuda", False), (1, "mps", False)]:
        settings = settings_of_a_run({"minutes": minutes, "precision": "fp32"}, torch.device(device))
        assert settings == defaults | {"minutes": minutes, "precision": "fp32"} | (SHORT_RUN if preset else {})
    assert settings_of_a_run({"minutes": 1, "width": 9}, CPU) == defaults | SHORT_RUN | {"minutes": 1, "width": 9}
    assert settings_of_a_run({"minutes": 1, "optimizer": "adamw"}, CPU)["lr"] == ADAMW["lr"]  # not Muon's


def test_a_schedule_that_cannot_be_is_bad_usage():
    with pytest.raises(UsageError, match="--timesteps 10: .*linear"):
        settings_of_a_run({"timesteps": 10, "schedule": "linear"}, CPU)
    assert settings_of_a_run({"timesteps": 10}, CPU)["timesteps"] == 10


@pytest.mark.parametrize("name", SETTINGS)
def test_what_a_resumed_run_may_change(name, tmp_path):
    saved, other = complete(), next(value for value in [*VALUES[name][0], "other"] if value != complete()[name])
    flag = "--" + name.replace("_", "-")
    if name == "images":  # a folder that is there, and another one
        saved[name], other = str(tmp_path), str(Path(__file__).parent)
    assert resumed_settings("c.pt", saved, {name: saved[name]} | {"precision": "auto"}) == {
        setting: saved[setting] for setting in SETTINGS}
    if SETTINGS[name].may_change:
        assert resumed_settings("c.pt", saved, {name: other})[name] == other
    else:
        theirs = "default" if saved[name] is None else saved[name]
        with pytest.raises(ValueError, match=f"{flag} {other} differs from the {theirs} of the run in c.pt"):
            resumed_settings("c.pt", saved, {name: other})


def test_epochs_take_the_place_of_minutes():
    saved = complete(minutes=5.0)
    assert resumed_settings("c.pt", saved, {})["minutes"] == 5.0
    assert resumed_settings("c.pt", saved, {"minutes": 9})["minutes"] == 9
    changed = resumed_settings("c.pt", saved, {"epochs": 3})
    assert changed["epochs"] == 3 and changed["minutes"] is None and saved["minutes"] == 5.0


# ----------------------------------------------------------------------------------------------------------------------
# Of sampling

class Silent(torch.nn.Module):
    """A network that sees no v in anything, and notes how it is called."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, x_t, t, labels=None):
        self.calls.append((x_t, t, labels))
        return torch.zeros_like(x_t)


def model_of(T=20, steps=None, **settings):
    settings = {"image_channels": 1, "image_size": 4, "classes": 3, "class_shares": [0.0, 0.5, 0.5]} | settings
    return Model(Silent(), DDPM(make_betas("linear", T)), settings, steps=steps)


@pytest.mark.parametrize("sampler, T, classes, expected", [
    ("ddpm", 1000, 10, (1000, GUIDANCE)), ("ddim", 1000, 10, (20, GUIDANCE)), ("dpm++", 1000, 0, (10, 1)),
    ("dpm++sde", 1000, 10, (24, GUIDANCE)), ("dpm++sde", 20, 10, (20, GUIDANCE)),
    ("ddim", 19, 10, (19, GUIDANCE)), ("dpm++", 4, 10, (4, GUIDANCE)),
])
def test_steps_and_guidance_by_default(sampler, T, classes, expected):
    model = model_of(T, classes=classes, label_dropout=0.1)
    assert sampling_defaults(model, sampler)[:2] == expected
    assert sampling_defaults(model, sampler, steps=3, guidance=0)[:2] == (3, 0)


@pytest.mark.parametrize("steps, batch_size, expected", [
    (1, 64, 2.5), (499, 64, 2.5), (500, 64, 2.0), (500, 63, 2.5), (999, 64, 2.0), (1000, 64, 1.5), (1000, 63, 2.0),
    (2343, 64, 1.5), (2344, 64, 1.35), (2344, 63, 1.5), (15624, 64, 1.35), (15625, 64, GUIDANCE), (15625, 63, 1.35),
    (None, 64, GUIDANCE), (1, None, GUIDANCE), (1, "64", GUIDANCE), (1, -1.0, GUIDANCE),
])
def test_a_model_that_was_trained_briefly_is_guided_more(steps, batch_size, expected):
    """By the images that it was trained on, if it says so."""
    model = model_of(label_dropout=0.1, steps=steps, batch_size=batch_size)
    assert sampling_defaults(model, "dpm++")[1] == default_guidance(model) == expected
    model = model_of(label_dropout=0.0, steps=1, batch_size=64)
    assert sampling_defaults(model, "dpm++")[1] == default_guidance(model) == 1


def test_a_model_trained_without_labels_knows_none_and_one_trained_with_them_only_is_not_guided():
    """--label-dropout 1, as in the paper, and 0."""
    without, only = model_of(label_dropout=1.0), model_of(label_dropout=0.0)
    assert sampling_defaults(without, "ddim")[1] == sampling_defaults(only, "ddim")[1] == 1
    for model, guidance, how in [(without, 0, "without labels"), (without, 2, "without labels"),
                                 (only, 0, "with labels only"), (only, 1.25, "with labels only")]:
        with pytest.raises(UsageError, match=f"--guidance {guidance}: .* trained {how}; leave it out"):
            generate(model, 1, guidance=guidance)
    with pytest.raises(UsageError, match="no classes"):
        generate(without, 1, digit=0)
    for model in without, only:
        for labels, process in generate(model, 3, steps=1):
            list(process)
            assert (labels is None) == (model is without)
    assert [labels for _, _, labels in without.network.calls] == [None]
    assert [labels.shape for _, _, labels in only.network.calls] == [(3,)]


@pytest.mark.parametrize("label_dropout", [0.0, 1.0])
def test_a_guide_that_the_model_cannot_have_is_refused(label_dropout):
    model = model_of(label_dropout=label_dropout)
    with pytest.raises(UsageError, match="--guide label: the model was not trained both with labels and without"):
        generate(model, 1, guide="label")


@pytest.mark.parametrize("steps, guide, by_early", [
    (15625, None, True), (15624, None, False), (None, None, True), (15625, "label", False), (1, "early", True)])
def test_what_a_model_is_guided_by(steps, guide, by_early):
    """By its early self, if it has one and has seen a million images, or as it is asked to be."""
    model = model_of(T=1000, label_dropout=0.1, steps=steps, batch_size=64)
    assert guide_of(model) is None and sampling_defaults(model, "dpm++", guide="label")[3] is None
    with pytest.raises(UsageError, match="--guide early: this model has no early weights"):
        generate(model, 1, guide="early")
    model.early, model.precision = Silent(), "bf16"
    early = guide_of(model, guide)
    expected = (AUTOGUIDANCE, AUTOGUIDANCE_INTERVAL) if by_early else (default_guidance(model), (1.3, 35))
    assert sampling_defaults(model, "dpm++", 8, guide=guide) == (8, *expected, early) and bool(early) == by_early
    if by_early:  # all else is the model's
        assert early.network is model.early and early.ddpm is model.ddpm and early.precision == "bf16"
    for _, process in generate(model, 3, steps=8, guide=guide):
        list(process)
    without = [labels is None for _, _, labels in model.network.calls]
    assert any(without) != by_early and bool(model.early.calls) == by_early
    assert all(labels is not None for _, _, labels in model.early.calls)


def test_autoguidance_needs_no_labels_in_training():
    for dropout in 0.0, 1.0:
        model = model_of(label_dropout=dropout)
        model.early = Silent()
        (_, process), = generate(model, 3, steps=4, guidance=2, guidance_interval=(0, 1e9))
        list(process)
        assert len(model.network.calls) == len(model.early.calls) == 4
        assert {labels is None for _, _, labels in model.network.calls} == {dropout == 1.0}
        with pytest.raises(UsageError, match="--guidance 0: the model was trained"):
            generate(model, 1, guidance=0)


def test_noise_and_labels_are_made_where_the_model_is():
    """The meta device has shapes and no numbers, and stands for any other; but it has no autocast."""
    class Plain(Model):
        def __call__(self, x_t, t, labels=None):
            return self.network(x_t, t, labels)

    model = model_of(label_dropout=0.1)
    model = Plain(model.network.to("meta"), model.ddpm, model.settings)
    (_, process), = generate(model, 3, steps=2, guidance=2, guidance_interval=(0, 1e9))
    assert [x.device.type for _, x, _ in process] == ["meta"] * 2
    seen = [x for call in model.network.calls for x in call if x is not None]
    assert len(seen) == 2 * (2 + 3) and {x.device.type for x in seen} == {"meta"}


def test_guidance_acts_between_two_noise_levels():
    """Both included. There each step takes two calls of the network, elsewhere one, with the label."""
    model = model_of(label_dropout=0.1)
    levels = ((1 - model.ddpm.alpha_bars) / model.ddpm.alpha_bars).sqrt().tolist()
    assert [noise_level(a) for a in model.ddpm.alpha_bars.tolist()] == pytest.approx(levels)
    low, high = (noise_level(model.ddpm.alpha_bars[t]) for t in (5, 11))

    def calls(**settings):
        model.network.calls.clear()
        for _, process in generate(model, 3, sampler="ddim", steps=20, **settings):
            list(process)
        return sorted((t[0].item(), labels is None) for _, t, labels in model.network.calls)

    everywhere, without = [(t, False) for t in range(20)], [(t, True) for t in range(20)]
    assert calls(guidance=2, guidance_interval=(low, high)) == sorted(everywhere + without[5:12])
    assert calls(guidance=2, guidance_interval=(0, 1e9)) == sorted(everywhere + without)
    assert calls(guidance=1, guidance_interval=(low, high)) == everywhere
    assert calls(guidance=0, guidance_interval=(low, high)) == without
    inside = [t for t in range(20) if 1.3 <= levels[t] <= 35]
    assert calls() == sorted(everywhere + [(t, True) for t in inside]) and 0 < len(inside) < 20


def test_guidance_is_not_lost_between_the_steps():
    """If none lies between the noise levels by default, all are guided. If none lies between those asked for, they are
    refused, unless nothing is guided anyway."""
    model = model_of(T=1000, label_dropout=0.1)
    assert sampling_defaults(model, "dpm++", 8)[2] == (1.3, 35)
    assert sampling_defaults(model, "dpm++", 3)[2] == EVERYWHERE  # of 157, 1.25 and 0.01
    assert sampling_defaults(model, "dpm++", 3, None, (1.2, 2))[2] == (1.2, 2)
    for guidance in None, 3:
        with pytest.raises(UsageError, match="--guidance-interval 1.3 2 holds none of the 3 .* 0.01 to 157"):
            generate(model, 1, steps=3, guidance=guidance, guidance_interval=(1.3, 2))
    for guidance in 0, 1:
        generate(model, 1, steps=3, guidance=guidance, guidance_interval=(1.3, 2))


def test_labels_are_those_of_the_images_numbers():
    wanted = [class_of(i, [0.0, 0.5, 0.5]) for i in range(7)]
    assert set(wanted) == {1, 2}
    for batch_size in 1, 3, 7:
        drawn = [labels for labels, _ in generate(model_of(), 7, batch_size=batch_size)]
        assert torch.cat(drawn).tolist() == wanted


def test_a_model_without_class_shares_makes_each_class_as_often():
    (labels, _), = generate(model_of(class_shares=None), 300, batch_size=300, steps=1)
    assert torch.bincount(labels).tolist() == pytest.approx([100] * 3, abs=5)


@pytest.mark.parametrize("settings, words", [
    ({"steps": 21}, "--steps 21"), ({"digit": 3}, "--digit 3.*0 to 2"), ({"guidance": 2, "classes": 0}, "--guidance 2"),
    ({"digit": -1}, "--digit -1.*0 to 2"),
    ({"digit": 0, "classes": 0}, "no classes"), ({"guidance_interval": (3, 2)}, "--guidance-interval 3 2 holds none"),
    ({"digit": 1, "guidance": 0}, "--guidance 0 ignores labels"),
])
def test_what_the_model_cannot_do_is_bad_usage(settings, words):
    model = model_of(**{name: settings.pop(name) for name in ("classes",) if name in settings})
    with pytest.raises(UsageError, match=words):
        generate(model, 1, **settings)
    assert len([*generate(model, 1, steps=20)]) == 1


def test_the_shipped_model_is_guided_as_was_measured():
    """EXPERIMENTS.md, Autoguidance and Samplers. The README says how early its early self is."""
    model = load_model()
    assert sampling_defaults(model, "dpm++sde")[:3] == (24, 1.7, (0.6, 20.0))
    assert sampling_defaults(model, "dpm++sde", guide="label")[1:3] == (1.15, (1.3, 35.0))
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"the network as it was after {EARLY_IMAGES:,} images" in text


def test_how_often_a_run_is_saved_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert train.parse_flags()[0].save_every == 500
