"""Which module knows which, what a change costs, and whether the README's example runs; in processes of their own."""
import ast
import json
import os
import re
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest

import mutants
from helpers import ROOT

MATHEMATICS = ["diffusion_schedules", "ddpm", "diffusion_model"]  # from the ground up
FOUNDATIONS = {"utils", "utils.ranks", "utils.files", "utils.cli", "utils.data"}  # which know nobody above them
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
         for folder in (ROOT, ROOT / "utils") for path in folder.glob("*.py")}
UTILS = {name for name in FILES if name.split(".")[0] == "utils"}


def below(name):
    """The modules that a module may import, itself or by others. What is neither mathematics nor in utils is a command.
    """
    if name in MATHEMATICS:
        return set(MATHEMATICS[:MATHEMATICS.index(name)])
    if name in FOUNDATIONS:
        return FOUNDATIONS - {name}
    return {*MATHEMATICS, *UTILS} - {name} | ({"sample"} if name in ("train", "evaluate") else set())


@pytest.fixture(scope="module")
def session():
    """A session at Python's prompt, once it has imported each module, anew: what it printed, what was typed there
    included, and its errors. First comes: module -> what else of ours is in sys.modules once it is imported; and the
    packages that all of them load."""
    code = """if True:
        import importlib, json, sys
        names, made = sys.argv[1:], {}
        for name in names:
            for other in names:
                sys.modules.pop(other, None)
            importlib.import_module(name)
            made[name] = [other for other in names if other in sys.modules and other != name]
        print(json.dumps([made, [name for name in sys.modules if "." not in name]]))
    """
    typed = "raise KeyboardInterrupt\nprint(6 * 7)\n"
    return subprocess.run([sys.executable, "-W", "error", "-i", "-c", code, *FILES], input=typed, cwd=ROOT,
                          capture_output=True, text=True)


def test_importing_a_module_loads_only_what_is_below_it(session):
    assert session.stdout.startswith("["), session.stderr
    modules, packages = json.loads(session.stdout.splitlines()[0])
    assert modules["ddpm"] == ["diffusion_schedules"] and modules["diffusion_schedules"] == []
    assert not {"diffusion_model", "utils.settings"} & set(modules["utils.data"])
    assert {name: set(others) - below(name) for name, others in modules.items()} == dict.fromkeys(FILES, set())
    # These take long to import, and are for those who need them.
    assert not {"matplotlib", "torchvision", "imageio", "diffusers", "scipy"} & set(packages)


