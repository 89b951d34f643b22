"""Sampling: what is written, that image i is image i whatever else is drawn, and misuse in one line."""
import contextlib
import gc
import io
import os
import subprocess
import sys
import tracemalloc
import weakref
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import evaluate
import sample
from ddpm import DDPM, SAMPLERS, ImageNoise, Sampler
from diffusion_model import BayesUNet, Model, build_network
from diffusion_schedules import make_betas
from helpers import DEVICE, NETWORK, assert_one_line, call, start, trained
from sample import generate
from utils import cli, pictures
from utils.checkpoint import load_model, save_checkpoint
from utils.classifier import classify, load_classifier
from utils.data import class_of, read_npz, to_uint8
from utils.files import npz_writer
from utils.pictures import GIF_FRAMES, GIF_LEVELS, Gallery, gif_frames, make_grid
from utils.settings import SHIPPED


def draw(out, *flags, checkpoint=None):
    """Samples into `out` and returns the images and labels of the .npz."""
    result = call(sample, "--checkpoint", checkpoint or trained(), "--out", out, "--npz", out / "x.npz", *flags)
    assert result.code == 0 and result.err == "", result.err
    with np.load(out / "x.npz") as arrays:
        return arrays["images"], arrays["labels"]


def untrained(path, **settings):
    """A checkpoint with random weights, for a model of any kind."""
    settings = NETWORK | {"schedule": "linear", "timesteps": 20} | settings
    settings["class_shares"] = [1 / settings["classes"]] * settings["classes"] if settings["classes"] else []
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(value.shape, generator=generator) / 10
               for name, value in build_network(settings).state_dict().items()}
    save_checkpoint(path, {"settings": settings, "ema": weights})
    return path


