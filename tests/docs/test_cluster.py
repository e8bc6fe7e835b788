"""The files of docs/cluster: as far as they can be checked without a scheduler."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mdm_models.commands.train import parse
from mdm_models.training.checkpoint.checkpoints import list_steps
from tests.made_data import PICTURE, write_shard

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "cluster"
JOBSET, PYTORCHJOB, SKYPILOT = (
    yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in ("jobset", "pytorchjob", "skypilot")
)
SCRIPTS = {
    "torchrun.sh": (FOLDER / "torchrun.sh").read_text(),
    "slurm.sbatch": (FOLDER / "slurm.sbatch").read_text(),
    "skypilot setup": "#!/bin/bash\n" + SKYPILOT["setup"],
    "skypilot run": "#!/bin/bash\n" + SKYPILOT["run"],
}
EACH_SCRIPT = pytest.mark.parametrize("name", SCRIPTS)


def pod(job: dict) -> dict:
    """The pod of a JobSet's job."""
    return job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


PODS = {
    "jobset": pod(JOBSET),
    "pytorchjob": PYTORCHJOB["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"],
}


@EACH_SCRIPT
def test_shellcheck_finds_nothing(name):
    found = subprocess.run(["shellcheck", "-"], input=SCRIPTS[name], capture_output=True, text=True, env=with_tools())
    assert found.returncode == 0, found.stdout


def with_tools(*folders: Path, **more: str) -> dict[str, str]:
    """The environment, with the programs of this Python's folder and of others in front."""
    path = os.pathsep.join([*map(str, folders), str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"PATH": path} | more


def training_commands() -> dict[str, list[str]]:
    """What each file has `mdm train` do."""
    texts = {name: SCRIPTS[name].replace("\\\n", " ") for name in ("slurm.sbatch", "skypilot run")}
    lines = {name: re.search(r"(?:mdm|mdm_models\.cli) train (.*)", text)[1] for name, text in texts.items()}
    values = {"$DATA": "/shared/CC12M", "$RUN": "/shared/runs/64"}
    commands = {name: [values.get(word, word) for word in shlex.split(line)] for name, line in lines.items()}
    for name, spec in PODS.items():
        words = spec["containers"][0]["command"]
        commands[name] = words[words.index("train") + 1 :]
    usage = re.search(r"torchrun\.sh (t2i.*)", SCRIPTS["torchrun.sh"])[1]
    return commands | {"torchrun.sh": shlex.split(usage)}


@pytest.mark.parametrize("name", training_commands())
def test_the_command_line_takes_the_training_command(recipe, name):
    chosen, *arguments = training_commands()[name]
    module = recipe(chosen)
    config, _ = parse(name, module.PRESETS, module.__doc__, arguments)
    assert config.out == "/shared/runs/64"
    assert config.optimizer.steps == 500_000


@pytest.mark.parametrize("name", PODS)
def test_a_pod_has_time_to_save_shared_memory_and_the_shared_folder(name):
    [container] = PODS[name]["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert PODS[name]["terminationGracePeriodSeconds"] > int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 300
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/shared", "/dev/shm"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in PODS[name]["volumes"]}


def test_the_jobset_meets_at_its_first_pod_with_as_many_machines_as_it_starts():
    [job] = JOBSET["spec"]["replicatedJobs"]
    command = " ".join(PODS["jobset"]["containers"][0]["command"])
    name = JOBSET["metadata"]["name"]
    assert f"--rdzv-endpoint={name}-{job['name']}-0-0.{name}:" in command
    spec = job["template"]["spec"]
    assert f"--nnodes={spec['parallelism']} " in command
    assert spec["parallelism"] == spec["completions"]
    assert PODS["jobset"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert "--nproc-per-node=8 " in command


def test_all_machines_of_the_pytorchjob_are_alike():
    replicas = PYTORCHJOB["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    assert replicas["Master"]["replicas"] + replicas["Worker"]["replicas"] == 4
    assert PODS["pytorchjob"]["containers"][0]["name"] == "pytorch"
    gpus = PODS["pytorchjob"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert PYTORCHJOB["spec"]["nprocPerNode"] == str(gpus)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (2, False), (75, True), (137, True)])
def test_the_slurm_job_goes_back_into_the_queue_unless_finished_or_refused(tmp_path, code, requeued):
    stand_in = {
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol; [ "$1" = show ] && printf "node-1\\nnode-2\\n" || true',
        "srun": f'shift; SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS_PER_NODE=8 "$@"; exit {code}',
        "mdm": f'echo "$MASTER_ADDR $MASTER_PORT $RANK $LOCAL_RANK $WORLD_SIZE $*" > {tmp_path}/mdm',
    }
    for name, script in stand_in.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_NTASKS": "16"}
    ended = subprocess.run(["bash", FOLDER / "slurm.sbatch"], env=with_tools(tmp_path, **job))
    assert ended.returncode == code
    assert ("requeue 123456" in (tmp_path / "scontrol").read_text()) == requeued
    arguments = "train t2i_cc12m --preset 64 --data /shared/CC12M --out /shared/runs/64 --patience 300"
    assert (tmp_path / "mdm").read_text() == f"node-1 23456 9 1 16 {arguments}\n"


def test_torchrun_sh_trains_on_two_machines_that_are_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shard = write_shard(tmp_path / "a.tar", {key: {"png": PICTURE, "txt": b"black"} for key in "abcd"})
    small = "--preset tiny-32 --size 16 --steps 2 --batch-size 2 --sample-every 0 --workers 0 --holdout 0 --device cpu"
    environment = with_tools(NODES="2", HEAD="127.0.0.1", PORT=port, PROCESSES="1", PYTHONPATH=str(ROOT))
    command = [FOLDER / "torchrun.sh", "t2i_cc12m", *small.split(), "--data", shard, "--out", tmp_path / "run"]
    both = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [machine.communicate(timeout=300)[1] for machine in both]
    assert [machine.returncode for machine in both] == [0, 0], said
    assert [path.name for path in list_steps(tmp_path / "run")] == ["step-00000002"]
    assert not any("--max-restarts" in line for line in said)
