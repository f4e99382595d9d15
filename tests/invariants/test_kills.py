"""Invariant 10: killed at any byte and resumed, a run ends with the very bits of the run that nobody killed.

The run is `pretrain` itself in a process of its own. It is killed at moments drawn at random (SIGKILL); before every
call to the file system that a save makes (SIGKILL); and where a file of a checkpoint has grown to k bytes, for every
tensor's end and more, by the kernel (RLIMIT_FSIZE, whose signal leaves a process as little time as SIGKILL does).
So that each process is cheap, it is forked from one that has imported everything: this file, run as a program.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

STEPS, SAVE_STEPS = 640, 2  # more than all these processes do before they are killed
RANDOM_MOMENTS = 20
CHANGING = {
    "time",
    "tokens_per_second",
    "data_share",
    "peak_share",
    "machine",
    "peak_memory",
}  # in metrics.jsonl, from run to run
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "shutil.rmtree"}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("kills")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.getcwd()}
    environment["ZERO2HERO_CACHE"] = str(folder / "cache")
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "outcome.json").read_text())


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(outcome):
    assert outcome["killed"]["files"] == outcome["straight"]["files"]
    assert len(outcome["straight"]["files"]) >= 6


def test_every_kill_struck(outcome):
    assert outcome["kills"] == outcome["planned"]
    assert outcome["planned"]["file event"] >= 30
    assert outcome["planned"]["byte"] >= 30


def test_its_losses_are_those_of_the_straight_run(outcome):
    assert outcome["killed"]["metrics"] == outcome["straight"]["metrics"]
    steps = [row["step"] for row in outcome["straight"]["metrics"] if "grad_norm" in row]
    assert steps == sorted(set(steps))
    assert len(steps) > 50


def test_nothing_damaged_or_half_written_was_left(outcome):
    assert "damaged" not in outcome["stderr"]
    assert outcome["killed"]["left"] == outcome["straight"]["left"]


def test_signals_stop_it_with_the_exit_codes_of_shells(outcome):
    assert outcome["exit codes"] == [143, 130]


# --- the program that forks -----------------------------------------------------------------------------------


def main(folder: Path) -> None:
    import jsonargparse  # noqa: F401 (imported once, before forking)
    import matplotlib.backends.backend_agg  # noqa: F401
    import torch
    import torch._dynamo
    import yaml  # noqa: F401

    from zero2hero import machine
    from zero2hero.data.worlds import world

    torch.set_num_threads(1)
    machine.prepare = lambda: machine.Machine("a processor", 1, 1e9, 0.0, "as is")  # type: ignore[assignment]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    (folder / "text.txt").write_text("\n\n".join(world("markov").documents(count=120)))
    generator = random.Random(0)

    straight, killed = folder / "straight", folder / "killed"
    assert wait(start(straight, lambda: count_events(folder / "events"))) == 0
    events = json.loads((folder / "events").read_text())
    files = [*newest(straight).iterdir(), straight / "checkpoints" / "LATEST"]
    begun, begins = os.pipe()
    plans = [("file event", lambda n=n: die_before_event(n)) for n in range(events)]
    plans += [("byte", lambda name=file.name, k=k: die_at_byte(name, k)) for file in files for k in boundaries(file)]
    plans += [
        ("random moment", lambda n=n: at_step(n % 10, lambda: os.write(begins, b"."))) for n in range(RANDOM_MOMENTS)
    ]
    generator.shuffle(plans)

    codes = [
        wait(start(killed, lambda s=s: at_step(7, lambda: os.kill(os.getpid(), s))))
        for s in (signal.SIGTERM, signal.SIGINT)
    ]
    kills: Counter[str] = Counter()
    for kind, arm in plans:
        child = start(killed, arm)
        if kind == "random moment":
            os.read(begun, 1)
            time.sleep(generator.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        kills[kind] += wait(child) in (-signal.SIGKILL, -signal.SIGXFSZ)
    assert wait(start(killed)) == 0
    outcome = {
        "straight": result(straight), "killed": result(killed), "kills": kills, "exit codes": codes,
        "planned": Counter(kind for kind, _ in plans), "stderr": (folder / "stderr").read_text(),
    }  # fmt: skip
    (folder / "outcome.json").write_text(json.dumps(outcome))


def start(output_dir: Path, arm: Callable[[], None] | None = None) -> int:
    """Fork a process that trains, or goes on with training; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(output_dir.parent / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        if arm:
            arm()
        code = train(output_dir)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def train(output_dir: Path) -> int:
    from zero2hero.cli import main

    settings = {
        "data": output_dir.parent / "text.txt", "output_dir": output_dir, "precision": "fp32", "device": "cpu",
        "report_to": "[]", "tokenizer.kind": "char", "model.hidden_size": 16, "model.num_hidden_layers": 1,
        "model.num_attention_heads": 2, "model.dropout": 0.1, "train.max_steps": STEPS, "train.max_length": 32,
        "train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 2, "train.logging_steps": 3,
        "train.save_steps": SAVE_STEPS, "train.eval_steps": 40, "train.sample_steps": 1000, "train.keep_best": 1,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in settings.items()]
    return main(["pretrain", *words, *(["--resume"] if (output_dir / "run.yaml").exists() else [])])


def boundaries(path: Path) -> list[int]:
    """Where to cut a file off: at its beginning, middle and end, and between what a safetensors file is made of."""
    size = path.stat().st_size
    places = {0, 1, size // 2, size - 1}
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:begin])
        places |= {8, begin, *(begin + entry["data_offsets"][0] for entry in header.values())}
    return sorted(place for place in places if place < size)