def tiles(picture, n, columns=None):
    """The n images [n, 28, 28] in an (upscaled) picture of a grid."""
    side = columns or int(np.ceil(np.sqrt(n)))
    factor = picture.shape[1] // (side * 30 + 2)
    assert picture.shape[:2] == ((-(-n // side) * 30 + 2) * factor, (side * 30 + 2) * factor)
    small = picture[::factor, ::factor]
    assert (small.repeat(factor, axis=0).repeat(factor, axis=1) == picture).all()
    corners = [(2 + i // side * 30, 2 + i % side * 30) for i in range(n)]
    return np.stack([small[top:top + 28, left:left + 28] for top, left in corners])


def gif(path):
    """The frames [F, H, W] of a grey GIF, and their durations."""
    with Image.open(path) as pictures:
        frames, durations = zip(*((np.array(frame.convert("RGB")), frame.info["duration"])
                                  for frame in ImageSequence.Iterator(pictures)))
    assert all((frame == frame[..., :1]).all() for frame in frames)
    return np.stack(frames)[..., 0], durations


def alike(frame, images):
    """Whether a frame of a GIF shows these images, in its few grey levels."""
    return np.abs(frame.astype(float) - np.asarray(images)).max() <= 255 / (GIF_LEVELS - 1) / 2 + 0.5


@pytest.fixture
def noises(monkeypatch):
    """The tensors of noise that are drawn, in a list that grows."""
    trained()  # not the noise of its training
    drawn, draw_noise = [], ImageNoise.__call__
    monkeypatch.setattr(ImageNoise, "__call__", lambda self, x: drawn.append(draw_noise(self, x)) or drawn[-1])
    return drawn


# ----------------------------------------------------------------------------------------------------------------------
# What is written

@pytest.mark.parametrize("n", [1, 7, 64])
def test_the_grid_shows_the_images(tmp_path, n):
    images, labels = draw(tmp_path, "--n", n, "--steps", 2)
    assert images.shape == (n, 28, 28) and images.dtype == np.uint8
    assert labels.shape == (n,) and labels.dtype == np.int64 and set(labels) <= set(range(10))
    assert (tiles(iio.imread(tmp_path / "grid.png"), n) == images).all()


def test_each_path_is_printed_and_nothing_else_is_written(tmp_path):
    out = tmp_path / "new" / "folder"
    flags = ["--checkpoint", trained(), "--steps", 2, "--n", 3, "--out", out]
    result = call(sample, *flags)
    assert result.out.split() == [str(out / "grid.png")] and result.err == ""
    result = call(sample, *flags, "--gif", "--npz", tmp_path / "arrays" / "x.npz")
    paths = [out / "grid.png", out / "process.gif", tmp_path / "arrays" / "x.npz"]
    assert result.out.split() == [str(path) for path in paths]
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(paths)


@pytest.mark.parametrize("sampler, steps", [("dpm++sde", None), ("dpm++", None), ("ddim", 5), ("ddpm", None),
                                            ("dpm++", 1)])
def test_the_gif_grows_from_noise_to_the_grid(tmp_path, noises, sampler, steps):
    flags = ["--steps", steps] if steps else []
    images, _ = draw(tmp_path, "--n", 7, "--gif", "--sampler", sampler, *flags)
    frames, durations = gif(tmp_path / "process.gif")
    assert 10 <= len(frames) <= GIF_FRAMES  # equal ones are joined
    assert durations[-1] >= 1000 and sum(durations[:-1]) < 2500
    assert alike(tiles(frames[-1], 7), images)
    # The noise that it starts from is the one that was drawn, once: some add more, at all steps but the last.
    assert alike(tiles(frames[0], 7), to_uint8(noises[0])[:, 0])
    assert len(noises) == (20 if sampler in ("ddpm", "dpm++sde") else 1)
    assert torch.equal(noises[0], ImageNoise(0, range(7))(torch.empty(7, 1, 28, 28)))
    # and it comes nearer to the end all the time
    away = [np.abs(tiles(frame, 7).astype(float) - images).mean() for frame in frames]
    assert all(later < earlier for earlier, later in zip(away[::3], away[3::3]))


def test_the_gif_is_right_over_many_batches(tmp_path, monkeypatch, noises):
    monkeypatch.setattr(Gallery, "GIF", 10)
    images, _ = draw(tmp_path, "--n", 14, "--batch-size", 4, "--gif", "--steps", 3, "--sampler", "dpm++")
    assert [len(noise) for noise in noises] == [4, 4, 4, 2]
    frames, _ = gif(tmp_path / "process.gif")
    assert alike(tiles(frames[-1], 10), images[:10])
    assert alike(tiles(frames[0], 10), to_uint8(torch.cat(noises))[:10, 0])


def test_a_large_grid_shows_the_first_images(tmp_path, monkeypatch):
    monkeypatch.setattr(Gallery, "GRID", 9)
    flags = ["--n", 12, "--steps", 2, "--batch-size", 5, "--out", tmp_path, "--npz", tmp_path / "x.npz"]
    result = call(sample, "--checkpoint", trained(), *flags)
    assert f"{tmp_path / 'grid.png'} (the first 9)" in result.out
    with np.load(tmp_path / "x.npz") as arrays:
        assert len(arrays["images"]) == 12
        assert (tiles(iio.imread(tmp_path / "grid.png"), 9) == arrays["images"][:9]).all()


def test_a_share_of_the_batches_is_every_mth_of_them():
    model, how = load_model(trained()), {"steps": 1, "batch_size": 2, "sampler": "ddim"}
    x_T = [process.x_T for _, process in generate(model, 11, **how)]
    for k in range(3):
        mine = [process.x_T for _, process in generate(model, 11, share=(k, 3), **how)]
        assert len(mine) == 2 and all(map(torch.equal, mine, x_T[k::3]))


def test_how_much_is_drawn_by_default(monkeypatch):
    for flags, n in ([], 64), (["--classes"], 8), (["--n", 3], 3):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
        assert sample.parse_flags().n == n


def test_an_unknown_sampler_is_refused():
    with pytest.raises(cli.UsageError, match="unknown sampler 'dpm'; choose one of ddpm, ddim"):
        generate(load_model(trained()), 1, sampler="dpm")


def test_it_warns_before_it_draws_images_that_will_not_be_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(Gallery, "GRID", 3)
    flags = ["--checkpoint", trained(), "--steps", 1, "--out", tmp_path]
    with monkeypatch.context() as patch:
        patch.delattr(sample, "generate")
        said, failed = call(sample, *flags, "--n", 4).err.splitlines()
    assert all(words in said for words in ("first 3 of 4", "--npz", "--png")) and "generate" in failed
    assert call(sample, *flags, "--n", 4).err.splitlines() == [said]
    for keeps in ["--n", 3], ["--n", 4, "--npz", tmp_path / "x.npz"], ["--n", 4, "--png", tmp_path / "x"]:
        assert call(sample, *flags, *keeps).err == ""


def test_the_gif_is_even_in_the_share_of_signal(tmp_path):
    """Which is the square root of alpha_bar. (gif_frames: test_pictures.py.)"""
    draw(tmp_path, "--n", 1, "--sampler", "ddim", "--steps", 20, "--gif")
    model = load_model(trained())
    (_, process), = generate(model, 1, sampler="ddim", steps=20)
    states = [to_uint8(x) for x in (process.x_T, *(x for _, x, _ in process))]
    expected = gif_frames(states, [*model.ddpm.alpha_bars.sqrt().flip(0).tolist(), 1])
    frames, _ = gif(tmp_path / "process.gif")
    assert all(map(alike, [tiles(frame, 1) for frame in frames], [frame[0] for frame in expected]))
    assert len(frames) == len(expected)


def test_draw_returns_what_the_command_writes(tmp_path):
    model = load_model(trained())
    images, labels = sample.draw(model, 7, steps=2, batch_size=3, seed=1)
    written, their_labels = draw(tmp_path, "--n", 7, "--steps", 2, "--batch-size", 3, "--seed", 1)
    assert images.shape == (7, 1, 28, 28) and (images[:, 0].numpy() == written).all()
    assert labels.tolist() == their_labels.tolist()
    assert sample.draw(load_model(untrained(tmp_path / "c.pt", classes=0)), 1, steps=1)[1] is None
    model.network.register_forward_hook(lambda network, x, out: out * torch.nan)
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        sample.draw(model, 2, steps=1)


def test_flags_reach_what_they_are_for(tmp_path, monkeypatch):
    seen, load, generate = [], sample.load_model, sample.generate
    monkeypatch.setattr(sample, "load_model", lambda *args: seen.append(args) or load(*args))
    monkeypatch.setattr(sample, "generate", lambda model, n, **settings: seen.append((n, settings))
                        or generate(model, n, **settings))
    flags = {"sampler": "ddim", "steps": 4, "guidance": 3, "guide": "label", "seed": 5, "batch_size": 2, "digit": 6}
    draw(tmp_path, "--n", 3, "--no-clip", "--no-ema", "--precision", "bf16", "--device", "cpu",
         "--guidance-interval", 2, 7.5,
         *[f"--{name.replace('_', '-')}={value}" for name, value in flags.items()])
    assert seen == [(str(trained()), torch.device("cpu"), False, "bf16"),
                    (3, flags | {"clip": False, "guidance_interval": [2, 7.5], "share": (0, 1)})]


def test_classes_are_rows_and_noises_are_columns(tmp_path):
    """In grid, GIF and arrays. A column is the image of that number, drawn as each digit."""
    flags = ["--steps", 3, "--batch-size", 2, "--seed", 5]
    images, labels = draw(tmp_path, "--classes", "--n", 3, "--gif", *flags)
    assert labels.tolist() == [digit for digit in range(10) for _ in range(3)]
    for digit in 0, 7:
        alone, _ = draw(tmp_path / "alone", "--digit", digit, "--n", 3, *flags)
        assert (images[3 * digit:3 * digit + 3] == alone).all()
    picture = iio.imread(tmp_path / "grid.png")
    factor = picture.shape[1] // 92
    assert picture.shape == (302 * factor, 92 * factor)  # ten rows of three
    assert alike(tiles(gif(tmp_path / "process.gif")[0][-1], 30, columns=3), images)
    assert call(sample, "--checkpoint", trained(), "--classes", "--steps", 1, "--out", tmp_path).code == 0
    assert_one_line(call(sample, "--classes", "--digit", 3), 2, "--classes", "--digit")
    flags = ["--classes", "--steps", 1, "--sampler", "ddim", "--guidance", 1, "--out", tmp_path, "--n"]
    for n, shape in (40, (10 * 30 + 2, 40 * 30 + 2)), (41, (20 * 30 + 2, 20 * 30 + 2)):  # the first 400, in a square
        assert call(sample, "--checkpoint", trained(), *flags, n).code == 0
        assert iio.imread(tmp_path / "grid.png").shape == shape


def test_a_trajectory_shows_what_the_model_saw_on_the_way(tmp_path, monkeypatch):
    """For each of four images a row of x_t and one of x0_hat, at eight of the steps, from the first to the last."""
    seen, follow = [], sample.follow
    monkeypatch.setattr(sample, "follow", lambda batches, n, wanted: (
        seen.append(batch) or batch for batch in follow(batches, n, lambda t: wanted(t) and set(t))))
    images, _ = draw(tmp_path, "--n", 5, "--batch-size", 3, "--steps", 15, "--sampler", "dpm++", "--trajectory")
    steps = [[torch.cat([batch[2][i][which] for batch in seen])[:4, 0].numpy() for which in (1, 2)] for i in range(15)]
    picture = iio.imread(tmp_path / "trajectory.png")
    shown = tiles(picture, 64, columns=8).reshape(4, 2, 8, 28, 28)
    for column, step in enumerate([0, 2, 4, 6, 8, 10, 12, 14]):
        for which in 0, 1:
            assert (shown[:, which, column] == steps[step][which]).all()
    assert (shown[:, 1, -1] == images[:4]).all()  # the last x0_hat is the image
    assert [t for t, *_ in seen[0][2]] == sorted({t for t, *_ in seen[0][2]}, reverse=True)


def test_pictures_keep_only_the_states_that_they_show(tmp_path, monkeypatch):
    """Or all steps of "ddpm", for a hundred large images, would not fit into memory."""
    kept, add, wanted = [], Gallery.add, Gallery.wanted
    monkeypatch.setattr(Gallery, "add", lambda self, images, steps: kept.append(len(steps)) or add(self, images, steps))
    checkpoint = untrained(tmp_path / "x.pt", timesteps=60)
    flags = ["--n", 5, "--batch-size", 3, "--guidance", 1, "--sampler", "ddpm"]
    draw(tmp_path, *flags, checkpoint=checkpoint)
    draw(tmp_path / "a", *flags, "--trajectory", checkpoint=checkpoint)
    draw(tmp_path / "b", *flags, "--trajectory", "--gif", checkpoint=checkpoint)
    few = kept[4]
    assert kept == [0, 0, 8, 8, few, few] and 8 < few <= 8 + 2 * GIF_FRAMES < 60
    # and the pictures are those of all states
    monkeypatch.setattr(Gallery, "wanted", lambda self, alpha_bars, t: wanted(self, alpha_bars, t) and set(t))
    draw(tmp_path / "c", *flags, "--trajectory", "--gif", checkpoint=checkpoint)
    assert kept[-1] == 60
    for name in "trajectory.png", "process.gif":
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_a_trajectory_of_few_steps_and_images(tmp_path):
    draw(tmp_path, "--n", 1, "--steps", 2, "--trajectory")
    assert iio.imread(tmp_path / "trajectory.png").shape == (62 * 11, 62 * 11)


def test_without_a_terminal_it_says_each_minute_how_far_it_has_come(tmp_path, monkeypatch):
    """The command, and what draws for evaluate.py and for reports. Otherwise it says nothing before the end."""
    now = [0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now.append(now[-1] + 45) or now[-1])
    flags = ["--n", 8, "--batch-size", 2, "--steps", 2, "--checkpoint", trained(), "--out", tmp_path]
    assert call(sample, *flags).out.splitlines() == ["4 of 8 images", "8 of 8 images", str(tmp_path / "grid.png")]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        sample.draw(load_model(trained()), 8, "real", batch_size=2, steps=2)
    assert out.getvalue().splitlines() == ["real: 4 of 8 images", "real: 8 of 8 images"]


def test_single_pictures_by_number(tmp_path, monkeypatch):
    """Each equal to the bit, also where the batch ends."""
    looked, glob = [], Path.glob
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: looked.append(folder) or glob(folder, pattern))
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / ".000003.png.0123abcd.tmp").touch()  # of a process that was killed
    images, _ = draw(tmp_path, "--n", 5, "--batch-size", 2, "--steps", 2, "--png", tmp_path / "png")
    assert sorted(path.name for path in (tmp_path / "png").iterdir()) == [f"{i:06}.png" for i in range(5)]
    assert looked.count(tmp_path / "png") == 2  # at the start and at the end, and not once for each picture
    for i, image in enumerate(images):
        assert (iio.imread(tmp_path / "png" / f"{i:06}.png") == image).all()
    (tmp_path / "file").touch()
    assert_one_line(call(sample, "--png", tmp_path / "file", "--out", tmp_path), 1, tmp_path / "file")
    assert_one_line(call(sample, "--png", tmp_path / "x" / "..", "--out", tmp_path), 2, "--png", "another folder")
    for n, others in (5, ""), (3, ", beside 2 that were there"):
        result = call(sample, "--checkpoint", trained(), "--n", n, "--steps", 2, "--png", tmp_path / "png", "--out",
                      tmp_path)
        assert result.out.splitlines()[-1] == f"{tmp_path / 'png'} ({n} files{others})"


def test_no_more_images_are_kept_than_the_grid_shows(tmp_path, monkeypatch):
    """Beside those at hand: with --npz there may be a million."""
    monkeypatch.setattr(pictures.Gallery, "GRID", 6)
    alive, most, finished = weakref.WeakSet(), [], sample.finished

    def noted(x):
        gc.collect(1)  # what is young; all else would take long
        most.append(sum(map(len, alive)))
        images = finished(x)
        alive.add(images)
        return images

    monkeypatch.setattr(sample, "finished", noted)
    flags = ["--n", 24, "--batch-size", 2, "--steps", 1, "--out", tmp_path, "--npz", tmp_path / "x.npz"]
    assert call(sample, "--checkpoint", trained(), *flags).code == 0
    assert len(most) == 12 and max(most) <= 6 + 2 and len(read_npz(tmp_path / "x.npz")[0]) == 24
    assert iio.imread(tmp_path / "grid.png").shape == (62 * 7, 92 * 7)  # two rows of three


@pytest.mark.parametrize("n, side, factor", [(1, 32, 22), (2, 62, 11), (64, 242, 2), (130, 362, 1)])
def test_the_grid_is_enlarged_to_be_seen(n, side, factor, tmp_path):
    """By a whole number, to at most 720 pixels. What is as large already is left as it is."""
    assert call(sample, "--checkpoint", trained(), "--n", n, "--steps", 1, "--out", tmp_path).code == 0
    picture = iio.imread(tmp_path / "grid.png")
    assert max(picture.shape) == side * factor
    assert (picture == picture[::factor, ::factor].repeat(factor, axis=0).repeat(factor, axis=1)).all()


# ----------------------------------------------------------------------------------------------------------------------
# Image i is image i

@pytest.mark.parametrize("guidance", [["--guide", "label", "--guidance", 2], []], ids=["label 2", "default"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_how_many_are_drawn(tmp_path, sampler, guidance):
    flags = ["--sampler", sampler, "--steps", 4, *guidance]
    # Of the shipped model: one that is hardly trained makes more of rounding.
    many, labels = draw(tmp_path / "many", "--n", 8, "--batch-size", 6, *flags, checkpoint=SHIPPED)
    few, few_labels = draw(tmp_path / "few", "--n", 7, "--batch-size", 3, *flags, checkpoint=SHIPPED)
    assert (few_labels == labels[:7]).all()
    assert np.abs(few.astype(int) - many[:7]).max() <= 1  # float rounding may move one grey level
    assert min(np.abs(many[i].astype(int) - many[j]).mean() for i in range(7) for j in range(i)) > 1


def test_same_seed_same_bytes_other_seed_other_images(tmp_path):
    flags = ["--n", 5, "--steps", 3, "--gif"]
    for name, seed in ("a", 4), ("b", 4), ("c", 5):
        draw(tmp_path / name, *flags, "--seed", seed)
    for name in "grid.png", "process.gif", "x.npz":
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b != c


def test_the_samplers_and_their_steps_differ(tmp_path):
    drawn = [draw(tmp_path, "--n", 2, *flags)[0].tobytes() for flags in [
        ["--sampler", "ddpm"], ["--sampler", "ddim"], ["--sampler", "dpm++"], ["--sampler", "dpm++sde"],
        ["--steps", 1], ["--steps", 5],
        ["--no-ema"]]]
    assert len(set(drawn)) == len(drawn)
    assert draw(tmp_path, "--n", 2)[0].tobytes() == drawn[3]  # the default sampler


def test_no_step_adds_the_noise_that_it_started_from(monkeypatch):
    """Each image's stream goes on, from x_T to the noise of the first step and so on."""
    drawn = []
    monkeypatch.setitem(SAMPLERS, "probe", Sampler(
        lambda x, x0_hat, a_t, a_s, before, noise_fn: drawn.append(noise_fn(x)) or x, "trailing", 3))
    (_, process), = generate(load_model(trained()), 3, sampler="probe")
    assert len(list(process)) == 3
    correlation = torch.corrcoef(torch.cat([process.x_T, *drawn]).flatten(1)) - torch.eye(9)
    assert correlation.abs().max() < 6 / 28  # of 784 pixels each


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_from_one_step_to_all(tmp_path, sampler, steps):
    images, _ = draw(tmp_path, "--n", 2, "--sampler", sampler, "--steps", steps)
    assert images.std() > 0


def test_64_images_are_sampled_at_a_time(monkeypatch):
    model = load_model(trained())
    assert [len(labels) for labels, _ in generate(model, 130)] == [64, 64, 2]
    for module in sample, evaluate:
        monkeypatch.setattr(sys, "argv", ["x.py"])
        assert module.parse_flags().batch_size == 64


# ----------------------------------------------------------------------------------------------------------------------
# Labels

def test_a_digit_for_all(tmp_path):
    flags = ["--n", 4, "--steps", 6]
    three, threes = draw(tmp_path, *flags, "--digit", 3)
    zero, zeros = draw(tmp_path, *flags, "--digit", 0)
    assert threes.tolist() == [3] * 4 and zeros.tolist() == [0] * 4
    assert (three != zero).any()


def test_guidance_ignores_follows_or_exaggerates_the_label(tmp_path):
    def images(guidance, *digit):
        flags = ["--n", 4, "--steps", 6, "--guidance", guidance, "--no-clip"]
        drawn, labels = draw(tmp_path, *flags, *digit, checkpoint=SHIPPED)
        assert (labels == (3 if digit else -1)).all()  # at guidance 0 nobody asked for any
        return drawn.astype(int)

    model = load_model()

    def by_hand(labels):
        noise_fn = ImageNoise(0, range(4))
        *_, (_, x, _) = model.ddpm.sample(lambda x, t: model(x, t, labels), noise_fn(torch.empty(4, 1, 28, 28)),
                                          sampler="dpm++sde", steps=6, noise_fn=noise_fn, clip=False)
        return ((x[:, 0].numpy() + 1) * 127.5).round().clip(0, 255)

    nothing, followed, exaggerated = images(0), images(1, "--digit", 3), images(4, "--digit", 3)
    assert np.abs(nothing - by_hand(None)).max() <= 1  # rounding
    assert np.abs(followed - by_hand(torch.full((4,), 3))).max() <= 1
    assert 0 < np.abs(followed - nothing).mean() < np.abs(exaggerated - nothing).mean()


def test_the_clip_is_of_the_guided_image(tmp_path):
    """Which leaves [-1, 1] where the difference of two is exaggerated."""
    flags = ["--n", 2, "--steps", 4, "--guidance"]
    clipped, free = (draw(tmp_path, *flags, 9, *flag, checkpoint=SHIPPED)[0] for flag in ([], ["--no-clip"]))
    assert (clipped != free).any()
    clipped, free = (draw(tmp_path, *flags, 1, *flag, checkpoint=SHIPPED)[0] for flag in ([], ["--no-clip"]))
    assert np.abs(clipped.astype(int) - free).max() <= 1  # rounding


@pytest.mark.parametrize("n", [10, 137, 1000])
@pytest.mark.parametrize("shares", [
    [0.1] * 10, [0.5, 0.0, 0.5], [0.0, 1.0], [1.0], [0.2, 0.6],
    [0.0987, 0.1124, 0.0993, 0.1022, 0.0974, 0.0904, 0.0986, 0.1044, 0.0975, 0.0991],
])
def test_any_number_of_images_has_the_classes_in_their_shares(n, shares):
    counts = np.bincount([class_of(i, shares) for i in range(n)], minlength=len(shares))
    assert np.abs(counts - n * np.array(shares) / sum(shares)).max() <= 4
    assert all(count == 0 for count, share in zip(counts, shares) if share == 0)


def test_classes_come_in_no_order():
    """In a grid of any width no two neighbours, or others at a fixed distance, are alike more often than by chance."""
    labels = np.array([class_of(i, [0.1] * 10) for i in range(400)])
    assert max((labels[k:] == labels[:-k]).mean() for k in range(1, 100)) < 0.25


def test_a_model_without_classes(tmp_path):
    path = untrained(tmp_path / "c.pt", classes=0)
    images, labels = draw(tmp_path, "--n", 3, "--steps", 3, "--gif", checkpoint=path)
    assert labels.tolist() == [-1] * 3 and images.std() > 0
    for flags in ["--digit", 1], ["--guidance", 2], ["--classes"]:
        assert_one_line(call(sample, "--checkpoint", path, "--out", tmp_path, *flags), 2, flags[0])


def test_a_model_of_another_size(tmp_path):
    path = untrained(tmp_path / "c.pt", image_size=12, timesteps=2)
    images, _ = draw(tmp_path, "--n", 2, "--steps", 2, checkpoint=path)
    assert images.shape == (2, 12, 12)


def test_a_model_in_colour(tmp_path):
    path = untrained(tmp_path / "c.pt", image_channels=3)
    result = call(sample, "--checkpoint", path, "--n", 2, "--steps", 2, "--gif", "--out", tmp_path, "--npz",
                  tmp_path / "x.npz")
    assert result.code == 0, result.err
    assert iio.imread(tmp_path / "grid.png").ndim == 3
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["images"].shape == (2, 3, 28, 28) and len(arrays["labels"]) == 2


def test_the_class_of_an_image_depends_on_its_number_alone():
    settings = NETWORK | {"label_dropout": 0.1}
    model, drawn = Model(torch.nn.Linear(1, 1), DDPM(make_betas("cosine", 12)), settings), []
    for n, batch_size, seed in (60, 64, 0), (45, 7, 0), (60, 1, 3), (31, 64, 2**32 - 1):
        labels = torch.cat([labels for labels, _ in generate(model, n, batch_size=batch_size, seed=seed)])
        assert len(labels) == n and labels.tolist() == [class_of(i, [0.1] * 10) for i in range(n)]
        drawn.append(labels[:31].tolist())
    assert drawn == [drawn[0]] * 4


# ----------------------------------------------------------------------------------------------------------------------
# Misuse

NUMBERS = ["0", "-1", "", "nan", "inf", "1.5", "x", "9" * 40]


@pytest.mark.parametrize("flag, value", [
    *[(flag, value) for flag in ("--n", "--steps", "--batch-size") for value in NUMBERS],
    *[("--guidance", value) for value in ["-1", "", "nan", "inf", "1e9", "x"]],
    *[("--seed", value) for value in ["-1", "", "1.5", "9" * 40]], ("--digit", "-1"), ("--digit", "x"), ("--digit", ""),
])
def test_numbers_out_of_range_are_one_line(tmp_path, flag, value):
    assert_one_line(call(sample, "--out", tmp_path / "new", flag, value), 2, flag)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flags, words", [
    (["--sampler", "euler"], SAMPLERS), (["--device", "tpu"], ["auto", "cpu", "cuda", "mps"]),
    *[(["--guidance-interval", *values], ["--guidance-interval", "is not a number from 0"])
      for values in [["-1", "2"], ["1", "nan"], ["", "2"], ["1", "x"], ["inf", "2"], ["1", "2e9"]]],
    (["--guidance-interval", "1"], ["--guidance-interval", "expected 2 arguments"]),
    (["--sample", "ddim"], ["unrecognized arguments"]), (["7"], ["unrecognized arguments: 7"]),
    (["--n"], ["expected one"]),
])
def test_bad_usage_is_one_line(flags, words):
    assert_one_line(call(sample, *flags), 2, *words)


@pytest.mark.parametrize("flags, words", [
    (["--steps", 21], ["--steps 21", "20 timesteps"]), (["--digit", 10], ["0 to 9"]),
    (["--digit", 3, "--guidance", 0], ["--guidance 0 ignores labels"]),
    (["--guidance-interval", 30, 1.3], ["--guidance-interval 30 1.3 holds none", "widen it"]),
])
def test_what_this_model_cannot_do_is_one_line(tmp_path, flags, words):
    assert_one_line(call(sample, "--checkpoint", trained(), "--out", tmp_path, *flags), 2, *words)


def test_help_shows_the_defaults():
    result = call(sample, "--help")
    assert result.code == 0 and "default: 64" in result.out and "None" not in result.out


def a_pickle(path):
    torch.save({"x": subprocess.Popen}, path)


def cut(path):
    path.write_bytes(trained().read_bytes()[:10_000])


@pytest.mark.parametrize("make", [
    lambda path: None, cut, a_pickle, lambda path: path.mkdir(), lambda path: os.mkfifo(path),
    lambda path: path.write_bytes(b""), lambda path: path.write_text("hello"),
])
def test_a_bad_checkpoint_is_one_line_and_costs_nothing(tmp_path, make):
    make(tmp_path / "c.pt")
    (tmp_path / "grid.png").write_text("old")
    result = call(sample, "--checkpoint", tmp_path / "c.pt", "--out", tmp_path, "--npz", tmp_path / "x.npz")
    assert_one_line(result, 1, tmp_path / "c.pt")
    assert (tmp_path / "grid.png").read_text() == "old" and not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize("npz", [DEVICE, "folder", "file/x.npz"])
def test_arrays_that_cannot_be_written_are_one_line(tmp_path, npz):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    flags = ["--checkpoint", trained(), "--n", 2, "--steps", 1, "--out", tmp_path / "out", "--npz", tmp_path / npz]
    assert_one_line(call(sample, *flags), 1, npz.split("/x")[0])
    assert not (tmp_path / "out" / "grid.png").exists()  # found out before the work
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] + ["out"] * (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["grid.png", "process.gif", "x.npz"])
def test_what_cannot_be_written_is_found_out_before_the_work(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sample, "generate", lambda *args, **settings: pytest.fail("it drew"))
    (tmp_path / name).mkdir()
    flags = ["--checkpoint", trained(), "--gif", "--out", tmp_path, "--npz", tmp_path / "x.npz"]
    assert_one_line(call(sample, *flags), 1, tmp_path / name, "not a regular file")


def test_arrays_may_be_larger_than_the_memory(tmp_path):
    batch, labels = torch.arange(256, dtype=torch.uint8).repeat(49 * 23).view(-1, 28, 28)[:360], torch.arange(360) % 10
    with npz_writer(tmp_path / "x.npz", (100 * 360, 28, 28)) as write:
        tracemalloc.start()
        for _ in range(100):
            write(batch, labels)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 5e6                                                              # of 28 MB
    with np.load(tmp_path / "x.npz") as arrays:
        assert (arrays["images"].reshape(100, 360, 28, 28) == batch.numpy()).all()
        assert (arrays["labels"].reshape(100, 360) == labels.numpy()).all()


@pytest.mark.parametrize("function", ["write_array_header_1_0", "write_array"])
def test_arrays_that_break_off_leave_the_last_ones(tmp_path, monkeypatch, function):
    def full(file, *args):
        file.write(b"PK")
        raise OSError(28, "No space left on device")

    draw(tmp_path, "--n", 2, "--steps", 1)
    before = (tmp_path / "x.npz").read_bytes()
    monkeypatch.setattr(np.lib.format, function, full)
    flags = ["--n", 3, "--steps", 1, "--out", tmp_path, "--npz", tmp_path / "x.npz"]
    assert_one_line(call(sample, "--checkpoint", trained(), *flags), 1, "No space left on device")
    assert (tmp_path / "x.npz").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "x.npz"]


@pytest.mark.parametrize("out", ["file", "file/out"])
def test_an_out_that_cannot_be_written_is_one_line(tmp_path, out):
    (tmp_path / "file").touch()
    flags = ["--checkpoint", trained(), "--n", 2, "--steps", 1, "--out", tmp_path / out]
    assert_one_line(call(sample, *flags), 1, tmp_path)


def test_images_that_are_not_finite_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(BayesUNet, "forward", lambda self, x_t, t, labels=None: torch.full_like(x_t, torch.nan))
    result = call(sample, "--checkpoint", trained(), "--n", 2, "--out", tmp_path, "--npz", tmp_path / "x.npz")
    assert_one_line(result, 1, "NaN or infinite")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line(tmp_path):
    flags = ["--checkpoint", trained(), "--device", "cuda", "--out", tmp_path / "new"]
    assert_one_line(call(sample, *flags), 1, "--device cuda", "--device cpu")


# ----------------------------------------------------------------------------------------------------------------------
# As processes of their own

def test_the_command_itself(tmp_path):
    """From another folder, where its output then goes."""
    process = start("sample.py", "--checkpoint", trained(), "--n", 7, "--steps", 2, "--gif", cwd=tmp_path)
    out, err = process.communicate(timeout=900)
    assert (process.returncode, err) == (0, "")
    assert out.split() == [os.path.join("samples", "grid.png"), os.path.join("samples", "process.gif")]
    assert tiles(iio.imread(tmp_path / "samples" / "grid.png"), 7).std() > 0


def test_nothing_is_lost_because_the_reader_left(tmp_path, monkeypatch):
    """Of stdout, at the first line."""
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    flags = ["--n", 2, "--steps", 1, "--gif", "--out", tmp_path, "--npz", tmp_path / "x.npz", "--checkpoint", trained()]
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
    with contextlib.redirect_stdout(Gone()), contextlib.suppress(BrokenPipeError):
        sample.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "process.gif", "x.npz"]


