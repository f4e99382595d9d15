"""Data sets of the Hugging Face hub, through the `datasets` library, kept quiet and kept in its place.

The library is imported on first use (it takes seconds), with its progress bars and telemetry off and its
files under the project's cache folder. Only data is read: code that a data set ships is never run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from zero2hero.errors import UserError, did_you_mean
from zero2hero.io import cache_folder

STREAM_ABOVE = 256 * 2**20  # bytes; a larger data set, or one of unknown size, is not stored but streamed


def datasets_folder() -> Path:
    """Where the `datasets` library keeps its files for this project."""
    return cache_folder() / "datasets"


def datasets_library() -> Any:
    """The `datasets` module, silent and without telemetry."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # it may have been imported before
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    return datasets


def parse_hub_name(spec: str) -> tuple[str, str | None, str | None]:
    """`owner/name`, `owner/name:split` or `owner/name:config:split` -> (name, config, split)."""
    name, *rest = spec.split(":")
    return name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else None


class HubDataset:
    """One split of a hub data set. `fingerprint` holds the commit, so a changed data set is a new one.

    Raises:
        UserError: no such data set, configuration or split; no access; no network.
    """

    def __init__(self, name: str, config: str | None, split: str):
        self.name, self.split = name, split
        datasets = datasets_library()
        cache_dir = datasets_folder()
        if not (cache_dir / name.replace("/", "___")).exists():  # else it may be opened without a network
            _check_access(name)
        try:
            self.builder = datasets.load_dataset_builder(name, config, cache_dir=str(cache_dir))
        except Exception as error:  # of many kinds: no data files, code instead of data, a missing config
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"cannot open the hub data set '{name}': {reason}") from error
        self.splits = [str(key) for key in self.builder.info.splits or self.builder.config.data_files or ()]
        if self.splits and split not in self.splits:
            raise UserError(
                f"the hub data set '{name}' has no split '{split}'.{did_you_mean(split, self.splits)} "
                f"Splits: {', '.join(self.splits)}. Name one as {name}:{self.splits[0]}."
            )
        self.fingerprint = f"{name}:{self.builder.config.name}:{split}@{self.builder.hash}"

    def rows(self) -> Iterator[tuple[Any, str]]:
        """Every record, with where it stands."""
        return self._numbered(self._open, f"{self.name}:{self.split}")

    def shards(self) -> list[tuple[str, Callable[[], Iterator[tuple[Any, str]]]]]:
        """(name, function that streams its records) of every part that can be read by itself."""
        try:
            stream = self.builder.as_streaming_dataset(split=self.split)
        except (OSError, RuntimeError) as error:
            raise UserError(f"reading the hub data set '{self.name}' failed: {error}") from error
        count = stream.n_shards  # also where newer versions have `num_shards`
        names = [f"{self.name}:{self.split}, shard {index + 1} of {count}" for index in range(count)]
        open_one = [partial(stream.shard, num_shards=count, index=index) for index in range(count)]
        return [(name, partial(self._numbered, open, name)) for name, open in zip(names, open_one)]

    def _open(self) -> Iterable[Any]:
        size = self.builder.info.dataset_size or self.builder.info.download_size
        if size is None or size > STREAM_ABOVE:
            return self.builder.as_streaming_dataset(split=self.split)
        self.builder.download_and_prepare()
        return self.builder.as_dataset(split=self.split)

    def _numbered(self, open: Callable[[], Iterable[Any]], name: str) -> Iterator[tuple[Any, str]]:
        try:
            for number, row in enumerate(open(), start=1):
                yield row, f"{name}, row {number}"
        except (OSError, RuntimeError) as error:
            raise UserError(f"reading the hub data set '{self.name}' failed: {error}") from error


def _check_access(name: str) -> None:
    """Ask the hub once, without the library's minute of retries, whether the data set is there for us."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except GatedRepoError as error:
        raise UserError(f"the hub data set '{name}' is gated: ask for access on its page.") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"no file, folder or hub data set '{name}' (a private one needs `hf auth login`).") from error
    except (HfHubHTTPError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"no file or folder '{name}', and the hub cannot be reached ({reason}).") from error
    except Exception as error:  # the HTTP client's own kinds (httpx or requests, by version)
        raise UserError(f"no file or folder '{name}', and the hub cannot be reached ({error}).") from error
