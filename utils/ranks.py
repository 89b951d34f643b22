"""Several processes that work as one, under torchrun: process RANK of WORLD. Alone, nothing here waits for anybody.

A step of training computes the gradient of a batch, which is a mean, and a mean can be shared out: each process draws
the numbers of the whole batch, takes its part of it, and the gradients are added up. Muon's matrices are shared out,
too. All else is the same in each, and so are the weights after every step.
"""
import atexit
import contextlib
import hashlib
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

WORLD = int(os.environ.get("WORLD_SIZE") or 1)
RANK, LOCAL_RANK, LOCAL_WORLD = (int(os.environ.get(name, alone)) if WORLD > 1 else alone for name, alone in (
    ("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
PATIENCE = 50  # seconds that the processes have to find each other


def join(device):
    """Connects the processes, by gloo and, for what is on a GPU, by NCCL. Returns the device.

    Raises:
        ConnectionError: they do not find each other.
        ValueError: they do not all have the same flags, code and version of torch.
    """
    if WORLD == 1:
        return device
    if os.environ.get("OMP_NUM_THREADS") == "1":  # which torchrun sets; there may be more cores than processes
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // LOCAL_WORLD))
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=PATIENCE)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world, timeout=timedelta(days=1))  # others wait while the first decodes
    except (RuntimeError, ValueError, OSError) as error:
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConnectionError(f"process {RANK} did not find the {WORLD - 1} others at {where} within {PATIENCE} s; "
                              "check that they are running and that MASTER_ADDR can be reached "
                              f"({str(error).partition(chr(10))[0]})") from error
    atexit.register(dist.destroy_process_group)
    _check_alike()
    return device


def _check_alike():
    root = Path(__file__).parent.parent
    code = b"".join(path.read_bytes() for path in sorted([*root.glob("*.py"), *root.glob("utils/*.py")]))
    mine = {"flags": sys.argv[1:], "code": hashlib.sha256(code).digest(), "version of torch": torch.__version__}
    all_of_them = [None] * WORLD
    _together(dist.all_gather_object, all_of_them, mine)
    for name in mine:
        if other := next((rank for rank, theirs in enumerate(all_of_them) if theirs[name] != all_of_them[0][name]), 0):
            raise ValueError(f"processes 0 and {other} differ in their {name}; start all of them alike")


def _together(collective, *args, **kwargs):
    """Calls a function of torch.distributed, which waits for all processes."""
    try:
        return collective(*args, **kwargs)
    except RuntimeError as error:
        raise ConnectionError("another process of this run has ended, so this one ends too "
                              f"({str(error).partition(chr(10))[0][:200]})") from error


def part(x):
    """This process's part of a batch: every WORLD-th of its rows, from the RANK-th."""
    return x[RANK::WORLD]


def mean_of_all(tensors, share):
    """Replaces each of the tensors by its mean over all processes, where this one's counts by its `share` of the batch.
    All travel as one, since many small messages would take longer.

    Raises:
        ConnectionError: another process has ended.
    """
    if WORLD > 1:
        # the mean over the batch = sum over processes of (share of the batch) (mean over their part)
        flat = torch.cat([x.detach().flatten() for x in tensors]) * share
        if flat.is_cuda:
            wait_for_all()  # a GPU would wait for ever for one that has ended
        _together(dist.all_reduce, flat)
        for x, mean in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.detach().copy_(mean.view_as(x))


def shared_out(function, x):
    """function(x), of which each process computes its part, if there is one for each.

    Args:
        function: maps x [B, ...] to a result of the same shape, each of the B rows for itself.
    """
    if WORLD == 1 or len(x) < WORLD:
        return function(x)
    # All must send equally many rows: whoever has one fewer adds a row of zeros.
    mine = x.new_zeros(-(-len(x) // WORLD), *x.shape[1:])
    mine[:len(part(x))] = function(part(x))
    parts = [torch.empty_like(mine) for _ in range(WORLD)]
    try:
        if x.is_cuda:
            wait_for_all()  # as in mean_of_all
        _together(dist.all_gather, parts, mine)
    except ConnectionError:  # This step is finished alone, so that what is saved is whole; the next one says it.
        return function(x)
    return torch.stack(parts, dim=1).flatten(0, 1)[:len(x)]  # part(x) took every WORLD-th


def largest(*numbers):
    """For each number, the largest that any process has, as floats: what all of them have to agree on."""
    if WORLD == 1:
        return numbers
    numbers = torch.tensor(numbers, dtype=torch.float64)  # on the CPU, so that no GPU has to wait
    _together(dist.all_reduce, numbers, op=dist.ReduceOp.MAX)
    return numbers.tolist()


def wait_for_all():
    """Returns when every process has called it. It goes through the CPU: in dist.barrier a GPU would wait."""
    largest(0.0)


def of_the_first(value):
    """The first process's value, of any type, in all of them."""
    if WORLD == 1:
        return value
    values = [value]
    _together(dist.broadcast_object_list, values)
    return values[0]


@contextlib.contextmanager
def first_alone():
    """Context that the first process goes through before the others do, the first of each other machine next: it
    downloads or unpacks, and they find it done."""
    turn = 0 if RANK == 0 else 1 if LOCAL_RANK == 0 else 2
    for _ in range(turn):
        wait_for_all()
    yield
    for _ in range(2 - turn):
        wait_for_all()


def in_order(mine, n, share=(RANK, WORLD)):
    """What all processes make, n things in turn, as an iterator at the first of them; at the others it is empty.

    Args:
        mine: the iterator of this process's `share` (k, m): every m-th of the n, from the k-th. (0, 1): all of them,
            of which no other process need know.
    """
    if share == (0, 1):
        yield from mine
        return
    for _ in range(0, n, WORLD):
        made = [None] * WORLD if RANK == 0 else None
        _together(dist.gather_object, next(mine, None), made)
        yield from () if RANK else (one for one in made if one is not None)


@contextlib.contextmanager
def rescued(save):
    """Context: if another process ends, the first one calls save() before it ends, too."""
    try:
        yield
    except ConnectionError:
        if RANK == 0:
            save()
        raise
