"""Files that survive: atomic writes, a lock for a folder, and archives from strangers, read without trusting them."""
import contextlib
import csv
import glob
import io
import json
import math
import os
import pickle
import pickletools
import reprlib
import secrets
import sys
import time
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

try:
    import fcntl
except ImportError:  # Windows: no locks there
    fcntl = None


# ----------------------------------------------------------------------------------------------------------------------
# Writing

def check_target(path):
    """Finds out, before any work is done, whether a file could be written to `path`; makes its folder if need be.

    Raises:
        OSError: its folder cannot be made, or no file in it.
        ValueError: `path` is there and is not a regular file (renaming over a device or a pipe would replace it).
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} exists and is not a regular file; choose another place to write to")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.touch()
    temporary.unlink(missing_ok=True)  # another process may have taken it for a leftover


def _temporary(path):
    """A new file beside `path`, to be written and then renamed to it."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"


@contextlib.contextmanager
def atomic_write(path, tidy=True):
    """Context that yields a binary file to write; `path` changes only once all of it is on the disk.

    The bytes go to a temporary file in the same folder (made if need be), which is flushed to the disk and renamed
    over `path` when the block ends well. A crash, a full disk or an exception leaves the old `path` as it was.

    Args:
        tidy: first remove_leftovers, which takes longer the more files there are in the folder.
    Raises:
        OSError: the folder or the file cannot be written.
        ValueError: as check_target.
    """
    check_target(path)
    path = Path(path).resolve()
    if tidy:
        remove_leftovers(path.parent, glob.escape(path.name))
    temporary = _temporary(path)
    try:
        with _open_locked(temporary) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl:
                os.replace(temporary, path)
        if not fcntl:  # Windows renames no open file, and to none that somebody is just reading
            for wait in 0.1, 0.5, 2, None:
                try:
                    os.replace(temporary, path)
                    break
                except PermissionError:
                    if wait is None:
                        raise
                    time.sleep(wait)
    except OSError as error:
        if error.filename is None:  # of a failed write: a full disk, say
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _open_locked(path):
    """Opens a new file and locks it, by which others see that it is not a leftover. If one of them was quicker, and
    removes it, it is made anew."""
    while True:
        file = open(path, "xb")
        if _lock(file) is not False and path.exists():
            return file
        file.close()
        path.unlink(missing_ok=True)


def remove_leftovers(folder, name):
    """Removes the temporary files, for files whose name matches a pattern, of processes that were killed while they
    wrote: those that nobody holds a lock on. (Process numbers would not do: another container has its own.)"""
    for leftover in Path(folder).glob(f".{name}.*.tmp"):
        with contextlib.suppress(OSError):
            if leftover.is_file():  # to open a pipe would block
                with open(leftover, "r+b") as file:  # not "rb": on NFS only what may be written can be locked
                    if _lock(file):
                        leftover.unlink()


def files_of_a_run(out):
    """What a run has left in its folder, a list of paths."""
    return [path for path in (out / "checkpoint.pt", out / "metrics.csv", out / "loss.png",
                              *(out / "samples").glob("step_*.png")) if path.exists()]


def clear_run(out):
    """Deletes what a run has left in its folder."""
    for path in [*files_of_a_run(out), out / "settings.json"]:
        path.unlink(missing_ok=True)


def _lock(file):
    """Locks an open file until it is closed. Returns whether that worked: True, False if another process has the lock,
    or None where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):  # a drive that has none; Windows
        return None
    return True


@contextlib.contextmanager
def lock_folder(folder, flag="--out"):
    """Context in which no other process can lock `folder` (made if need be), which a flag chose. The lock ends with the
    process. On a drive without locks it warns, and goes on.

    Raises:
        RuntimeError: another process has it.
        OSError, ValueError: as check_target, for the file .lock in it.
    """
    folder = Path(folder)
    check_target(folder / ".lock")
    with open(folder / ".lock", "a") as file:
        locked = _lock(file)
        if locked is False:
            raise RuntimeError(f"another run is writing to {folder}; wait for it, or choose another {flag}")
        if locked is None and fcntl:
            print(f"warning: {folder} is on a drive without file locks; make sure that no other run writes there",
                  file=sys.stderr)
        yield


def write_json(path, value):
    """Writes a dict or list of plain values as JSON, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_csv(file, rows):
    """Writes dicts with the same keys as a table, with a header, to an open binary file."""
    text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    text.detach()


@contextlib.contextmanager
def npz_writer(path, shape):
    """Context that yields a function to write images and labels with, batch by batch, into an .npz file (atomically),
    so that there may be more of them than the memory holds. numpy.savez would want all of them at once.

    Args:
        shape: of all images together.
    """
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        all_labels = []
        with archive.open("images.npy", "w", force_zip64=True) as array:
            np.lib.format.write_array_header_1_0(array, {"descr": "|u1", "fortran_order": False, "shape": shape})

            def write(images, labels):
                array.write(images.numpy().tobytes())
                all_labels.append(labels.numpy())

            yield write
        with archive.open("labels.npy", "w") as array:
            np.lib.format.write_array(array, np.concatenate(all_labels))


