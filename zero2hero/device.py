"""Which device computes: the best one there is, unless the user names another."""

from __future__ import annotations

import torch

from zero2hero.errors import UserError


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """`"auto"`: a CUDA (or ROCm) GPU, else an Apple GPU (mps), else the CPU. Other names are checked.

    Raises:
        UserError: an unknown device, or one that this machine or this torch build does not have.
    """
    if str(name) == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {str(name)!r}; use auto, cpu, cuda, cuda:0 or mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            have = f"{count} CUDA device{'s' * (count != 1)}" if count else "no CUDA device that torch can use"
            raise UserError(f"device {str(name)!r} is not available: this machine has {have}. Use --device auto.")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' is not available: it needs a Mac with Apple silicon. Use --device auto.")
    elif device.type not in ("cpu", "cuda", "mps", "meta"):
        raise UserError(f"device {str(name)!r} is not supported; use auto, cpu, cuda, cuda:0 or mps")
    return device
