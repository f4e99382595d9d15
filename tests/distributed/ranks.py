"""Several ranks on this machine, for tests: each a process of one thread, talking by gloo.

A server process imports torch once and forks the ranks, so that a test costs seconds and not tens of them.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["zero2hero.train.pretrain", "torch.distributed.fsdp", "torch.distributed.checkpoint"])
SECONDS = 120


def together(size: int, work: Callable[..., Any], *arguments: Any, tp_size: int = 1) -> list[Any]:
    """What `work(ranks, *arguments)` returns on each rank; it and its arguments must be picklable."""
    port = free_port()
    ends = [CONTEXT.Pipe(duplex=False) for _ in range(size)]
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, size, port, tp_size, ends[rank][1], work, arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for _, sender in ends:
        sender.close()
    try:
        results = [receiver.recv() if receiver.poll(SECONDS) else "silent" for receiver, _ in ends]
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    failures = [r for r in results if isinstance(r, str)]
    assert not failures, "\n".join(failures)
    return [r[0] for r in results]


def _rank(
    rank: int, size: int, port: int, tp_size: int, sender: Any, work: Callable[..., Any], arguments: tuple
) -> None:
    import torch

    from zero2hero.train.parallel import join

    torch.set_num_threads(1)
    os.environ |= environment(rank, size, port)
    try:
        with join(torch.device("cpu"), tp_size, 60) as (ranks, _):
            sender.send((plain(work(ranks, *arguments)),))
    except BaseException:
        sender.send(f"rank {rank}:\n{traceback.format_exc()}")
        raise


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells each process."""
    return {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def plain(value: Any) -> Any:
    """Tensors as arrays, which can be sent."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value.detach().numpy().copy() if hasattr(value, "detach") else value


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """The largest difference between two sets of named arrays."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)
