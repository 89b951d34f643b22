"""Files in, files out: atomic writes, checkpoints that are data and never code, models rebuilt from them."""
import contextlib
import dataclasses
import glob
import io
import os
import pickle
import pickletools
import reprlib
import warnings
import zipfile
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None

from ddpm import DDPM
from diffusion_model import UNet
from diffusion_schedules import SCHEDULES, make_betas

VERSION = 1
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# All that the pickle in a checkpoint names. torch.load executes nothing either, but it knows more names than these, and
# some of them allocate whatever they are told to: bytearray(10**12).
NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2",
         *(f"torch {kind}Storage" for kind in ("Half", "BFloat16", "Float", "Double", "Long"))}
SHIPPED = Path(__file__).resolve().parent / "assets" / "mnist.pt"


def check_target(path):
    """Finds out, before any work is done, whether a file could be written to `path`; makes its folder if need be.

    Raises:
        OSError: its folder cannot be made, or no file in it.
        ValueError: `path` is there and is no regular file (renaming over a device or a pipe would replace it).
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is there and is not a regular file; choose another place to write to")
    path.parent.mkdir(parents=True, exist_ok=True)
    _temporary(path).touch()
    _temporary(path).unlink()


def _temporary(path):
    """The file that this process writes before it is renamed to `path`."""
    return path.parent / f".{path.name}.{os.getpid()}.tmp"


@contextlib.contextmanager
def atomic_write(path):
    """Context that yields a binary file to write; `path` changes only once all of it is on the disk.

    The bytes go to a temporary file in the same folder (made if need be), which is flushed to the disk and renamed
    over `path` when the block ends well. A crash, a full disk or an exception leaves the old `path` as it was.

    Raises:
        OSError: the folder or the file cannot be written.
        ValueError: as check_target.
    """
    check_target(path)
    path = Path(path).resolve()
    remove_leftovers(path.parent, glob.escape(path.name))
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder, name):
    """Removes the temporary files, for files whose name matches a pattern, of processes that were killed while they
    wrote."""
    for stale in Path(folder).glob(f".{name}.*.tmp"):
        if not _is_running(stale.name.split(".")[-2]):
            stale.unlink(missing_ok=True)


def _is_running(pid):
    if os.name == "nt":  # there os.kill(pid, 0) is no question but Ctrl-C
        return True
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def lock_folder(folder):
    """Context in which no other process can lock `folder` (made if need be). The lock ends with the process.

    Raises:
        RuntimeError: another process has it.
        OSError, ValueError: as check_target, for the file .lock in it.
    """
    folder = Path(folder)
    check_target(folder / ".lock")
    with open(folder / ".lock", "a") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(
                    f"another run is writing to {folder}; wait for it, or choose another --out") from None
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints

def save_checkpoint(path, state):
    """Writes a dict of tensors and plain Python values, atomically. The format version is added."""
    with atomic_write(path) as file:
        torch.save({"format": "ddpm-mnist", "version": VERSION, **state}, file)


def load_checkpoint(path):
    """Reads what `save_checkpoint` wrote, onto the CPU. Nothing in the file is executed.

    Raises:
        FileNotFoundError, ValueError: with one line that says what is wrong with the file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}; train one with python train.py, or leave --checkpoint out "
                                "to use the one that ships with the repo")
    if not path.is_file():
        raise ValueError(f"{path} is not a file; --checkpoint wants a checkpoint.pt")
    # torch does not compare the checksums of the zip archive that a checkpoint is; zipfile does. Its entries are
    # stored, not compressed: one that is, or that claims to be larger than the file, is a zip bomb. And since one file
    # can be two archives to two readers, torch does not read the file, but what zipfile found in it.
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about what is refused anyway: a failure is one line
            claimed = sum(entry.file_size for entry in archive.infolist())
            packed = claimed > path.stat().st_size or any(entry.compress_type for entry in archive.infolist())
            if not packed:
                state = torch.load(_checked_copy(archive), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain values; it is not one of our checkpoints and was "
                         "not executed") from error
    except Exception as error:  # both parsers raise whatever comes up in a file that is none
        raise ValueError(f"{path} is not a checkpoint, or only a part of one (it is truncated or damaged)") from error
    if packed:
        raise ValueError(f"{path} is compressed, and unpacks to {claimed} bytes or more; a checkpoint is not")
    if not isinstance(state, dict) or state.get("format") != "ddpm-mnist":
        raise ValueError(f"{path} is a torch file, but not a checkpoint of this project")
    version = state.get("version")
    if type(version) is not int or version != VERSION:
        raise ValueError(f"{path} has format version {reprlib.repr(version)}; this code reads version {VERSION}")
    return state


def _checked_copy(archive):
    """A zip archive in memory with the same entries, once their pickles have been looked at."""
    if min(entry.header_offset for entry in archive.infolist()):  # before it there may be what others would execute
        raise zipfile.BadZipFile("the archive does not begin where the file does")
    copy = io.BytesIO()
    with zipfile.ZipFile(copy, "w") as target:
        for entry in archive.infolist():
            content = archive.read(entry)
            if entry.filename.lower().endswith(".pkl"):  # torch finds DATA.PKL too
                _check_pickle(content)
            target.writestr(entry.filename, content)
    copy.seek(0)
    return copy