def wait(child: int) -> int:
    """The exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def newest(output_dir: Path) -> Path:
    return output_dir / "checkpoints" / f"step-{STEPS:06d}"


def result(output_dir: Path) -> dict[str, Any]:
    files = [*newest(output_dir).iterdir(), output_dir / "model.safetensors"]
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "files": {str(p.relative_to(output_dir)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)},
        "metrics": [{key: value for key, value in row.items() if key not in CHANGING} for row in rows],
        "left": sorted(p.name for p in (output_dir / "checkpoints").iterdir()),
    }


# --- how a process is armed before it trains ------------------------------------------------------------------


def in_save(number: int, before: Callable[[], None], after: Callable[[], None] = lambda: None) -> None:
    """Call `before` and `after` around the `number`th save of this process."""
    from zero2hero.train.loop import Trainer

    save, calls = Trainer.save, iter(range(1, 10**6))

    def wrapped(trainer: Trainer, *arguments: Any) -> None:
        chosen = next(calls) == number
        if chosen:
            before()
        save(trainer, *arguments)
        if chosen:
            after()

    Trainer.save = wrapped  # type: ignore[method-assign]


def on_file_events(act: Callable[[int, str], None]) -> Callable[[], None]:
    """From the returned function's call on, `act(number, path)` happens before every call to the file system."""
    state = {"armed": False, "number": 0}

    def hook(event: str, arguments: tuple) -> None:
        if state["armed"] and event in FILE_EVENTS:
            number, state["number"] = state["number"], state["number"] + 1
            act(number, str(arguments[0]))

    sys.addaudithook(hook)
    return lambda: state.update(armed=True)


def count_events(path: Path) -> None:
    numbers: list[int] = []
    in_save(6, on_file_events(lambda n, _: numbers.append(n)), lambda: os.write(write_to, str(len(numbers)).encode()))
    write_to = os.open(path, os.O_WRONLY | os.O_CREAT)


def die_before_event(chosen: int) -> None:
    """In the third save: by then there are old checkpoints to delete."""
    in_save(3, on_file_events(lambda n, _: os.kill(os.getpid(), signal.SIGKILL) if n == chosen else None))


def die_at_byte(name: str, k: int) -> None:
    """In the second save, when the file `name` is about to grow beyond k bytes."""
    from zero2hero.train import checkpoint

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (k, resource.RLIM_INFINITY))

    def on_open(_: int, path: str) -> None:
        if name in Path(path).name:
            limit()

    write_tensors = checkpoint.write_tensors

    def write(path: Path, tensors: Any) -> None:  # safetensors opens its file by itself
        if path.name == name:
            limit()
        write_tensors(path, tensors)

    armed = on_file_events(on_open)
    if name.endswith(".safetensors"):
        in_save(2, lambda: setattr(checkpoint, "write_tensors", write))
    else:
        in_save(2, armed)


def at_step(number: int, act: Callable[[], object]) -> None:
    """Before the `number`th step of this process; 0 is before anything."""
    from zero2hero.train.loop import Trainer

    step, calls = Trainer.step, iter(range(1, 10**6))

    def wrapped(trainer: Trainer) -> None:
        if next(calls) == number:
            act()
        step(trainer)

    Trainer.step = wrapped  # type: ignore[method-assign]
    if number == 0:
        act()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
