"""Fresh processes for trainings that are killed, or that are spread over two processes.

A server imports everything once; each process is a fork of it, so that it starts in a fraction of a second.
"""

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = str(Path(__file__).parents[2])
PRELOAD = ["ttt_e2e.training", "datasets", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo"]
PATIENCE = 300  # seconds
WORLD = 2
KILLED = -signal.SIGKILL


def start(target: Callable, *arguments) -> multiprocessing.Process:
    """Begin `target(*arguments)`, a function of a module, in a process of one thread."""
    if ROOT not in sys.path:
        sys.path.insert(0, ROOT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_one_thread, args=(target, arguments))
    process.start()
    return process


def exit_code(process: multiprocessing.Process) -> int:
    """How a process ended: 0, `KILLED`, or something else for an error."""
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"A process did not end within {PATIENCE} seconds.")
    return process.exitcode


def run_alone(target: Callable, *arguments) -> int:
    return exit_code(start(target, *arguments))


def run_together(target: Callable, *arguments) -> None:
    """Run `target(*arguments)` in `WORLD` processes that can talk to one another, as torchrun starts them.

    Raises:
        RuntimeError: with the errors of all processes.
    """
    port = _free_port()
    context = multiprocessing.get_context("forkserver")
    errors = [context.SimpleQueue() for _ in range(WORLD)]
    processes = [start(_member, rank, port, errors[rank], target, arguments) for rank in range(WORLD)]
    codes = [exit_code(process) for process in processes]
    if any(codes):
        raise RuntimeError("\n".join([f"exit codes {codes}", *(queue.get() for queue in errors if not queue.empty())]))


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _one_thread(target: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    target(*arguments)


def _member(rank: int, port: int, errors, target: Callable, arguments: tuple) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(WORLD),
        LOCAL_WORLD_SIZE=str(WORLD),
        ACCELERATE_USE_CPU="true",
    )
    try:
        target(*arguments)
    except BaseException:
        errors.put(f"process {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # the other one may be waiting: do not wait for it in turn
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