def _check_pickle(content):
    """Raises pickle.UnpicklingError if a pickle names anything beside NAMES, or has a value in two places, other than
    strings and names: a few bytes could stand for gigabytes, or for hours of work, if values were made of others again
    and again."""
    before, simple = None, {}
    for opcode, value, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL" and value not in NAMES:
            raise pickle.UnpicklingError(f"it names {value}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):  # what was read just before can be had again by this number
            simple[value] = before in ("GLOBAL", "BINUNICODE")
        if opcode.name in ("DUP", "MEMOIZE") or (opcode.name in ("GET", "BINGET", "LONG_BINGET")
                                                 and not simple.get(value)):
            raise pickle.UnpicklingError("it has one value in two places")
        before = opcode.name


# ----------------------------------------------------------------------------------------------------------------------
# Models

# What a model is rebuilt from, and what is believed of it.
MODEL_SETTINGS = {
    "schedule": tuple(SCHEDULES),
    "timesteps": range(1, 100_001),
    "image_size": range(4, 513),
    "image_channels": (1, 3),
    "classes": range(10_001),
    "width": range(3, 1025),
    "depth": range(1, 65),
}


def build_network(settings):
    """An untrained UNet from the settings (a dict) of a run or a checkpoint."""
    names = ("image_size", "image_channels", "classes", "width", "depth")
    return UNet(**{name: settings[name] for name in names})


@dataclasses.dataclass
class Model:
    """A network (on its device), its DDPM, the settings it was trained with, the precision it computes in, and for how
    many steps it was trained."""
    network: UNet
    ddpm: DDPM
    settings: dict
    precision: str = "fp32"  # or "bf16": of convolutions and matrix products; weights and results are fp32 always
    steps: int | None = None  # None: it does not say

    def denoiser(self, x_t, t, labels=None):
        """noise_theta(x_t, t, labels), what ddpm.py expects of a model."""
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            v = self.network(x_t, t, labels).float()
        return self.ddpm.clipped_noise_from_v(x_t, t, v)


def load_model(path=SHIPPED, device="cpu", ema=True, precision="fp32"):
    """A Model from a checkpoint in eval mode, with the EMA weights, or the raw ones that training last had.

    Raises:
        FileNotFoundError, ValueError: with one line that says what is wrong with the file.
    """
    state = load_checkpoint(path)
    settings = state.get("settings")
    check_settings(path, settings)
    weights = state.get("ema" if ema else "model")
    if weights is None:
        raise ValueError(f"{path} has no {'EMA' if ema else 'raw'} weights"
                         + ("" if ema else "; it ships for sampling, leave --no-ema out"))
    steps = state.get("step")
    if steps is not None and (type(steps) is not int or steps < 0):
        raise ValueError(f"{path}: no run is at step {reprlib.repr(steps)}")
    network = restore_network(path, settings, weights, device).eval()
    return Model(network, DDPM(make_betas(settings["schedule"], settings["timesteps"])), settings, precision, steps)


def export(source, target):
    """Writes what sampling needs of a checkpoint, EMA weights in half precision, settings and step: how the model in
    assets/ was made, by  python -c "import checkpoint; checkpoint.export('runs/mnist/checkpoint.pt', 'mnist.pt')".

    Raises:
        FileNotFoundError, ValueError: as load_model.
    """
    model = load_model(source)
    weights = {name: value.half() for name, value in model.network.state_dict().items()}
    save_checkpoint(target, {"settings": model.settings, "ema": weights, "step": model.steps})


def check_settings(path, settings):
    """Raises ValueError unless `settings` has what MODEL_SETTINGS asks for, before anything is built from it."""
    if not isinstance(settings, dict):
        raise ValueError(f"{path} has no settings")
    for name, known in MODEL_SETTINGS.items():
        value = settings.get(name)
        if type(value) is not type(known[0]) or value not in known:
            wanted = (f"not a whole number from {known[0]} to {known[-1]}" if isinstance(known, range) else
                      f"known are {', '.join(map(str, known))}")
            raise ValueError(f"{path}: {name} is {reprlib.repr(value)}, {wanted}")
    shares = settings.get("class_shares")
    if not isinstance(shares, list) or len(shares) != settings["classes"] or not all(
            type(share) is float and 0 <= share <= 1 for share in shares):
        raise ValueError(f"{path}: class_shares are not {settings['classes']} numbers from 0 to 1")


def restore_network(path, settings, weights, device):
    """The UNet that `settings` describe, with `weights` (name -> tensor of any of FLOATS), on the device, in float32.

    Raises:
        ValueError: there is no such network, names or shapes are not its own, or a weight is no finite number.
    """
    try:
        with torch.device("meta"):  # shapes without memory: settings may claim a network far larger than the file
            network = build_network(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    expected = network.state_dict()
    least = 2 * sum(value.numel() for value in expected.values())  # bytes; a tensor may claim more than the file holds
    if not isinstance(weights, dict) or weights.keys() != expected.keys() or least > os.path.getsize(path):
        raise ValueError(f"{path}: its weights are those of another network than its settings say")
    network.load_state_dict({name: plain_tensor(path, name, value, expected[name].shape)
                             for name, value in weights.items()}, assign=True)
    return network.to(device, memory_format=torch.channels_last)


def plain_tensor(path, name, value, shape):
    """`value`, which a checkpoint has as `name`, in float32 and in memory of its own.

    Raises:
        ValueError: it is no tensor of this shape and of one of FLOATS, or not finite.
    """
    if not isinstance(value, torch.Tensor) or value.shape != shape:
        raise ValueError(f"{path}: {name} is not a tensor of shape {tuple(shape)}")
    if value.dtype not in FLOATS:
        raise ValueError(f"{path}: {name} is not made of plain floating-point numbers")
    value = value.detach().float().clone()  # a copy: in a file two tensors may share one memory, or one repeat a number
    if not torch.isfinite(value).all():
        raise ValueError(f"{path}: {name} holds NaN or infinite numbers")
    return value
