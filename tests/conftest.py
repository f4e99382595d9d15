"""Every test runs with a cache folder of its own run, two threads at most, and safe bf16."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import pytest
from hypothesis import HealthCheck, settings

# the same examples every time, and no verdict on how long a busy machine takes to make them
settings.register_profile(
    "steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
settings.load_profile("steady")

DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def own_cache():
    """Token caches and measurements of tests stay out of the user's cache; the machine is measured once."""
    with tempfile.TemporaryDirectory() as folder:
        previous = os.environ.get("ZERO2HERO_CACHE")
        os.environ["ZERO2HERO_CACHE"] = folder
        yield Path(folder)
        if previous is None:
            del os.environ["ZERO2HERO_CACHE"]
        else:
            os.environ["ZERO2HERO_CACHE"] = previous


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, where it is present beside the project."""
    if not DATA.is_dir():
        pytest.skip("needs real data in ../shared/data")
    return DATA


@pytest.fixture(scope="session")
def all_threads() -> int:
    """How many threads torch takes by itself."""
    import torch

    return torch.get_num_threads()


@pytest.fixture(scope="module")
def one_thread(all_threads: int) -> Iterator[None]:
    """For tiny tensors: on a busy machine, threads that wait for each other cost more than they bring."""
    import torch

    torch.set_num_threads(1)
    yield
    torch.set_num_threads(all_threads)


@pytest.fixture(scope="session")
def bf16(own_cache: Path, all_threads: int) -> None:
    """Needed by every test that computes in bf16: without it the first product can kill the process."""
    import torch

    from zero2hero import machine

    threads = torch.get_num_threads()
    torch.set_num_threads(all_threads)  # measured once, for the threads that training has
    machine.prepare()
    torch.set_num_threads(threads)
