"""Editing: filling in against a conditional that is known, inversion against the exact flow, and misuse in one line."""
import math
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import edit
import sample
from ddpm import DDPM
from diffusion_schedules import make_betas, sampling_timesteps
from helpers import assert_one_line, call, trained
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


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


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


def test_vary_with_no_strength_is_the_image_and_with_all_of_it_a_sample(tmp_path):
    image, label = digit()
    images, labels = edited(tmp_path, "vary", "--image", "test:17", "--strength", 0, "--n", 2)
    assert torch.equal(images, image.expand(2, -1, -1, -1)) and labels.tolist() == [label] * 2
    images, _ = edited(tmp_path, "vary", "--image", "test:17", "--strength", 1, "--n", 2, "--digit", 3)
    result = call(sample, "--checkpoint", trained(), "--digit", 3, "--n", 2, "--out", tmp_path, "--npz",
                  tmp_path / "s.npz")
    assert result.code == 0 and torch.equal(images, read_npz(tmp_path / "s.npz")[0])


def test_vary_begins_at_its_share_of_the_way(tmp_path, monkeypatch):
    """Of 20 timesteps, by steps in proportion; and the stronger, the farther from the image."""
    begun, q_sample = [], DDPM.q_sample
    monkeypatch.setattr(DDPM, "q_sample", lambda ddpm, x0, t, noise: begun.append(t.tolist()) or q_sample(
        ddpm, x0, t, noise))
    away = []
    for strength in 0.01, 0.25, 0.5, 0.9:
        images, _ = edited(tmp_path, "vary", "--image", "test:17", "--strength", strength, "--n", 2, "--steps", 10)
        away.append((to_float(images) - to_float(digit()[0])).square().mean().item())
    assert begun == [[0] * 2, [4] * 2, [9] * 2, [17] * 2] and away == sorted(away) and away[0] < 0.01


def test_blend_goes_from_one_image_to_the_other(tmp_path):
    images, labels = edited(tmp_path, "blend", "--image", "test:17", "--to", "test:4", "--frames", 5)
    assert len(images) == 5 and labels is None
    ends = [digit(17)[0], digit(4)[0]]
    near = [[(to_float(images[i]) - to_float(end)).abs().mean().item() for end in ends] for i in (0, 4)]
    assert near[0][0] < near[0][1] and near[1][1] < near[1][0]
    frames = iio.imread(tmp_path / "blend.gif")
    assert len(frames) >= 5


def test_blend_goes_along_the_great_circle(tmp_path, monkeypatch):
    """The noise between two that are orthogonal is as long as they are, and turns evenly from one to the other."""
    a, b = torch.zeros(2, 1, 28, 28).unbind()
    a[0, 0], b[0, 1] = 2, 2
    monkeypatch.setattr(DDPM, "invert", lambda *args, **how: torch.stack([a, b]))
    started, sample = [], DDPM.sample
    monkeypatch.setattr(DDPM, "sample",
                        lambda ddpm, model, x, **how: started.append(x) or sample(ddpm, model, x, **how))
    edited(tmp_path, "blend", "--image", "test:17", "--to", "test:4", "--frames", 4, "--steps", 2)
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


def test_models_of_other_images_take_pictures_only(tmp_path):
    from utils.checkpoint import load_checkpoint, save_checkpoint
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
