"""Runs a command in several processes that know each other, as torchrun does, but within a second: a server imports
torch once and forks. Nothing of the project is imported before the environment says which process it is.

    team(2, "train", "--max-steps", 8, setup="test_ranks.quick")
"""
import importlib
import multiprocessing
import multiprocessing.connection
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["TORCH_CPP_LOG_LEVEL"] = "FATAL"  # as utils/__init__.py has it, but before the server starts
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "torchvision.datasets", "matplotlib.figure", "imageio.v3",
                                "tqdm", "pytest"])


def team(n, command, *flags, setup=None, env=None, own_flags=None, absent=(), seconds=60):
    """Runs a command in n processes.

    Args:
        setup: "module.function", called with the number of the process before the command.
        env: more variables of the environment.
        own_flags: {number: flags} of a single process.
        absent: the numbers of processes that are not started.
    Returns:
        for each a namespace: code (as of os.waitstatus_to_exitcode), out and err. As torchrun does, it sends SIGTERM to
        all if one fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes, began = [], time.monotonic()
        for rank in range(n):
            environment = {"RANK": rank, "WORLD_SIZE": n, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n,
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "", **(env or {})}
            argv = [f"{command}.py", *map(str, flags), *map(str, (own_flags or {}).get(rank, ()))]
            processes.append(CONTEXT.Process(target=work, args=(
                Path(folder) / str(rank), {name: str(value) for name, value in environment.items()}, argv, setup)))
            if rank not in absent:
                processes[-1].start()
        started = [process for process in processes if process.pid]
        while any(process.exitcode is None for process in started) and time.monotonic() < began + seconds:
            multiprocessing.connection.wait([process.sentinel for process in started if process.exitcode is None], 0.1)
            if any(process.exitcode for process in started):  # one has failed: so does torchrun
                for process in started:
                    process.terminate()
                seconds = min(seconds, time.monotonic() - began + 30)
                break
        results = []
        for rank, process in enumerate(processes):
            if process.pid:
                process.join(max(0.1, began + seconds - time.monotonic()))
                process.kill()
                process.join()
                out, err = ((Path(folder) / f"{rank}.{stream}").read_text() for stream in ("out", "err"))
                results.append(SimpleNamespace(code=process.exitcode, out=out, err=err))
        return results


def work(output, environment, argv, setup):
    """In the process: the command as its last line would run it."""
    for descriptor, stream in enumerate(("out", "err"), 1):
        file = os.open(output.with_suffix(f".{stream}"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", 1) for descriptor in (1, 2))
    os.environ.update(environment)
    importlib.import_module("torch").set_num_threads(1)  # in one process and in several, on any machine
    root = Path(__file__).resolve().parent.parent
    sys.path[:0] = [str(root), str(root / "tests")]
    sys.argv = argv
    module = importlib.import_module(argv[0].removesuffix(".py"))
    if setup:
        name, function = setup.rsplit(".", 1)
        getattr(importlib.import_module(name), function)(int(environment["RANK"]))
    from utils.cli import run

    run(module.main)
