"""Every test runs with a cache folder of its own run, two threads at most, and safe bf16."""

import os
import tempfile
from pathlib import Path

# before torch loads its OpenMP runtime: threads that wait give the core away after a moment
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import pytest

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
