"""Two machines: network namespaces that see each other over a cable, and nothing else. And the job files for more."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from zero2hero.command_line import describe
from zero2hero.config import PretrainConfig

ROOT = Path(__file__).parents[2]
PROGRAM = """
import torch
from zero2hero.train.parallel import join
with join(torch.device("cpu")) as (ranks, _):
    gradients = [torch.full((3,), float(ranks.rank + 1))]
    ranks.sum_(gradients)
    names = ranks.gather(f"{ranks.local_rank} of {ranks.rank}")
    print(gradients[0].tolist(), names, flush=True)
"""


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them, 10.99.0.1 and 10.99.0.2."""
    if not shutil.which("ip") or os.geteuid() != 0:
        pytest.skip("needs root and `ip` to create network namespaces")
    names = [f"z2h{os.getpid()}{end}" for end in "ab"]
    try:
        for command in (
            f"ip netns add {names[0]}",
            f"ip netns add {names[1]}",
            f"ip link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}",
            *(f"ip -n {name} addr add 10.99.0.{i}/24 dev {name}" for i, name in enumerate(names, 1)),
            *(f"ip -n {name} link set {link} up" for name in names for link in ("lo", name)),
        ):
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"cannot create network namespaces here: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_two_machines_of_two_ranks_each(machines, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    processes = []
    for node, name in enumerate(machines):
        torchrun = [
            "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2", "--node-rank", str(node),
            "--master-addr", "10.99.0.1", "--master-port", "29500", str(tmp_path / "program.py"),
        ]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": name}
        command = ["ip", "netns", "exec", name, sys.executable, *torchrun]
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    lines = "".join(out for out, _ in outputs).splitlines()
    assert lines == ["[10.0, 10.0, 10.0] ['0 of 0', '1 of 1', '0 of 2', '1 of 3']"]  # and one rank speaks


def test_the_slurm_file_starts_torchrun_on_each_machine_and_resumes(tmp_path):
    for name, says in {"scontrol": "printf 'node1\\nnode2\\n'", "srun": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{says}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "deploy" / "slurm.sh"), "--output_dir", "run"]

    def run() -> str:
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert re.search(
        r"torchrun --nnodes 2 .*--rdzv-endpoint node1:29500 -m zero2hero pretrain --output_dir run$", run()
    )
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "LATEST").write_text("step-000001")
    assert run().endswith("--output_dir run --resume\n")


def test_the_kubernetes_file_is_a_job_of_equal_pods():
    service, job = yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    command = job["spec"]["template"]["spec"]["containers"][0]["command"][-1]
    assert "--nnodes 4" in command
    assert f"{service['metadata']['name']}-0.{service['metadata']['name']}" in command


def test_the_page_names_options_that_exist():
    known = {option.name for option in describe(PretrainConfig)}
    page = (ROOT / "docs" / "distributed.md").read_text()
    named = set(re.findall(r"--([a-z_]+(?:\.[a-z_]+)?)", page)) - {"nproc", "nnodes", "node", "master"}
    assert {"train.fsdp", "train.tp_size", "resume"} <= named
    assert named <= known | {"config"}
