"""Run a function on several ranks, or a program that is killed in the middle."""

from __future__ import annotations

import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, threads: int = 1
) -> list[Any]:
    """Call `function(*args)` in fresh processes that form one gloo group, and return what they return.

    The processes have the environment that `torchrun` gives (RANK, WORLD_SIZE, MASTER_ADDR, …), so that
    whatever starts under `torchrun` starts here; the process group itself is made by the function (or by the
    Trainer). The rendezvous is held by this process on a port of its own: several calls at once do not meet.

    Args:
        function: a function at the top level of a module; the module is loaded from its file, importable or
            not.
        world_size: number of processes (≥ 1).
        args: picklable arguments, the same for all ranks.
        timeout: seconds after which the processes are killed.
        threads: CPU threads of torch in each.

    Returns:
        Results in the order of the ranks; they travel through a pipe and must be picklable (give tensors on
        the CPU).

    Raises:
        RuntimeError: a rank raised or died; the message holds the traceback of the first one that did.
        TimeoutError: the time is over.
    """
    import torch

    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; it must be ≥ 1")
    file = inspect.getsourcefile(function)
    if file is None or function.__qualname__ != function.__name__:
        raise ValueError(f"function {function.__qualname__!r} must stand at the top level of a file")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes = []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            environment = _environment(rank, world_size, store.port, threads)
            limit = 0.9 * timeout
            process = context.Process(
                target=_rank_main,
                args=(file, function.__name__, args, environment, limit, sender),
                daemon=True,
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        return _collect(pipes, time.monotonic() + timeout, timeout)
    finally:
        for process in processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in pipes:
            pipe.close()


def run_script(
    arguments: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    timeout: float = 120.0,
    kill_when: Callable[[], bool] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python arguments…`, and kill it with SIGKILL as soon as `kill_when()` is true.

    Args:
        arguments: script and its arguments.
        env: variables set on top of this process's environment.
        timeout: seconds after which it is killed and TimeoutError raised.
        kill_when: asked about 500 times a second, for example whether a file has grown to some length.

    Returns:
        Exit code (−9 when it was killed), output and error text.

    Raises:
        TimeoutError: the time is over.

    Example:
        >>> run_script(["-c", "print(1 + 1)"]).stdout
        '2\\n'
    """
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + timeout
    try:
        if kill_when is not None:
            while process.poll() is None and time.monotonic() < end:
                if kill_when():
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.002)
        out, error = process.communicate(timeout=max(end - time.monotonic(), 0.01))
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise TimeoutError(f"{arguments[0]} ran longer than {timeout} s and was killed") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def _environment(rank: int, world_size: int, port: int, threads: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": f"ranks-{os.getpid()}-{port}",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store of the parent is the rendezvous
        "OMP_NUM_THREADS": str(threads),
    }


def _collect(pipes: Sequence[Connection], end: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(open_pipes, timeout=max(end - time.monotonic(), 0.0))
        if not ready:
            raise TimeoutError(f"{len(open_pipes)} of {len(pipes)} ranks did not finish in {timeout} s")
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                good, value = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                raise RuntimeError(f"rank {rank} died without a word") from None
            if not good:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    file: str,
    name: str,
    args: tuple[Any, ...],
    environment: Mapping[str, str],
    limit: float,
    sender: Connection,
) -> None:
    os.environ.update(environment)
    faulthandler.dump_traceback_later(limit)  # a rank that hangs shows where, before it is killed
    try:
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        spec = importlib.util.spec_from_file_location(f"_ranks_{Path(file).stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        answer = (True, getattr(module, name)(*args))
        message = pickle.dumps(answer)  # by value: multiprocessing would share tensors, and this process ends
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    try:
        sender.send_bytes(message)
    finally:
        if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
            sys.modules["torch"].distributed.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
        sender.close()
