"""Several devices, several machines: what one process of a run knows of the others.

`torchrun` starts the same program once per device. Each process (a "rank") holds the whole model, takes its share of
every step's micro-batches, and adds up gradients of sums as it would alone. Then the ranks' gradients are summed, and
the loop divides once, by the weight of the whole step: 4 ranks x 2 micro-batches are the same step as 1 x 8, rows of
unequal length included. This is data parallelism, and `Ranks` is all that the loop needs for it: sums over ranks, the
largest of a number, and waiting for each other. Alone, each of its methods returns what it was given.

Numbers that a person reads travel between CPUs (gloo), so that no GPU has to be waited for; gradients between GPUs
(NCCL).
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import gc
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from zero2hero.errors import UserError

BUCKET = 1 << 23  # numbers that travel together: large enough to be quick, small enough to overlap


@dataclass(frozen=True)
class Ranks:
    """One process among `size`; `local_rank` counts those of its machine.

    `mesh` arranges them in rows of `tp_size`: those of a row ("tensor") work on the same micro-batches, those of a
    column ("data") on different ones. See train/sharding.py for what a row is good for.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    tp_size: int = 1
    mesh: Any = None

    @property
    def data_rank(self) -> int:
        """Which part of the data is this rank's."""
        return self.rank // self.tp_size

    @property
    def data_size(self) -> int:
        return self.size // self.tp_size

    @property
    def is_main(self) -> bool:
        """Rank 0 alone prints, tracks, samples and saves."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.max(0)

    def max(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        if self.size == 1:
            return number
        value = torch.tensor(number)
        with _talking(self):
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def sum(self, numbers: Mapping[str, float], over: str = "data") -> dict[str, float]:
        """Each number summed over the data ranks (or "all"), which must have the same names."""
        if self.size == 1:
            return dict(numbers)
        names = sorted(numbers)
        values = torch.tensor([numbers[name] for name in names], dtype=torch.float64)
        with _talking(self):
            dist.all_reduce(values, group=self._group(over))
        return dict(zip(names, values.tolist()))

    def sum_(self, tensors: Sequence[Tensor], over: str = "data") -> None:
        """Replace each tensor by its sum over the data ranks (or "tensor", "all"). All have one dtype."""
        if self.size == 1:
            return
        with _talking(self):
            flats = [(b, b[0] if len(b) == 1 else torch.cat([t.flatten() for t in b])) for b in _buckets(tensors)]
            works = [dist.all_reduce(flat, group=self._group(over), async_op=True) for _, flat in flats]
            for (bucket, flat), work in zip(flats, works):
                work.wait()
                if len(bucket) > 1:
                    parts = flat.split([t.numel() for t in bucket])
                    torch._foreach_copy_(bucket, [part.view_as(t) for part, t in zip(parts, bucket)])

    def gather(self, value: Any) -> list[Any]:
        """The JSON values of all ranks, by rank. They travel as text: nothing that is received can be code."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with _talking(self):
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(lengths, torch.tensor([len(own)]))
            longest = int(max(lengths))
            texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(texts, F.pad(own, (0, longest - len(own))))
        return [json.loads(bytes(text[: int(n)].tolist())) for text, n in zip(texts, lengths)]

    def _group(self, over: str) -> Any:
        return None if over == "all" else self.mesh.get_group(over)

    @torch.no_grad()
    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Give every rank the values of rank 0: two machines may round the same first weights differently."""
        if self.size > 1:
            with _talking(self):
                for t in tensors:
                    dist.broadcast(t.detach(), 0)

    @contextlib.contextmanager
    def first_on_each_machine(self) -> Iterator[None]:
        """One rank of each machine runs the block, then its others do, and find in the cache what it made."""
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()


ALONE = Ranks()


@contextlib.contextmanager
def join(device: torch.device, tp_size: int = 1, timeout: int = 1800) -> Iterator[tuple[Ranks, torch.device]]:
    """This process's place among those that torchrun started, and its device; alone when there are no others.

    Standard output of all ranks but the first is shut.

    Args:
        device: what to compute on; of several GPUs each rank gets its own.
        tp_size: ranks that work on the same micro-batches.
        timeout: seconds that one rank waits for another.

    Raises:
        UserError: torchrun's variables are incomplete, the others cannot be reached, or there are more ranks than GPUs.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size % tp_size:
        raise UserError(
            f"train.tp_size {tp_size} does not divide the number of ranks, {size}: start torchrun with others"
        )
    if size == 1:
        yield ALONE, device
        return
    if absent := [name for name in names if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE is {size}, but {absent[0]} is not set: start several processes with "
            "torchrun (docs/distributed.md), or unset WORLD_SIZE"
        )
    from torch.distributed.device_mesh import init_device_mesh

    device = _own_device(device, int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
        mesh = init_device_mesh(device.type, (size // tp_size, tp_size), mesh_dim_names=("data", "tensor"))
    except (RuntimeError, ValueError, OSError) as error:
        where = ":".join(os.environ[name] for name in names[3:])
        raise UserError(f"rank {os.environ['RANK']} cannot join the others at {where}: {_first_line(error)}") from error
    rank, _, local_rank = (int(os.environ[name]) for name in names[:3])
    ranks = Ranks(rank, size, local_rank, tp_size, mesh)
    try:
        with contextlib.ExitStack() as stack:
            if not ranks.is_main:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            yield ranks, device
            ranks.barrier()
    finally:
        # a group that anything still refers to keeps its threads, and these may crash Python's exit
        getattr(mesh, "_pg_registry", {}).clear()
        atexit.register(gc.collect)
        dist.destroy_process_group()


def _own_device(device: torch.device, local_rank: int) -> torch.device:
    if device.type != "cuda":
        return device
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"this machine has {torch.cuda.device_count()} GPUs, too few for its rank {local_rank}: start torchrun "
            "with --nproc-per-node of that number at most, or train with --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, gathered until `BUCKET` numbers are together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(t.numel() for t in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


@contextlib.contextmanager
def _talking(ranks: Ranks) -> Iterator[None]:
    """When another rank is gone, one line instead of a backend's."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(
            f"rank {ranks.rank} of {ranks.size} has lost the others ({_first_line(error)}); the message of the one "
            "that stopped first says why. --resume continues from the last checkpoint."
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
