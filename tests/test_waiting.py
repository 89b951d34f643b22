"""Whether anything waits for a GPU: in a step of training or of sampling nothing may come back from it."""
import contextlib
import sys
from unittest import mock

import pytest
import torch

import fake_device
import train
from ddpm import SAMPLERS
from fake_device import Elsewhere, pretend
from helpers import call, few_digits, trained
from sample import generate
from utils.checkpoint import load_checkpoint, load_model, save_checkpoint

QUESTIONS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero", "aten::equal",
             "aten::unique_dim", "aten::_unique2", "aten::bincount", "aten::repeat_interleave"}


class Watched(fake_device.Pretend):
    """The pretended device, which notes what goes to it or comes from it, and whether somebody waits for it: "copy",
    "copy that waits" or "question"."""
    seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.pin_memory:
            pinned = super().__torch_function__(function, types, args, kwargs).clone()
            pinned.is_pinned_here = True
            return pinned
        if function is torch.Tensor.to:
            device, _, non_blocking, _ = torch._C._nn._parse_to(*args[1:], **kwargs)
            # clip_grad_norm_ asks C++ for the device of the gradients, which says that it is the CPU
            if device and device.type != args[0].device.type and "clip_grad" not in sys._getframe(1).f_code.co_filename:
                self.note_copy(args[0], non_blocking)
        elif function is torch.Tensor.cpu and isinstance(args[0], Elsewhere):
            self.seen.append("copy that waits")
        elif function in (torch.Tensor.tolist, torch.Tensor.__contains__) and isinstance(args[0], Elsewhere):
            self.seen.append("question")
        elif function in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") not in (None, "cpu"):
            self.seen.append("copy that waits")
        return super().__torch_function__(function, types, args, kwargs)

    @classmethod
    def note_copy(cls, x, non_blocking):
        cls.seen.append("copy" if non_blocking and getattr(x, "is_pinned_here", False) else "copy that waits")


@contextlib.contextmanager
def watched():
    """pretend("cuda"), in which Watched.seen grows. Yields the device."""
    dispatch = Elsewhere.__torch_dispatch__.__func__

    def noted(cls, function, types, args=(), kwargs=None):
        name = function._schema.name
        indices = [x for x in args[1] if x is not None] if name in ("aten::index", "aten::index_put_") else []
        if name in QUESTIONS or any(x.dtype == torch.bool for x in indices):
            Watched.seen.append("question")
        elif name == "aten::copy_" and type(args[0]) is not type(args[1]) and args[1].ndim:
            Watched.note_copy(args[1], len(args) > 2 and args[2])  # x[0] = 1 is none: numbers travel with the operation
        elif any(type(x) is not Elsewhere and x.ndim for x in indices):
            Watched.seen.append("copy that waits")
        return dispatch(cls, function, types, args, kwargs)

    with mock.patch.object(fake_device, "Pretend", Watched), mock.patch.object(Watched, "seen", []), \
            mock.patch.object(Elsewhere, "__torch_dispatch__", classmethod(noted)), pretend("cuda") as home:
        yield home


NOTICED = {
    "to": (lambda x, home: torch.ones(2).to(home), ["copy that waits"]),
    "to, not pinned": (lambda x, home: torch.ones(2).to(home, non_blocking=True), ["copy that waits"]),
    "to, pinned": (lambda x, home: torch.ones(2).pin_memory().to(home), ["copy that waits"]),
    "as it should be": (lambda x, home: torch.ones(2).pin_memory().to(home, non_blocking=True), ["copy"]),
    "back": (lambda x, home: x.to("cpu", non_blocking=True), ["copy that waits"]),
    "cpu": (lambda x, home: x.cpu(), ["copy that waits"]),
    "tensor": (lambda x, home: torch.tensor([1, 2], device=home), ["copy that waits"]),
    "copy_": (lambda x, home: x.copy_(torch.zeros(2)), ["copy that waits"]),
    "an index": (lambda x, home: x[torch.tensor([1])], ["copy that waits"]),
    "item": (lambda x, home: x.sum().item(), ["question"]), "tolist": (lambda x, home: x.tolist(), ["question"]),
    "bool": (lambda x, home: bool((x > 0).all()), ["question"]), "float": (lambda x, home: float(x[0]), ["question"]),
    "nonzero": (lambda x, home: x.nonzero(), ["question"]), "a mask": (lambda x, home: x[x > 0], ["question"]),
    "nothing": (lambda x, home: torch.zeros(2, device=home) + x[torch.arange(2, device=home)] * 2, []),
}


