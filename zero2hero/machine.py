"""What this machine can do, measured once and remembered: matrix products in fp32 and bf16.

Two uses. The progress bar shows each step's share of the measured peak, so that one sees how much is left. And
`precision auto` takes bf16 only where it is truly faster: many CPUs emulate it, and on some virtual machines the first
bf16 product kills the process, because the processor announces AMX tiles whose description the hypervisor hides.
Hence the measurement runs in a process of its own, and its answer is kept in the cache folder. Where bf16 dies, two
mends are tried in turn: to supply the tiles' description (native/amx_tiles.c), and to do without tiles.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zero2hero.io import atomic_write, cache_folder

_MEASURE = """
import sys, time, torch
from zero2hero.machine import set_up_bf16
dtype, threads, setup = sys.argv[1:]
torch.set_num_threads(int(threads))
if dtype == "bfloat16":
    set_up_bf16(setup)
a, b = torch.randn(2, 1024, 1024).to(getattr(torch, dtype))
best, end = float("inf"), time.perf_counter() + 1.0
while time.perf_counter() < end:
    start = time.perf_counter()
    torch.nn.functional.linear(a, b)
    best = min(best, time.perf_counter() - start)
for rows, inner in ((1024, 1024), (1, 384), (77, 99), (500, 200)):
    x, y = a[:rows, :inner].contiguous(), b[:, :inner].contiguous()
    exact = torch.nn.functional.linear(x.float(), y.float())
    assert (torch.nn.functional.linear(x, y).float() - exact).norm() < 0.01 * exact.norm()
print(2 * 1024**3 / best)
"""

BF16_SETUPS = ("as is", "tiles described", "no tiles")


@dataclass(frozen=True)
class Machine:
    """Measured peaks of the CPU in FLOP/s, and what bf16 needs here (one of `BF16_SETUPS`)."""

    processor: str
    cores: int
    fp32_flops: float
    bf16_flops: float
    bf16_setup: str

    @property
    def bf16_pays(self) -> bool:
        """Whether bf16 products are faster by enough to be worth their rounding."""
        return self.bf16_flops > 1.3 * self.fp32_flops

    def flops(self, dtype: str) -> float:
        return self.bf16_flops if dtype in ("bf16", "bfloat16") else self.fp32_flops


def processor_name() -> str:
    """The processor's model as the system names it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> Machine:
    """This machine's measurements: from the cache, or made now (a few seconds, once per machine and torch version)."""
    import torch

    cores = torch.get_num_threads()
    key = f"{processor_name()} x{cores} torch {torch.__version__}"
    path = cache_folder() / "machine.json"
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = dict(json.loads(path.read_text()))
        if key in known:
            return Machine(**known[key])
    fp32 = _measured("float32", cores, "as is") or 0.0
    bf16, setup = 0.0, "no tiles"
    for setup in BF16_SETUPS:
        if bf16 := _measured("bfloat16", cores, setup) or 0.0:
            break
    found = Machine(processor_name(), cores, fp32, bf16, setup)
    with contextlib.suppress(ValueError):  # a home that cannot be written only costs the measurement again
        atomic_write(path, json.dumps(known | {key: asdict(found)}, indent=1))
    return found


def _measured(dtype: str, threads: int, setup: str) -> float | None:
    """FLOP/s of a matrix product, or None when the process died or its result was wrong."""
    command = [sys.executable, "-c", _MEASURE, dtype, str(threads), setup]
    package = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        return float(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def set_up_bf16(setup: str) -> None:
    """Make bf16 products safe in this process; before its first one."""
    import torch

    if setup == "no tiles":  # oneDNN then uses the plain bf16 instructions
        os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    elif setup == "tiles described":
        library = native_library("amx_tiles")
        torch.ones(1 << 20).exp_()  # starts torch's threads, which must not be born inside the window
        if library.amx_tiles_begin() != 0:
            raise OSError("this kernel cannot trap the CPUID instruction")
        try:
            _use_every_bf16_kernel()
        finally:
            library.amx_tiles_end()


def _use_every_bf16_kernel() -> None:
    """Small products of every kind (with and without ragged edges), so that oneDNN asks all its questions."""
    import torch
    import torch.nn.functional as F

    for rows, inner, columns in ((300, 200, 100), (64, 64, 64), (1, 384, 384), (17, 33, 65), (256, 128, 512)):
        x = torch.ones(rows, inner, dtype=torch.bfloat16, requires_grad=True)
        w = torch.ones(columns, inner, dtype=torch.bfloat16, requires_grad=True)
        F.linear(x, w).sum().backward()
        torch.bmm(x[None].expand(3, -1, -1), w.t()[None].expand(3, -1, -1))
    for width in (24, 32, 64):
        q = torch.ones(2, 4, 100, width, dtype=torch.bfloat16, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()


def native_library(name: str, *flags: str) -> ctypes.CDLL:
    """Compile native/NAME.c once per processor, into the cache folder, and load it.

    Raises:
        OSError: no compiler, or a library that cannot be loaded here.
        subprocess.SubprocessError: the compiler failed.
    """
    source = Path(__file__).parent / "native" / f"{name}.c"
    sources = [file.read_text() for file in sorted(source.parent.glob("*.c"))]  # some include others
    key = [*flags, *sources, *sorted(_processor_features())]
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    path = cache_folder() / "native" / f"{name}-{digest}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        compiled, linked = path.with_suffix(f".{os.getpid()}.o"), path.with_suffix(f".{os.getpid()}")
        # linked without the flags: -ffast-math there would change every thread's arithmetic, -fopenmp would bring a
        # second OpenMP beside torch's
        for command in (
            ["cc", "-O2", *flags, "-fPIC", "-c", str(source), "-o", str(compiled)],
            ["cc", "-shared", str(compiled), "-lm", "-o", str(linked)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        compiled.unlink()
        os.replace(linked, path)
    return ctypes.CDLL(str(path))


def _processor_features() -> set[str]:
    """What decides which instructions a compiler may use for this processor; its name alone does not, in a VM."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return {line for line in lines if line.startswith(("model", "flags", "Features", "CPU "))}
    return {processor_name()}


def prepare() -> Machine:
    """Set this process up for fast training: safe bf16, and memory that is kept."""
    found = machine()
    try:
        set_up_bf16(found.bf16_setup)
    except (OSError, subprocess.SubprocessError) as error:  # the cache folder was copied from elsewhere, say
        warnings.warn(f"bf16 cannot be set up as it was before ({error}); doing without tiles", stacklevel=2)
        set_up_bf16("no tiles")
    keep_memory(True)
    return found


def keep_memory(keep: bool) -> None:
    """Whether memory that is freed stays with the process, which is faster, or goes back to the system, which is less.

    glibc hands every freed block above 128 kB back and takes it anew, page fault by page fault; a training step frees
    and takes the same gigabyte each time. Raising two thresholds keeps it, but then blocks lie side by side in one
    heap, with holes between them that no other block fits into: with activation checkpointing, two thirds of it.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_threshold = -1, -3
        for threshold in (mmap_threshold, trim_threshold):
            libc.mallopt(threshold, 2**31 - 1 if keep else 128 * 1024)
