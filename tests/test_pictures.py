"""Pictures in files: grids, GIFs and plots, read back from theirs; and a folder of images."""
import io

import imageio.v3 as iio
import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageSequence

from utils import pictures
from utils.checkpoint import COLUMNS
from utils.data import load_dataset
from utils.pictures import (GIF_FRAMES, GIF_LEVELS, fit_picture, gif_frames, make_grid, plot_losses, plot_sweep,
                            read_folder, read_picture, save_gif, save_png, upscale)


def random_images(*shape, low=0):
    return torch.randint(low, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ----------------------------------------------------------------------------------------------------------------------
# Grids

@pytest.mark.parametrize("n, columns, rows_columns", [
    (1, None, (1, 1)), (2, None, (1, 2)), (7, None, (3, 3)), (64, None, (8, 8)), (65, None, (8, 9)), (7, 7, (1, 7)),
    (7, 2, (4, 2)),
])
@pytest.mark.parametrize("channels", [1, 3])
def test_grid_layout(n, columns, rows_columns, channels):
    rows, columns_made = rows_columns
    images = random_images(n, channels, 5, 4, low=100)
    grid = make_grid(images, columns)
    assert grid.dtype == np.uint8
    assert grid.shape == (rows * 7 + 2, columns_made * 6 + 2) + ((3,) if channels == 3 else ())
    canvas = grid if channels == 3 else grid[..., None]
    for i in range(n):
        top, left = 2 + i // columns_made * 7, 2 + i % columns_made * 6
        tile = canvas[top:top + 5, left:left + 4].copy()
        assert (tile.transpose(2, 0, 1) == images[i].numpy()).all()
        canvas[top:top + 5, left:left + 4] = 48
    assert (canvas == 48).all()  # nothing but the lines, and the places that are left over


def test_padding_may_be_none():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
    assert make_grid(images, columns=3, padding=0).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_upscale_repeats_pixels():
    assert upscale(np.array([[1, 2], [3, 4]]), 2).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert upscale(np.zeros((2, 5, 3)), 3).shape == (6, 15, 3)


def test_an_image_comes_back_from_a_png_pixel_by_pixel(tmp_path):
    images = random_images(7, 1, 28, 28)
    save_png(tmp_path / "grid.png", upscale(make_grid(images), 2))
    picture = iio.imread(tmp_path / "grid.png")
    assert picture.shape == (2 * 92, 2 * 92) and picture.dtype == np.uint8
    for i in range(7):
        top, left = 2 + i // 3 * 30, 2 + i % 3 * 30
        for offset in (0, 1):
            assert (picture[offset::2, offset::2][top:top + 28, left:left + 28] == images[i, 0].numpy()).all()


def test_a_colour_png_keeps_its_colours(tmp_path):
    picture = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    save_png(tmp_path / "colour.png", picture)
    assert (iio.imread(tmp_path / "colour.png") == picture).all()


# ----------------------------------------------------------------------------------------------------------------------
# GIFs

def read_gif(path):
    """The frames [H, W, 3] and durations in milliseconds of a GIF, and how often it loops (0: for ever)."""
    with Image.open(path) as pictures:
        frames, durations = zip(*((np.array(frame.convert("RGB")), frame.info["duration"])
                                  for frame in ImageSequence.Iterator(pictures)))
        return frames, list(durations), pictures.info["loop"]


def test_a_gif_has_its_frames_and_rests_on_the_last(tmp_path):
    """Each pixel of the nearest of a few grey levels, evenly spaced from black to white."""
    frames = list(random_images(5, 64, 48).numpy())  # of a size that has all grey levels in it
    save_gif(tmp_path / "x.gif", frames, frame_ms=40, rest_ms=1500)
    read, times, loop = read_gif(tmp_path / "x.gif")
    assert times == [40, 40, 40, 40, 1500] and loop == 0
    levels = np.linspace(0, 255, GIF_LEVELS)
    for frame, expected in zip(read, frames, strict=True):
        nearest = levels[np.abs(expected[..., None] - levels).argmin(axis=-1)].round()
        assert (frame == nearest[..., None]).all()


def test_a_gif_in_colour(tmp_path):
    """A red frame and a blue one."""
    frames = np.zeros((2, 6, 8, 3), dtype=np.uint8)
    frames[0, ..., 0] = frames[1, ..., 2] = 255
    save_gif(tmp_path / "x.gif", list(frames), frame_ms=40, rest_ms=1500)
    read, times, _ = read_gif(tmp_path / "x.gif")
    assert (np.stack(read) == frames).all() and times == [40, 1500]


def test_gif_durations_are_milliseconds(tmp_path):
    """imageio 2 counted in seconds."""
    save_gif(tmp_path / "x.gif", [np.full((6, 8), 80 * i, dtype=np.uint8) for i in range(3)])
    _, (first, second, last), _ = read_gif(tmp_path / "x.gif")
    assert first == second and 20 <= first <= 200 and 1000 <= last <= 5000


def test_a_gif_in_which_nothing_moves_takes_its_time(tmp_path):
    """Equal frames may become one, as long as the time stays."""
    still, moved = np.zeros((6, 8), dtype=np.uint8), np.full((6, 8), 90, dtype=np.uint8)
    save_gif(tmp_path / "x.gif", [still, still, still, moved, moved], frame_ms=50, rest_ms=1000)
    _, times, _ = read_gif(tmp_path / "x.gif")
    assert sum(times) == 4 * 50 + 1000


def test_a_gif_of_one_frame(tmp_path):
    save_gif(tmp_path / "x.gif", [np.full((6, 8), 255, dtype=np.uint8)], rest_ms=1700)
    (frame,), times, _ = read_gif(tmp_path / "x.gif")
    assert (frame == 255).all() and times == [1700]


def test_the_frames_of_a_gif_are_even_in_the_share_of_signal():
    """From one state to the next on a straight line, in equal steps of sqrt(alpha_bar)."""
    states = [torch.full((2, 1, 1, 1), level, dtype=torch.uint8) for level in (0, 100, 200)]
    levels = [int(frame[0]) for frame in gif_frames(states, [0.0, 0.8, 1.0])]
    assert len(levels) == GIF_FRAMES and levels[0] == 0 and levels[-1] == 200
    for k, level in enumerate(levels):
        u = k / (GIF_FRAMES - 1)
        assert abs(level - (u / 0.8 * 100 if u < 0.8 else 100 + (u - 0.8) / 0.2 * 100)) < 0.51  # rounded, not cut down


# ----------------------------------------------------------------------------------------------------------------------
# Plots

def history_of(steps):
    return [{name: 10.0 ** -k for k, name in enumerate(COLUMNS)} | {"step": step} for step in steps]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were to be saved, each drawn as it would be, in a list that grows."""
    figures = []

    def draw(figure, file, **kwargs):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        figures.append((figure, canvas.get_renderer()))

    monkeypatch.setattr(Figure, "savefig", draw)
    return figures


def x_labels(axes, renderer):
    """The labels of the x axis as drawn, in order: pairs of a text and its extent (left, bottom, right, top)."""
    low, high = axes.get_xlim()
    ticks = [tick for which in (axes.xaxis.get_major_ticks(), axes.xaxis.get_minor_ticks()) for tick in which
             if low <= tick.get_loc() <= high and tick.label1.get_visible() and tick.label1.get_text()]
    return sorted(((tick.label1.get_text(), tick.label1.get_window_extent(renderer).extents) for tick in ticks),
                  key=lambda label: label[1][0])


@pytest.mark.parametrize("steps", [
    range(2000, 42_001, 2000), [*range(2000, 42_001, 2000), 42_188], [21_094, 42_188], [42_188], [1, 2],
    range(50, 201, 50), [500_000, 10_000_000],
], ids=lambda steps: f"{len(steps)} to {steps[-1]}")
def test_the_steps_below_a_plot_of_losses_do_not_run_into_each_other(drawn, steps):
    last = steps[-1]
    plot_losses(io.BytesIO(), history_of(steps), [[max(1, k * last // 60), 1 / k] for k in range(1, 61)])
    (figure, renderer), = drawn
    left, right = (x_labels(axes, renderer) for axes in figure.axes)
    for labels in left, right:
        assert 1 <= len(labels) <= 6
        assert len({text for text, _ in labels}) == len(labels)  # whole steps, or two would have one name
        assert all(text.replace(",", "").isdigit() for text, _ in labels)
        assert last < 1000 or any("," in text for text, _ in labels)
    extents = [extent for _, extent in left + right]
    assert all(b[0] - a[2] > 3 for a, b in zip(extents, extents[1:])), (left, right)  # pixels apart
    assert figure.bbox.x0 <= extents[0][0] and extents[-1][2] <= figure.bbox.x1  # and none is cut off


def test_a_plot_of_losses_shows_what_its_legends_say(drawn):
    """Left the training loss by its curve and the validation's by the reports; right the latter by quarter of t."""
    history = [{name: 10 * k + row for k, name in enumerate(COLUMNS)} for row in (1, 2)]
    plot_losses(io.BytesIO(), history, [[1, 5.0], [2, 4.0], [3, 3.0]])
    (figure, _), = drawn
    left, right = ({line.get_label().split()[0]: line.get_xydata().tolist() for line in axes.get_lines()}
                   for axes in figure.axes)
    shown = {name: [[row["step"], row[name]] for row in history] for name in COLUMNS}
    assert left == {"training": [[1, 5], [2, 4], [3, 3]], "validation": shown["validation_loss"]}
    assert right == {name: shown[f"validation_loss_q{i}"]
                     for i, name in enumerate(("first", "second", "third", "last:"), 1)}
    for axes, lines in zip(figure.axes, (left, right)):
        assert [text.get_text().split()[0] for text in axes.get_legend().get_texts()] == list(lines)


ROWS = [{"sampler": sampler, "steps": calls, "guidance": guidance, "calls": calls, "frechet": 1 / calls,
         "precision": 0.9, "recall": calls / 20}
        for sampler in ("ddim", "dpm++") for calls, guidance in ((5, 0.5), (10, 2.0), (20, 1.0))]


def test_a_plot_of_a_sweep_shows_its_rows(tmp_path, drawn):
    """Left by calls of the network, right by guidance, in its order; and right nothing if there is none."""
    for by_guidance in ROWS[3:], []:
        plot_sweep(tmp_path / "sweep.png", ROWS, by_guidance, {"frechet": 0.01}, 1000)
    lines, without = ([{line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
                       for axes in figure.axes] for figure, _ in drawn)
    real = {"real digits": [[0, 0.01], [1, 0.01]]}
    assert lines[0] == {"ddim": [[5, 0.2], [10, 0.1], [20, 0.05]], "dpm++": [[5, 0.2], [10, 0.1], [20, 0.05]]} | real
    assert lines[1] == {"dpm++, 5 steps": [[0.5, 0.2], [1, 0.05], [2, 0.1]]} | real
    assert lines[2] == {"precision": [[0.5, 0.9], [1, 0.9], [2, 0.9]], "recall": [[0.5, 0.25], [1, 1], [2, 0.5]]}
    assert without == [lines[0], real, {}]


def losses(path):
    with open(path, "wb") as file:
        plot_losses(file, history_of([1, 2]), [[1, 2.0], [2, 1.0]])


def sweep(path):
    plot_sweep(path, ROWS, ROWS, {"frechet": 0.01}, 1000)


@pytest.mark.parametrize("plot", [losses, sweep])
def test_a_plot_does_not_depend_on_what_the_user_has_set_and_leaves_it(tmp_path, plot):
    """In a matplotlibrc, or in a notebook."""
    users = {"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 20}
    plot(tmp_path / "a.png")
    assert iio.imread(tmp_path / "a.png").std() > 0
    with matplotlib.rc_context(users):
        plot(tmp_path / "b.png")
        assert {name: matplotlib.rcParams[name] for name in users} == users
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# Pictures in

@pytest.mark.parametrize("h, w, middle", [(12, 8, np.s_[..., 2:10, :]), (8, 11, np.s_[..., 1:9])])
def test_the_middle_of_a_picture(h, w, middle, capsys):
    """In colour for a model of colours, of which then nothing is said."""
    picture = random_images(3, h, w)[None]
    assert torch.equal(fit_picture(picture, 3, 8, "x.png"), picture[middle])
    assert capsys.readouterr().err == f"x.png: the middle of {w}x{h} pixels, made 8x8\n"
    assert torch.equal(fit_picture(picture[middle], 3, 8, "x.png"), picture[middle]) and not capsys.readouterr().err
    white = torch.full_like(picture, 255)
    assert (fit_picture(white, 1, 5, "x.png") == 255).all()  # and not 0, one level further


def test_a_folder_of_pngs_is_read_in_the_order_of_names(tmp_path):
    images = load_dataset("MNIST")[0][:3]
    for name, image in zip(("b.png", "c.png", "a.png"), images):
        iio.imwrite(tmp_path / name, image[0].numpy())
    iio.imwrite(tmp_path / "b.png", images[0, 0].numpy()[:, :, None].repeat(3, 2))  # as RGB it is grey too
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "._a.png").write_bytes(b"what a Mac leaves beside a.png")
    (tmp_path / "folder.png").mkdir()
    assert torch.equal(read_folder(tmp_path), images[[2, 0, 1]])


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} is a folder without PNGs"):
        read_folder(tmp_path)
    colour = np.zeros((28, 28, 3), np.uint8)
    colour[3, 3, 1] = 1
    for name, picture in ("colour.png", colour), ("large.png", np.zeros((32, 32), np.uint8)):
        iio.imwrite(tmp_path / name, picture)
        with pytest.raises(ValueError, match=f"{name} is not a grey picture of 28x28"):
            read_folder(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="broken.png is not a picture"):
        read_folder(tmp_path)


def test_a_report_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError("no space left on device")

    (tmp_path / "samples").mkdir()
    history = [dict.fromkeys(COLUMNS, 1)]
    written = [tmp_path / "metrics.csv", tmp_path / "loss.png", tmp_path / "samples" / "step_0000001.png"]
    pictures.write_report(tmp_path, history, [[1, 1.0], [2, 0.5]], lambda: random_images(4, 1, 8, 8))
    before = [path.read_bytes() for path in written]
    for name in "write_csv", "plot_losses", "upscale":
        monkeypatch.setattr(pictures, name, fails)
    pictures.write_report(tmp_path, history, [[1, 1.0], [2, 0.5]], lambda: random_images(4, 1, 8, 8))
    assert [path.read_bytes() for path in written] == before


def test_colours_count_as_the_eye_sees_them_and_pixels_by_their_area():
    for k, grey in enumerate((76, 150, 29)):  # 255 times the weights of ITU-R BT.601: 0.299, 0.587, 0.114
        picture = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        picture[:, k] = 255
        assert (fit_picture(picture, 1, 8, "x.png") == grey).all()
    stripes = torch.zeros(1, 3, 12, 12, dtype=torch.uint8)
    stripes[..., ::3] = 240
    assert (fit_picture(stripes, 1, 4, "x.png") == 80).all()


def test_a_picture_of_a_format_that_is_not_ours_is_not_opened(tmp_path):
    """Pillow knows more of them, and runs programs for some."""
    Image.new("L", (28, 28)).save(tmp_path / "x.png", "PCX")
    with pytest.raises(ValueError, match="x.png is not a picture"):
        pictures.read_picture(tmp_path / "x.png")


def test_pictures_are_upright_and_on_white(tmp_path):
    """As utils.images has them for training."""
    pixels = random_images(8, 12, 3).numpy()
    words, clear = Image.Exif(), Image.fromarray(pixels)
    words[0x0112] = 6  # to be turned to the right
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=words)
    assert (read_picture(tmp_path / "turned.png")[0].permute(1, 2, 0).numpy() == np.rot90(pixels, -1)).all()
    seen = random_images(8, 12, low=0).numpy() > 127
    clear.putalpha(Image.fromarray(seen.astype(np.uint8) * 255))
    clear.save(tmp_path / "clear.png")
    expected = np.where(seen[..., None], pixels, 255)
    assert (read_picture(tmp_path / "clear.png")[0].permute(1, 2, 0).numpy() == expected).all()