@pytest.mark.parametrize("action, noted", NOTICED.values(), ids=NOTICED)
def test_what_is_waited_for_is_noticed(action, noted):
    with watched() as home:
        x = torch.ones(2, device=home)
        Watched.seen.clear()
        action(x, home)
        assert Watched.seen == noted


def traffic(first, last, tmp_path, monkeypatch, draw_batch=train.draw_batch, **changed):
    """What is noted in each of these steps of a run, which goes on from step 120 unless that is `changed`."""
    begins = {}
    save_checkpoint(tmp_path / "checkpoint.pt", load_checkpoint(trained()) | changed)
    monkeypatch.setattr(train, "draw_batch", lambda step, *args: begins.update({step: len(Watched.seen)})
                        or draw_batch(step, *args))
    with few_digits(), watched():
        flags = ["--out", tmp_path, "--resume", "--epochs", 5000, "--max-steps", last + 2]
        result = call(train, *flags, "--device", "cuda")
        assert result.code == 0, result.err
        return [Watched.seen[begins[step]:begins[step + 1]] for step in range(first, last + 1)]


def test_a_step_of_training_waits_for_nothing(tmp_path, monkeypatch):
    """Between reports: the numbers of its images go to the GPU, and nothing else goes there or comes back. This run has
    a point of its curve every 512 steps."""
    steps = traffic(20_004, 20_011, tmp_path, monkeypatch, step=20_000, curve=[[512 * k, 0.5] for k in range(1, 40)],
                    since_report={"steps": 20_000, "seconds": 1.0, "sums": [1.0, 1.0, 0.0]})
    assert steps == 8 * [["copy"]]


def test_a_young_run_asks_for_its_loss_every_other_step(tmp_path, monkeypatch):
    """For its curve, which is to have 40 points or more; the longer it is, the more rarely."""
    steps = traffic(123, 126, tmp_path, monkeypatch)
    assert steps in (2 * [["copy"], ["copy", "question"]], 2 * [["copy", "question"], ["copy"]])


def test_a_copy_that_is_added_to_a_step_is_noticed(tmp_path, monkeypatch):
    def draw_batch(step, images, *args, draw_batch=train.draw_batch):
        torch.ones(3).to(images.device)
        return draw_batch(step, images, *args)

    assert traffic(123, 123, tmp_path, monkeypatch, draw_batch)[0][:2] == ["copy that waits", "copy"]


@pytest.mark.parametrize("settings", [{"guidance": 1}, {"guidance": 0}, {"guidance": 2, "guidance_interval": (0, 1e9)},
                                      {"guidance": 2, "guidance_interval": (0.5, 5)}], ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_of_sampling_waits_for_nothing(sampler, settings):
    """The noise of stochastic samplers comes from the CPU, in one copy; the others have nothing to wait for. From the
    second step on, when the tables are there."""
    checkpoint = trained()
    with watched() as home:
        model = load_model(checkpoint, home)
        for labels, process in generate(model, 5, sampler=sampler, steps=5, batch_size=3, **settings):
            next(process)
            for step in range(4):
                Watched.seen.clear()
                next(process)
                assert Watched.seen == (["copy"] if sampler in ("ddpm", "dpm++sde") and step < 3 else [])