def test_imports_go_downwards_only():
    """Those inside functions too, which importing does not show; and nowhere in a circle."""
    imports = {}
    for name, path in FILES.items():
        imports[name] = set()
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                imports[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = ".".join(filter(None, ["utils" if node.level else None, node.module]))
                imports[name] |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        imports[name] = {other for other in imports[name] if other in FILES and other != name}
    assert imports["ddpm"] == {"diffusion_schedules"} and {"sample", "utils.settings"} < imports["train"]
    reached = {}
    for name in FILES:
        reached[name], new = set(), imports[name]
        while new:
            reached[name] |= new
            new = set().union(*(imports[other] for other in new)) - reached[name]
    assert {name: others - below(name) for name, others in reached.items()} == dict.fromkeys(FILES, set())


def test_ctrl_c_at_the_prompt_does_not_end_python(session):
    """Whoever imports a part of this into a session of their own keeps the session."""
    assert session.returncode == 0 and session.stdout.splitlines()[1:] == ["42"], session.stderr


# ----------------------------------------------------------------------------------------------------------------------
# What a change costs: one row each, as if it stood in its file, and nothing anywhere else

ROWS = """if True:
    import json, sys
    import torch
    import ddpm, diffusion_model, diffusion_schedules
    from utils import data

    class Plain(torch.nn.Module):
        def __init__(self, image_size, image_channels, classes, width, depth):
            super().__init__()
            self.first = torch.nn.Conv2d(image_channels, width, 3, padding=1)
            self.label = torch.nn.Embedding(classes + 1, width)
            self.last = torch.nn.Conv2d(width, image_channels, 3, padding=1)

        def forward(self, x_t, t, labels=None):
            labels = torch.full_like(t, self.label.num_embeddings - 1) if labels is None else labels
            return self.last((self.first(x_t) + (self.label(labels) + t[:, None] / 1000)[:, :, None, None]).relu())

    def blots(root, train):
        pictures = torch.randint(0, 256, (60, 3, 10, 10), dtype=torch.uint8)
        return pictures, torch.arange(60) % 4

    ddpm.SAMPLERS["halves"] = ddpm.Sampler(lambda x, x0_hat, a_t, a_s, before, noise_fn: (x + x0_hat) / 2, "logsnr", 3)
    ddpm.WEIGHTINGS["late"] = (lambda alpha_bars: 1.1 - alpha_bars, lambda alpha_bars: alpha_bars ** -0.3)
    diffusion_schedules.SCHEDULES["steep"] = lambda T: torch.linspace(1e-3, 0.3, T)
    diffusion_model.NETWORKS["plain"] = Plain
    data.DATASETS["blots"] = blots

    import sample, train
    from utils import pictures, settings
    from utils.cli import number
    settings.SETTINGS["flip"] = settings.Setting(0.25, number(0, 1), "share of the images that are mirrored")
    sys.path.insert(0, "tests")
    from helpers import call
    pictures.plot_losses = lambda *args: None

    out, made = sys.argv[1], []
    new = ["--dataset", "blots", "--network", "plain", "--schedule", "steep", "--weighting", "late", "--width", 8,
           "--flip", 0.5, "--timesteps", 30, "--batch-size", 8, "--device", "cpu", "--out", out]
    drawn = ["--checkpoint", out + "/checkpoint.pt", "--sampler", "halves", "--n", 5, "--guidance", 2, "--gif"]
    for module, *flags in ([train, *new, "--max-steps", 3], [train, *new, "--max-steps", 6, "--resume"],
                           [train, "--out", out, "--max-steps", 7, "--resume", "--flip", 0.6],
                           [sample, *drawn, "--out", out, "--npz", out + "/x.npz"], [train, "--help"]):
        result = call(module, *flags)
        made.append([result.code, result.out, result.err])
    print(json.dumps(made))
"""


def test_a_row_is_all_it_takes(tmp_path):
    """A sampler, a schedule, a weighting, a network, a data set and a setting, of which nothing else has heard: they
    are flags, train, resume, are kept in the checkpoint, and draw."""
    result = subprocess.run([sys.executable, "-W", "error", "-c", ROWS, str(tmp_path)], cwd=ROOT, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    started, resumed, changed, drawn, helped = json.loads(result.stdout)
    assert started[0] == resumed[0] == drawn[0] == helped[0] == 0, [started[2], resumed[2], drawn[2]]
    assert changed[0] == 1 and "--flip 0.6 differs from the 0.5 of the run" in changed[2]
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings.items() >= {"dataset": "blots", "network": "plain", "schedule": "steep", "weighting": "late",
                                "flip": 0.5, "image_channels": 3, "image_size": 10, "classes": 4}.items()
    with open(tmp_path / "x.npz", "rb") as file:
        arrays = np.load(file)
        assert arrays["images"].shape == (5, 3, 10, 10) and set(arrays["labels"]) <= set(range(4))
    for word in "blots", "plain", "steep", "late", "--flip", "mirrored (default: 0.25)":
        assert word in " ".join(helped[1].split())


def test_the_readmes_example_draws_its_picture(tmp_path):
    """The forward process of one digit, to the pixel."""
    example, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", example], cwd=tmp_path, env=environment, check=True)
    drawn, shown = (iio.imread(folder / "forward.png") for folder in (tmp_path / "samples", ROOT / "assets"))
    assert drawn.shape == shown.shape and (drawn == shown).all()


def test_the_mutants_written_by_hand_still_apply():
    """Or the tool that makes them would not start."""
    for line in mutants.BY_HAND:
        if line.startswith("["):
            tree = ast.parse((ROOT / f"{line.strip('[]')}.py").read_text(encoding="utf-8"))
        else:
            _, function, old, *_ = line.split(" | ")
            for part in old.split(" && "):
                assert mutants.find(tree, function, part)
