"""Editing: filling in against a conditional that is known, inversion against the exact flow, and misuse in one line."""
import math
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import edit
import sample
from ddpm import DDPM, ImageNoise
from diffusion_model import Model
from diffusion_schedules import make_betas, sampling_timesteps
from helpers import assert_one_line, call, seeded, trained
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.data import DATASETS, load_dataset, read_npz, to_float
from utils.settings import SHIPPED

DDPM_1000 = DDPM(make_betas("logsnr", 1000))


@pytest.fixture(scope="module")
def mnist():
    return load_dataset("MNIST", train=False)


@pytest.fixture(autouse=True)
def digits_read_once(mnist, monkeypatch):
    """All edits are of test digits."""
    trained()  # which needs the others
    monkeypatch.setitem(DATASETS, "MNIST", lambda root, train: {False: mnist}[train])


def noises(seed=0):
    generator = seeded(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def best_noise(mean, cov):
    """The best prediction of the noise in x_t [B, 1, 1, D], if x0 ~ N(mean, cov)."""
    def model(x, t):
        a = DDPM_1000.alpha_bars[t[0]].item()
        of_x = math.sqrt(a) * cov @ torch.linalg.inv(a * cov + (1 - a) * torch.eye(len(cov), dtype=torch.float64))
        x0 = mean + (x - math.sqrt(a) * mean) @ of_x.T
        return (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# The mathematics

def gaussian():
    return torch.tensor([0.1, -0.1]).double(), torch.tensor([[0.25, 0.2], [0.2, 0.25]]).double()


def filled_in(rounds, n=4000, steps=150):
    """What becomes of the second of two pixels, with the first at 0.6."""
    mean, cov = gaussian()
    known = torch.tensor([0.6, 123.0], dtype=torch.float64).view(1, 1, 1, 2).expand(n, -1, -1, -1)
    visited, calls, model = sampling_timesteps(1000, steps).tolist(), [], best_noise(mean, cov)
    *_, (t, x, _) = DDPM_1000.inpaint(
        lambda x, t: calls.append(t[0].item()) or model(x, t), noises(1)(known), known, torch.tensor([True, False]),
        timesteps=visited, rounds=rounds, noise_fn=noises(2), clip=False)
    assert calls == [t for t in visited[:-1] for _ in range(rounds)] + visited[-1:] and t == visited[-1]
    assert (x[..., 0] == 0.6).all(), "what is known comes out as it is"
    return x[..., 1].mean().item(), x[..., 1].std().item()


def test_inpainting_a_gaussian_ends_in_its_conditional():
    """E[y | x] = mean_y + cov_xy / cov_xx (x - mean_x) = 0.3, its variance cov_yy - cov_xy^2 / cov_xx = 0.09. With one
    round the new pixel knows too little of the other."""
    mean, std = filled_in(rounds=10)
    assert mean == pytest.approx(0.3, abs=0.02) and std == pytest.approx(0.3, abs=0.02)
    careless, _ = filled_in(rounds=1)
    assert careless < mean - 0.05


def test_inpainting_is_repaints_algorithm_to_the_last_coefficient():
    """Mean and variance of the unknown pixel, exactly: each random number's weight in it is read off, as in
    test_samplers.ddpm_end. Followed from step to step they are those of RePaint's algorithm 1, in numpy."""
    (mean, cov), visited, rounds, draws = gaussian(), [999, 700, 560, 430, 300], 3, 40
    # Image 0 gets no noise at all; of the others each gets 1 in one pixel of one draw, x_T being the first.
    unit = torch.cat([torch.zeros(1, 2 * draws).double(), torch.eye(2 * draws).double()])
    supply = iter(unit.view(-1, draws, 1, 1, 2).transpose(0, 1))
    known = torch.tensor([0.6, 123.0]).double().view(1, 1, 1, 2)
    *_, (_, x, _) = DDPM_1000.inpaint(best_noise(mean, cov), next(supply), known, torch.tensor([True, False]),
                                      timesteps=visited, rounds=rounds, noise_fn=lambda x: next(supply), clip=False)
    ends = x[:, 0, 0, 1]

    mean, cov, eye = mean.numpy(), cov.numpy(), np.eye(2)
    m, c = np.zeros(2), np.eye(2)  # mean and covariance of x
    a = [1 / (1 + math.exp(23.3 * t / 999 - 13.3)) for t in visited] + [1.0]
    for a_t, a_s in zip(a, a[1:]):
        alpha, gain = a_t / a_s, math.sqrt(a_t) * cov @ np.linalg.inv(a_t * cov + (1 - a_t) * eye)
        of_x0, of_x, variance = 1.0, 0.0, 0.0  # at the end there is x0_hat = mean + gain (x - sqrt(a_t) mean) alone
        if a_s < 1:  # Bayes' rule, for x_s from x0_hat and x_t
            variance = 1 / (1 / (1 - a_s) + alpha / (1 - alpha))
            of_x0, of_x = variance * math.sqrt(a_s) / (1 - a_s), variance * math.sqrt(alpha) / (1 - alpha)
        step = of_x0 * gain + of_x * eye
        for left in range(rounds if a_s < 1 else 1, 0, -1):
            m = step @ m + of_x0 * (mean - math.sqrt(a_t) * gain @ mean)
            c = step @ c @ step.T + variance * eye
            m[0], c = math.sqrt(a_s) * 0.6, np.diag([1 - a_s, c[1, 1]])  # what is known has noise of its own
            if left > 1:
                m, c = math.sqrt(alpha) * m, alpha * c + (1 - alpha) * eye
    assert ends[0].item() == pytest.approx(m[1], abs=1e-6)
    assert (ends[1:] - ends[0]).square().sum().item() == pytest.approx(c[1, 1], abs=1e-6)


@pytest.mark.parametrize("clip", [True, False])
def test_inpainting_clips_if_it_is_asked_to(clip):
    x0, known = torch.zeros(2, 1, 2, 2).double(), torch.tensor([[True, False], [False, True]])
    process = DDPM_1000.inpaint(lambda x, t: -2 * x, noises(1)(x0), x0, known, timesteps=[999, 500, 100], rounds=2,
                                noise_fn=noises(2), clip=clip)
    assert (max(x0_hat.abs().max() for *_, x0_hat in process) > 1) == (not clip)


def test_inversion_follows_the_flow_and_comes_back():
    """Of data N(mean, s^2) the flow keeps (x - sqrt(alpha_bar) mean) / sqrt(alpha_bar s^2 + 1 - alpha_bar)."""
    mean, cov = torch.tensor([0.2]).double(), torch.tensor([[0.25]]).double()
    model, x0 = best_noise(mean, cov), torch.tensor([-0.9, 0.0, 0.7]).double().view(3, 1, 1, 1)
    visited = sampling_timesteps(1000, 400).tolist()
    x_T = DDPM_1000.invert(model, x0, timesteps=visited, clip=False)
    a = DDPM_1000.alpha_bars[-1].item()
    exact = math.sqrt(a) * mean + math.sqrt(a * 0.25 + 1 - a) * (x0 - mean) / 0.5
    torch.testing.assert_close(x_T, exact, rtol=0.02, atol=0.02)
    *_, (_, back, _) = DDPM_1000.sample(model, x_T, sampler="ddim", timesteps=visited, clip=False)
    torch.testing.assert_close(back, x0, rtol=0.02, atol=0.02)


# ----------------------------------------------------------------------------------------------------------------------
# The command

def edited(out, what, *flags):
    """The images and labels that it writes."""
    result = call(edit, what, "--checkpoint", trained(), "--out", out, "--npz", out / "x.npz", *flags)
    assert result.code == 0 and result.err == "", result.err
    assert result.out.split()[0] == str(out / f"{what}.png")
    return read_npz(out / "x.npz")


def digit(i=17):
    images, labels = load_dataset("MNIST", train=False)
    return images[i], labels[i].item()


HALVES = {"left": np.s_[:, :14], "right": np.s_[:, 14:], "top": np.s_[:14], "bottom": np.s_[14:],
          "centre": np.s_[7:21, 7:21]}


@pytest.mark.parametrize("mask", [*HALVES, "a picture"])
def test_inpaint_changes_what_it_is_to_fill_in_and_not_one_bit_else(tmp_path, mask):
    filled = np.zeros((28, 28), bool)
    filled[HALVES.get(mask, np.s_[3:9, 5:25])] = True
    if mask == "a picture":
        mask = tmp_path / "mask.png"
        iio.imwrite(mask, np.where(filled, 128, 127).astype(np.uint8))
    images, labels = edited(tmp_path, "inpaint", "--image", "test:17", "--mask", mask, "--n", 3, "--steps", 3,
                            "--rounds", 2)
    image, label = digit()
    assert len(images) == 3 and labels.tolist() == [label] * 3
    assert (images[:, 0].numpy()[:, ~filled] == image[0].numpy()[~filled]).all()
    assert len(images.flatten(1).unique(dim=0)) == 3, "all are filled in alike"


def test_inpainting_is_guided_at_its_noise_levels_in_each_round(tmp_path, monkeypatch):
    """By the image's label. Of the levels exp(-logsnr / 2), with logsnr = 13.3 - 23.3 t / 19, those of 19, 14, 10, 5
    and 0 are 148, 6.9, 0.6, 0.03 and 0.001."""
    told, predict_noise = [], Model.__call__
    monkeypatch.setattr(Model, "__call__", lambda model, x, t, labels=None: told.append(
        (t[0].item(), labels if labels is None else labels.tolist())) or predict_noise(model, x, t, labels))
    edited(tmp_path, "inpaint", "--image", "test:17", "--mask", "top", "--n", 2, "--steps", 5, "--rounds", 3,
           "--guide", "label", "--guidance", 2, "--guidance-interval", 1, 20)
    label = 2 * [digit()[1]]
    assert told == 3 * [(19, label)] + 3 * [(14, label), (14, None)] + 3 * [(10, label)] + 3 * [(5, label)] + [
        (0, label)]


def test_the_picture_shows_the_image_the_hole_and_what_fills_it(tmp_path):
    images, _ = edited(tmp_path, "inpaint", "--image", "test:17", "--mask", "left", "--n", 2, "--steps", 2)
    picture, image = iio.imread(tmp_path / "inpaint.png"), digit()[0][0].numpy()
    factor = picture.shape[1] // 122  # four images, in lines of two pixels
    holed = image.copy()
    holed[HALVES["left"]] = 48
    for k, expected in enumerate([image, holed, *images[:, 0].numpy()]):
        assert (picture[::factor, ::factor][2:30, 2 + 30 * k:30 + 30 * k] == expected).all()


@pytest.mark.parametrize("what, method", [
    (["inpaint", "--mask", "top"], "inpaint"), (["vary"], "sample"), (["blend", "--to", "test:4"], None)],
    ids=["inpaint", "vary", "blend"])
def test_flags_reach_what_they_are_for(tmp_path, monkeypatch, what, method):
    seen, load = [], edit.load_model
    monkeypatch.setattr(edit, "load_model", lambda *args: seen.append(args) or load(*args))
    if method:
        run = getattr(DDPM, method)
        monkeypatch.setattr(DDPM, method, lambda *args, **how: seen.append(how["clip"]) or run(*args, **how))
    edited(tmp_path, *what, "--image", "test:17", "--no-ema", "--precision", "bf16", "--device", "cpu", "--steps", 2,
           *["--no-clip"] * bool(method))  # blend has none
    assert seen == [(str(trained()), torch.device("cpu"), False, "bf16"), *[False] * bool(method)]


def test_vary_with_no_strength_is_the_image_and_with_all_of_it_a_sample(tmp_path):
    image, label = digit()
    images, labels = edited(tmp_path, "vary", "--image", "test:17", "--strength", 0, "--n", 2)
    assert torch.equal(images, image.expand(2, -1, -1, -1)) and labels.tolist() == [label] * 2
    made = []
    for flags in ["--digit", 3], ["--guidance", 0]:  # the second without a label
        images, labels = edited(tmp_path, "vary", "--image", "test:17", "--strength", 1, "--n", 2, *flags)
        assert labels is None if "0" in map(str, flags) else labels.tolist() == [3, 3]
        made.append(images)
        result = call(sample, "--checkpoint", trained(), *flags, "--n", 2, "--out", tmp_path, "--npz",
                      tmp_path / "s.npz")
        assert result.code == 0 and torch.equal(made[-1], read_npz(tmp_path / "s.npz")[0])
    assert not torch.equal(*made)


def test_vary_begins_at_its_share_of_the_way(tmp_path, monkeypatch):
    """Of 20 timesteps, by steps in proportion; and the stronger, the farther from the image."""
    begun, visited, away, q_sample, sample = [], [], [], DDPM.q_sample, DDPM.sample
    monkeypatch.setattr(DDPM, "q_sample", lambda ddpm, x0, t, noise: begun.append(t.tolist()) or q_sample(
        ddpm, x0, t, noise))
    monkeypatch.setattr(DDPM, "sample", lambda *args, **how: visited.append(how["timesteps"]) or sample(*args, **how))
    for strength in 0.01, 0.25, 0.5, 0.9:
        images, _ = edited(tmp_path, "vary", "--image", "test:17", "--strength", strength, "--n", 2, "--steps", 10)
        away.append((to_float(images) - to_float(digit()[0])).square().mean().item())
    assert begun == [[0] * 2, [4] * 2, [9] * 2, [17] * 2] and away == sorted(away) and away[0] < 0.01
    assert [(at[0], len(at)) for at in visited] == [(0, 1), (4, 2), (9, 5), (17, 9)]  # of ten, 0.5, 2.5, 5 and 9


def test_blend_goes_from_one_image_to_the_other(tmp_path):
    images, labels = edited(tmp_path, "blend", "--image", "test:17", "--to", "test:4", "--frames", 5)
    assert len(images) == 5 and labels is None
    ends = [digit(17)[0], digit(4)[0]]
    near = [[(to_float(images[i]) - to_float(end)).abs().mean().item() for end in ends] for i in (0, 4)]
    assert near[0][0] < near[0][1] and near[1][1] < near[1][0]
    frames = iio.imread(tmp_path / "blend.gif")
    assert len(frames) >= 5


def test_blend_goes_along_the_great_circle(tmp_path, monkeypatch):
    """The noise between two that are orthogonal is as long as they are, and turns evenly from one to the other. What
    is inverted has a little noise."""
    a, b = torch.zeros(2, 1, 28, 28).unbind()
    a[0, 0], b[0, 1] = 2, 2
    inverted, started, ways, sample = [], [], [], DDPM.sample
    monkeypatch.setattr(DDPM, "invert", lambda ddpm, model, x, timesteps: ways.append(("ddim", timesteps))
                        or inverted.append(x) or torch.stack([a, b]))
    monkeypatch.setattr(DDPM, "sample", lambda ddpm, model, x, sampler, timesteps: ways.append((sampler, timesteps))
                        or started.append(x) or sample(ddpm, model, x, sampler=sampler, timesteps=timesteps))
    edited(tmp_path, "blend", "--image", "test:17", "--to", "test:4", "--frames", 4, "--steps", 2, "--seed", 3)
    assert all(way == ("ddim", [19, 0]) for way in ways)
    x0, signal = to_float(torch.stack([digit(17)[0], digit(4)[0]])), 1 / (1 + math.exp(-13.3))  # logsnr of t = 0
    torch.testing.assert_close(inverted, [math.sqrt(signal) * x0 + math.sqrt(1 - signal) * ImageNoise(3, range(2))(x0)])
    for i, x in enumerate(torch.cat(started)):
        angle = torch.tensor(math.radians(30 * i))
        torch.testing.assert_close(x, angle.cos() * a + angle.sin() * b, rtol=0, atol=1e-3)


@pytest.mark.parametrize("what, flags", [
    ("inpaint", ["--mask", "top", "--rounds", 2, "--steps", 3]),
    ("vary", ["--strength", 0.7, "--steps", 6, "--guidance", 1])])  # more guidance makes rounding grow
def test_an_edit_does_not_depend_on_how_many_there_are(tmp_path, what, flags):
    flags = ["--image", "test:17", *flags, "--checkpoint", SHIPPED]
    many, _ = edited(tmp_path, what, *flags, "--n", 3, "--batch-size", 2)
    few, _ = edited(tmp_path, what, *flags, "--n", 1)
    other, _ = edited(tmp_path, what, *flags, "--n", 1, "--seed", 1)
    assert (many[:1].int() - few.int()).abs().max() <= 1 and not torch.equal(few, other)


def test_a_picture_is_made_grey_and_fitted_and_a_line_says_so(tmp_path):
    """The middle of a picture in colour, twice as large and wider than it is high."""
    image = digit()[0][0].numpy()
    large = np.zeros((56, 80, 3), np.uint8)
    large[:, 12:68] = image.repeat(2, 0).repeat(2, 1)[:, :, None] // np.array([1, 1, 2], np.uint8)
    iio.imwrite(tmp_path / "large.png", large)
    iio.imwrite(tmp_path / "exact.png", image)
    for name, said in ("large.png", ["the middle of 80x56 pixels in colour, made 28x28 and grey"]), ("exact.png", []):
        result = call(edit, "vary", "--image", tmp_path / name, "--strength", 0, "--n", 1, "--checkpoint", trained(),
                      "--out", tmp_path, "--npz", tmp_path / "x.npz")
        assert result.code == 0 and result.err.count("\n") == len(said) and all(line in result.err for line in said)
        images, labels = read_npz(tmp_path / "x.npz")
        bright = 1 if name == "exact.png" else 0.943  # blue, of which there is half, counts 0.114
        assert (images[0, 0].float() - bright * torch.tensor(image)).abs().max() < 1.5
        assert labels is None


@pytest.mark.parametrize("dataset, said", [("MNIST", 1), ("FashionMNIST", 0)])
def test_a_digit_in_black_on_white_gets_a_warning(tmp_path, dataset, said):
    """As people draw them. What other models learned may well be bright."""
    state = load_checkpoint(trained())
    save_checkpoint(tmp_path / "c.pt", state | {"settings": state["settings"] | {"dataset": dataset}})
    image = digit()[0][0].numpy()
    for name, picture, lines in ("as.png", image, 0), ("inverted.png", 255 - image, said):
        iio.imwrite(tmp_path / name, picture)
        result = call(edit, "vary", "--image", tmp_path / name, "--strength", 0, "--n", 1, "--checkpoint",
                      tmp_path / "c.pt", "--out", tmp_path)
        assert result.code == 0 and result.err.count("\n") == lines and result.err.count("invert it") == lines


def test_vary_at_little_strength_is_guided_if_asked(tmp_path):
    """None of its noise levels lies where guidance acts by default."""
    flags = ["vary", "--image", "test:17", "--strength", 0.4, "--n", 2]
    plain, _ = edited(tmp_path, *flags, "--guidance", 1)
    assert torch.equal(edited(tmp_path, *flags)[0], plain)
    assert not torch.equal(edited(tmp_path, *flags, "--guidance", 20)[0], plain)


def test_an_interval_means_nothing_where_nothing_is_guided(tmp_path):
    flags = ["--image", "test:17", "--n", 1, "--steps", 4, "--guidance", 1]
    expected, _ = edited(tmp_path, "vary", *flags)
    assert torch.equal(edited(tmp_path, "vary", *flags, "--guidance-interval", 300, 400)[0], expected)


def test_data_are_where_the_flag_says(tmp_path, mnist, monkeypatch):
    """Each image that a flag names is. (What is unpacked there: test_data.py.)"""
    roots = []
    monkeypatch.setitem(DATASETS, "MNIST", lambda root, train: roots.append(Path(root)) or mnist)
    for source in ["vary", "--image", "test:17", "--n", 1], ["blend", "--image", "test:17", "--to", "test:4"]:
        edited(tmp_path, *source, "--steps", 4, "--data", tmp_path / "data")
    assert roots == 3 * [tmp_path / "data"]


def test_what_is_inverted_is_as_long_as_noise():
    """Even of an image of which most is exactly black, and so certain: each such pixel keeps the noise it is given."""
    black, t = torch.full((1, 1, 28, 28), -1.0, dtype=torch.float64), torch.tensor([0])
    visited = sampling_timesteps(1000, 50).tolist()[:-1] + [0]
    x = DDPM_1000.q_sample(black, t, noises(3)(black))
    x_T = DDPM_1000.invert(lambda x, t: DDPM_1000.predict_noise(x, t, black), x, timesteps=visited)
    assert x_T.std().item() == pytest.approx(1, abs=0.1)


def test_an_image_of_the_data_set_is_of_its_part_and_has_a_label_if_the_model_knows_any(monkeypatch):
    sets = {part: (torch.full((5, 1, 28, 28), level, dtype=torch.uint8), torch.arange(5))
            for part, level in ((True, 200), (False, 100))}
    monkeypatch.setitem(DATASETS, "MNIST", lambda root, train: sets[train])
    settings = {"image_channels": 1, "image_size": 28, "classes": 10, "label_dropout": 0.1}
    for source, level, label in ("train:3", 200, 3), ("test:4", 100, 4):
        image, its = edit.load_source(source, Model(None, None, settings))
        assert image.shape == (1, 1, 28, 28) and (image == level).all() and its == label
    assert edit.load_source("test:4", Model(None, None, settings | {"label_dropout": 1.0}))[1] is None


def test_models_of_other_images_take_pictures_only(tmp_path):
    state = load_checkpoint(trained())
    for dataset, words in ["blots", "of its own"], [["MNIST"], "of its own"], ["EMNIST", "test:1"]:
        save_checkpoint(tmp_path / "c.pt", state | {"settings": state["settings"] | {"dataset": dataset}})
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(edit.DATASETS, "EMNIST", lambda root, train: (
                torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 46, 1, 2])))
            result = call(edit, "vary", "--image", "test:1", "--checkpoint", tmp_path / "c.pt", "--out", tmp_path)
        assert_one_line(result, 1 if dataset == "EMNIST" else 2, words, "give a picture")