def test_a_reader_that_leaves_is_no_traceback(tmp_path):
    process = start("sample.py", "--checkpoint", trained(), "--n", 1, "--steps", 1, "--out", tmp_path)
    process.stdout.close()
    process.wait(timeout=900)
    assert process.returncode in (0, 1) and process.stderr.read() == ""
    process.stderr.close()
    assert (tmp_path / "grid.png").exists()


@pytest.mark.skipif(not SHIPPED.exists(), reason="the shipped model is not there yet")
def test_the_shipped_model_draws_digits(tmp_path):
    """Mostly black, with strokes that are bright, as MNIST is: its grey levels' mean is 33, and four fifths are 0. A
    classifier reads them as asked for, and 0 to 255 stand for -1 to 1."""
    result = call(sample, "--n", 6, "--out", tmp_path, "--npz", tmp_path / "x.npz")
    assert result.code == 0, result.err
    with np.load(tmp_path / "x.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    assert 20 < images.mean() < 50 and (images == 0).mean() > 0.7 and (images > 200).mean() > 0.04
    assert (make_grid(torch.from_numpy(images)[:, None]) > 200).any()
    _, probabilities = classify(load_classifier(), torch.from_numpy(images)[:, None])
    assert probabilities.argmax(dim=1).tolist() == labels.tolist() and probabilities.amax(dim=1).min() > 0.9
    (_, process), = generate(load_model(), 6)
    *_, (_, x, _) = process
    assert (images == ((x[:, 0].numpy() + 1) * 127.5).round().clip(0, 255)).all()


def test_a_reader_that_leaves_is_exit_code_1(tmp_path):
    process = start("sample.py", "--checkpoint", trained(), "--n", 1, "--steps", 1, "--out", tmp_path)
    process.stdout.close()
    process.wait(timeout=900)
    with process.stderr as stderr:
        assert (process.returncode, stderr.read()) == (1, "") and (tmp_path / "grid.png").exists()