# ----------------------------------------------------------------------------------------------------------------------
# Tensors: what torch.save writes, and torch.load(weights_only=True) reads. Here it is read without either, so that what
# a file can do does not depend on the version of torch: nothing is executed, no size is believed, and what is read
# needs about as much memory as the file.

STORAGES = {"torch BoolStorage": torch.bool, "torch ByteStorage": torch.uint8, "torch CharStorage": torch.int8,
            "torch ShortStorage": torch.int16, "torch IntStorage": torch.int32, "torch LongStorage": torch.int64,
            "torch HalfStorage": torch.float16, "torch BFloat16Storage": torch.bfloat16,
            "torch FloatStorage": torch.float32, "torch DoubleStorage": torch.float64}
ORDERED_DICT, TENSOR = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"


class Name(str):
    """A class or function that a pickle names. Only STORAGES, ORDERED_DICT and TENSOR are known."""


def write_tensors(state):
    """The bytes of a file with `state`, nested dicts, lists and tuples of tensors, strings, numbers and None. What
    read_tensors would refuse is refused here.

    Raises:
        ValueError: there is something else in it; the line says what and where.
    """
    buffer = io.BytesIO()
    try:
        torch.save(_plain(state, "its state"), buffer)
    except RecursionError:
        raise ValueError("a checkpoint cannot hold what is nested so deeply, or holds itself") from None
    return buffer.getvalue()