@pytest.mark.parametrize("kind", ["RGBA", "CMYK", "16 bit", "GIF"])
def test_pictures_of_any_kind(tmp_path, kind):
    from PIL import Image
    image = Image.fromarray(digit()[0][0].numpy())
    path = tmp_path / ("x.gif" if kind == "GIF" else "x.tiff" if kind == "CMYK" else "x.png")
    if kind == "GIF":
        image.save(path, save_all=True, append_images=[Image.new("L", (28, 28), 255)])
    elif kind == "16 bit":
        Image.fromarray(digit()[0][0].numpy().astype(np.uint16) * 257).save(path)
    else:
        image.convert("RGB").convert(kind).save(path)
    result = call(edit, "vary", "--image", path, "--strength", 0, "--n", 1, "--checkpoint", trained(), "--out",
                  tmp_path, "--npz", tmp_path / "x.npz")
    assert result.code == 0, result.err
    assert (read_npz(tmp_path / "x.npz")[0][0].int() - digit()[0].int()).abs().max() <= 2


@pytest.mark.parametrize("flags, code, words", [
    (["vary", "--image", "test:10000"], 2, ["test:10000", "10,000"]),
    (["vary", "--image", "nowhere.png"], 1, ["no picture at nowhere.png", "test:17"]),
    (["vary", "--image", "broken.png"], 1, ["broken.png is not a picture"]),
    (["vary", "--image", "test:1", "--strength", 2], 2, ["--strength", "from 0 to 1"]),
    (["vary", "--image", "test:1", "--digit", 10], 2, ["--digit 10", "0 to 9"]),
    (["vary", "--image", "test:1", "--mask", "left"], 2, ["vary has no use for --mask"]),
    (["vary"], 2, ["--image"]), (["varied", "--image", "test:1"], 2, ["inpaint", "vary", "blend"]),
    (["inpaint", "--image", "test:1"], 2, ["inpaint needs --mask"]),
    (["inpaint", "--image", "test:1", "--mask", "small.png"], 1, ["small.png has 9x5 pixels", "28x28"]),
    (["inpaint", "--image", "test:1", "--mask", "middle"], 1, ["no mask middle", "centre"]),
    (["inpaint", "--image", "test:1", "--mask", "black.png"], 1, ["black.png has nothing white"]),
    (["inpaint", "--image", "test:1", "--mask", "top", "--sampler", "dpm++sde"], 2, ["no use for --sampler"]),
    (["vary", "--image", "test:1", "--digit", 3, "--guidance", 0], 2, ["--guidance 0 ignores labels"]),
    (["vary", "--image", "black.png", "--guidance", 2], 2, ["guidance by the label needs one", "--digit"]),
    (["vary", "--image", "test:1", "--strength", 0.2, "--guidance-interval", 5, 6], 2, ["--guidance-interval 5 6"]),
    (["blend", "--image", "test:1", "--to", "test:2", "--no-clip"], 2, ["blend has no use for --no-clip"]),
    (["blend", "--image", "test:1", "--to", "test:2", "--steps", 1], 2, ["at least 2 steps"]),
    (["inpaint", "--image", "test:1", "--mask", "top", "--sampler", "ddim"], 2, ["inpaint has no use for --sampler"]),
    (["blend", "--image", "test:1"], 2, ["blend needs --to"]),
    (["blend", "--image", "test:1", "--to", "test:2", "--guidance", 2], 2, ["blend has no use for --guidance"]),
    (["blend", "--image", "test:1", "--to", "test:2", "--frames", 1], 2, ["--frames"]),
    (["blend", "--image", "test:1", "--to", "test:2", "--steps", 21], 2, ["--steps 21", "20"]),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "")
def test_misuse_is_one_line(tmp_path, monkeypatch, flags, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG and nothing more")
    iio.imwrite(tmp_path / "small.png", np.zeros((5, 9), np.uint8))
    iio.imwrite(tmp_path / "black.png", np.zeros((28, 28), np.uint8))
    assert_one_line(call(edit, *flags, "--checkpoint", trained(), "--out", tmp_path / "out"), code, *words)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("guidance", [0, 1])
def test_a_picture_without_a_label_needs_none_where_nothing_is_guided(tmp_path, guidance):
    iio.imwrite(tmp_path / "x.png", digit()[0][0].numpy())
    result = call(edit, "vary", "--image", tmp_path / "x.png", "--guidance", guidance, "--n", 1, "--steps", 4,
                  "--checkpoint", trained(), "--out", tmp_path)
    assert result.code == 0, result.err


def test_a_model_without_classes_needs_no_label_to_leave_guidance_at_1(tmp_path):
    """And more than 1 is refused for what it lacks."""
    state = load_checkpoint(trained())
    save_checkpoint(tmp_path / "none.pt", state | {"settings": state["settings"] | {"label_dropout": 1.0}})
    flags = ["vary", "--image", "test:1", "--n", 1, "--steps", 4, "--checkpoint", tmp_path / "none.pt",
             "--out", tmp_path]
    result = call(edit, *flags, "--guidance", 1)
    assert result.code == 0, result.err
    assert_one_line(call(edit, *flags, "--guidance", 2), 2, "trained without labels")


@pytest.mark.parametrize("what", [["inpaint", "--mask", "right", "--rounds", 2], ["vary"]], ids=lambda what: what[0])
def test_edits_are_guided_by_the_early_network(tmp_path, what):
    """With the label, or without one, where it is not known."""
    iio.imwrite(tmp_path / "unlabelled.png", load_dataset("MNIST", train=False)[0][1, 0].numpy())
    state, path = load_checkpoint(trained()), tmp_path / "early.pt"

    def images(early, *flags):
        save_checkpoint(path, state | {"early": early})
        return edited(tmp_path, *what, "--n", 2, "--steps", 4, "--checkpoint", path, *flags)[0]

    same, other = state["ema"], {name: value * 0.9 for name, value in state["ema"].items()}
    for image, unguided in ("test:1", ["--guidance", 1]), (tmp_path / "unlabelled.png", []):
        by_early = "--image", image, "--guide", "early", "--guidance"
        plain = images(None, "--image", image, *unguided)
        assert torch.equal(plain, images(other, *by_early, 1)) and torch.equal(plain, images(same, *by_early, 5))
        assert not torch.equal(plain, images(other, *by_early, 5))
