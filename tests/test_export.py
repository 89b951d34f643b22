"""A model leaves the house as a torch.export program, and says the same there."""
import pytest
import torch

from helpers import assert_one_line, call, trained
from utils import export
from utils.checkpoint import load_model

export.__name__ = "export"  # as helpers.call names it: export.py


def test_the_program_agrees_with_the_model(tmp_path):
    """For batches of any size, with labels and without."""
    assert call(export, "--checkpoint", trained(), "--out", tmp_path / "model.pt2").out == f"{tmp_path / 'model.pt2'}\n"
    program, model = torch.export.load(tmp_path / "model.pt2").module(), load_model(trained())
    generator = torch.Generator().manual_seed(0)
    for size in 1, 2, 5:
        x_t, t = torch.randn(size, 1, 28, 28, generator=generator), torch.randint(0, 20, (size,), generator=generator)
        labels = torch.randint(0, 11, (size,), generator=generator)
        with torch.no_grad():
            torch.testing.assert_close(program(x_t, t, labels), model(x_t, t, labels), rtol=1e-5, atol=1e-5)
            nothing = torch.full_like(t, 10)
            torch.testing.assert_close(program(x_t, t, nothing), model(x_t, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flags, code, words", [
    (["--checkpoint", "missing.pt"], 1, ["missing.pt"]), (["--no-ema"], 1, ["raw weights"]),
    (["--out", "."], 1, ["not a regular file"]), (["--out", ""], 2, ["--out"])])
def test_what_cannot_be_exported_is_one_line(tmp_path, monkeypatch, flags, code, words):
    monkeypatch.chdir(tmp_path)
    assert_one_line(call(export, *flags), code, *words)
    assert not list(tmp_path.iterdir())