def _plain(value, place):
    """A copy in which no container or tensor stands in two places, and each tensor has memory of its own on the CPU."""
    if isinstance(value, torch.Tensor):
        if value.dtype not in STORAGES.values() or value.layout != torch.strided or value.is_meta or value.is_nested:
            raise ValueError(f"a checkpoint cannot hold {place}, a tensor of {value.dtype}, {value.layout}")
        value = value.detach().cpu().clone()
        if type(value) is not torch.Tensor:
            raise ValueError(f"a checkpoint cannot hold {place}, which is of type {type(value).__name__}")
        return value
    if isinstance(value, dict):
        if not all(map(_is_key, value)):
            raise ValueError(f"a checkpoint cannot hold {place}, since its keys are not all strings or whole numbers "
                             "from 0 to 2147483647")
        return {key: _plain(item, f"{place}[{reprlib.repr(key)}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{place}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, np.generic):
        value = value.item()
    if value is not None and type(value) not in (bool, int, float, str) or type(value) is int and abs(value) >> 2000:
        raise ValueError(f"a checkpoint cannot hold {place}, which is of type {type(value).__name__}; it holds "
                         "tensors, numbers, strings, lists, tuples and dicts")
    return value


def _is_key(key):
    """Whether a dict may have this key. Nothing else: to hash a deep tuple would crash Python, and there are whole
    numbers that all have the same hash."""
    return type(key) is str or type(key) is int and 0 <= key < 2**31


def read_tensors(file):
    """What write_tensors, or torch.save, wrote to `file` (a path, or an open file), with all tensors on the CPU.

    Raises:
        pickle.UnpicklingError: it holds something other than tensors and plain values.
        Exception: whatever comes up in a file that is damaged, or is something else altogether.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        claimed, size = sum(entry.file_size for entry in entries), archive.fp.seek(0, io.SEEK_END)
        if claimed > size or any(entry.compress_type for entry in entries):
            raise pickle.UnpicklingError(f"it is compressed, and unpacks to {claimed} bytes or more")
        if min(entry.header_offset for entry in entries):  # before it there may be what others would execute
            raise zipfile.BadZipFile("the archive does not begin where the file does")
        main, = (entry.filename for entry in entries if entry.filename.endswith("/data.pkl"))
        folder = main.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        records = {}

        def storage(kind, key, length):
            if key not in records:
                content, dtype = archive.read(f"{folder}data/{key}"), STORAGES[kind]
                if len(content) != length * dtype.itemsize:
                    raise ValueError(f"its record {key} has {len(content)} bytes, {length} numbers of {dtype} have not")
                empty = torch.empty(0, dtype=dtype)
                records[key] = torch.frombuffer(bytearray(content), dtype=dtype) if content else empty
            return records[key]

        return _read_pickle(archive.read(main), storage)


def _read_pickle(content, storage):
    """The value that a pickle stands for. An unknown operation or name is refused, and so is one value in two places,
    other than strings and names: a few bytes could stand for hours of work, if values were made of others again and
    again.

    Args:
        storage: callable (kind, key, length) -> the tensor [length] with the numbers of a record.
    """
    stack, marks, memo = [], [], {}

    def pop(count):
        popped = stack[len(stack) - count:]
        if len(popped) != count:
            raise ValueError("its pickle takes what is not there")
        del stack[len(stack) - count:]
        return popped

    def fill(items):
        if type(stack[-1]) is list:
            return stack[-1].extend(items)
        if not isinstance(stack[-1], dict) or not all(map(_is_key, items[::2])):
            raise pickle.UnpicklingError("it has a dict with other keys than strings and small numbers")
        stack[-1].update(zip(items[::2], items[1::2], strict=True))

    for opcode, value, _ in pickletools.genops(content):
        match opcode.name:
            case "PROTO" | "STOP":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(value)
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode.name]())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop(len(stack) - marks.pop())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(opcode.name[-1]))))
            case "APPENDS" | "SETITEMS":
                fill(pop(len(stack) - marks.pop()))
            case "APPEND":
                fill(pop(1))
            case "SETITEM":
                fill(pop(2))
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET" if type(memo[value]) in (str, Name):
                stack.append(memo[value])
            case "GLOBAL" if value in STORAGES or value in (ORDERED_DICT, TENSOR):
                stack.append(Name(value))
            case "BINPERSID":
                arguments, = pop(1)
                if type(arguments) is not tuple:  # a tensor, unpacked, would be as many as it claims to have numbers
                    raise ValueError("it has a storage that is not one")
                word, kind, key, _, length = arguments
                if word != "storage" or type(kind) is not Name or type(key) is not str or type(length) is not int:
                    raise ValueError("it has a storage that is not one")
                stack.append(storage(kind, key, length))
            case "REDUCE":
                function, arguments = pop(2)
                if type(function) is not Name or type(arguments) is not tuple:
                    raise pickle.UnpicklingError("it calls what is not a name")
                if function == TENSOR:
                    stack.append(_view(*arguments))
                elif function == ORDERED_DICT and not arguments:  # a list of pairs may have any keys
                    stack.append(OrderedDict())
                else:
                    raise pickle.UnpicklingError(f"it calls {function}")
            case "BUILD" if type(stack[-2]) is OrderedDict:
                pop(1)  # the versions of the layers
            case _:
                raise pickle.UnpicklingError(f"it has the operation {opcode.name} {reprlib.repr(value)}")
    value, = stack
    return value


def _view(numbers, offset, size, stride, *_):
    """The tensor of a storage, offset, sizes and strides, if it does not reach beyond the storage."""
    if type(size) is not tuple or type(stride) is not tuple:
        raise ValueError("it has a tensor of no shape")
    whole = [offset, *size, *stride]
    if not all(type(number) is int and number >= 0 for number in whole) or len(size) != len(stride):
        raise ValueError("it has a tensor of no shape")
    if 0 not in size and offset + sum((n - 1) * step for n, step in zip(size, stride)) >= len(numbers):
        raise ValueError("it has a tensor that is larger than its storage")
    return numbers.as_strided(size, stride, offset if 0 not in size else 0)


# ----------------------------------------------------------------------------------------------------------------------
# Arrays

LARGEST_HEADER = 1 << 14  # bytes, of an array; numpy refuses what is longer, but reads all of it before


def read_array(path, name, largest):
    """One array of an .npz file, None if it has none of that name. Nothing is allocated before its size is known.

    Args:
        largest: bytes that the array may have.
    Raises:
        ValueError: with one line that says what is wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's, about headers: a failure is one line
            member = f"{name}.npy"
            if member not in archive.namelist():
                return None
            entry = archive.getinfo(member)
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("its compression is not one of numpy's")  # zipfile unpacks others by the gigabyte
            with archive.open(entry) as file:
                start = io.BytesIO(file.read(LARGEST_HEADER))
                version = np.lib.format.read_magic(start)
                read_header = (np.lib.format.read_array_header_1_0 if version == (1, 0)
                               else np.lib.format.read_array_header_2_0)
                shape, _, dtype = read_header(start)
            if dtype.hasobject or dtype.names:
                raise ValueError(f"{name} are not plain numbers")
            size = math.prod(shape) * dtype.itemsize
            if 0 <= size <= largest:
                if size > entry.file_size:
                    raise ValueError(f"it is shorter than the shape {reprlib.repr(shape)} of {name} asks for")
                with archive.open(entry) as file:
                    return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # zipfile, zlib, numpy and ast raise whatever comes up in a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]  # some quote all of the file
        raise ValueError(f"{path} is damaged or not an .npz file ({reason})") from error
    raise ValueError(f"{path}: {name} has, by its header, the shape {reprlib.repr(shape)} of {dtype}; this command "
                     f"reads {largest:,} bytes at most")
