"""Writes a model as a torch.export program, which runs without this project: python -m utils.export --out model.pt2.

    model = torch.export.load("model.pt2").module()
    noise = model(x_t, t, labels)  # float [B, C, H, W], int64 [B], int64 [B]

x_t, t and noise are as defined in ddpm.py. A label that is the number of classes is "no label", so that one
can guide by the label: model(x_t, t, none) + g * (model(x_t, t, labels) - model(x_t, t, none)).
"""
import torch
from torch import nn

from utils.checkpoint import load_model, save_checkpoint
from utils.cli import Parser, path, run
from utils.files import atomic_write, check_target
from utils.settings import SHIPPED


class Prediction(nn.Module):
    """What a model sees as noise, as a module."""

    def __init__(self, model):
        super().__init__()
        self.network, self.model = model.network, model

    def forward(self, x_t, t, labels):
        """float [B, C, H, W], LongTensor [B] in 0..T-1, LongTensor [B] in 0..classes -> noise, shaped like x_t."""
        return self.model(x_t, t, labels)


def export_program(model):
    """A Model as a torch.export.ExportedProgram, for batches of any size."""
    settings = model.settings
    x_t = torch.zeros(2, settings["image_channels"], settings["image_size"], settings["image_size"])
    t, labels = torch.zeros(2, 2, dtype=torch.long)
    prediction = Prediction(model).eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    prediction(x_t, t, labels)  # makes the tables of the process, which are constants of the program
    batch = {0: torch.export.Dim("batch")}
    return torch.export.export(prediction, (x_t, t, labels), dynamic_shapes=(batch, batch, batch))


def for_sampling(source, target):
    """Writes what sampling needs of a checkpoint: EMA weights in half precision, last and early, settings and step.
    This made the model in assets/:
    python -c "from utils.export import for_sampling as f; f('runs/mnist/checkpoint.pt', 'mnist.pt')".

    Raises:
        FileNotFoundError, ValueError: as load_model.
    """
    def halved(network):
        return {name: value.half() if value.is_floating_point() else value
                for name, value in network.state_dict().items()}

    model = load_model(source)
    save_checkpoint(target, {"settings": model.settings, "step": model.steps, "ema": halved(model.network),
                             "early": model.early and halved(model.early)})


def parse_flags():
    """The command line as a namespace."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", type=path, default=SHIPPED, metavar="FILE", help="the trained model")
    parser.add_argument("--no-ema", dest="ema", action="store_false",
                        help="the raw weights instead of their moving average")
    parser.add_argument("--out", type=path, default="model.pt2", metavar="FILE", help="where the program goes")
    return parser.parse_args()


def main():
    flags = parse_flags()
    check_target(flags.out)
    program = export_program(load_model(flags.checkpoint, ema=flags.ema))
    with atomic_write(flags.out) as file:
        torch.export.save(program, file)
    print(flags.out)


if __name__ == "__main__":
    run(main)
