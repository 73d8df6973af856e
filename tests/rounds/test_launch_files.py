"""accelerate's configurations and the job for Slurm, as they start runs; on CPU processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import LLAMA, save_tiny

from fastdpo.recipes.files import files, main

ROOT = Path(__file__).parents[2]
CONFIGS = {
    name: path for name, path in files().items() if re.fullmatch(r"[a-z]+\d?-\d+.yaml", name)
}
SLURM = files()["fastdpo.slurm"]
ENGINES = {
    "ddp": "ddp",
    "fsdp2": "fsdp2",
    "hsdp": "fsdp2",
    "zero2": "deepspeed",
    "zero3": "deepspeed",
}
PAIRS = [
    {"prompt": f"question {i}", "chosen": "be nice " * (1 + i % 3), "rejected": "no " * (i % 4 + 1)}
    for i in range(8)
]


def run(words, folder, **environment):
    """A command in a folder, with this checkout and these programs first."""
    paths = {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    values = {**os.environ, **paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    values["PATH"] = f"{folder}:{values['PATH']}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(words, cwd=folder, env=values, **pipes) as job:
        try:
            said, _ = job.communicate(timeout=500)
        except subprocess.TimeoutExpired:
            job.terminate()  # a launcher ends its processes then
            said, _ = job.communicate()
    return job.returncode, said


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    save_tiny(LLAMA, folder / "model")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return folder


TRAIN = ["train", "--model=model", "--dataset=pairs.jsonl", "--bf16=false", "--batch_size=4",
         "--max_length=64", "--max_tokens=128", "--reference_cache=null"]  # fmt: skip


def test_there_is_one_for_each_engine_and_number_of_gpus():
    assert len(CONFIGS) == 4 * 6 + 3
    for name, path in CONFIGS.items():
        engine, gpus = path.stem.split("-")
        told = yaml.safe_load(path.read_text())
        several = int(gpus) > 8
        assert told["num_processes"] == int(gpus) and told["mixed_precision"] == "no"
        assert told["num_machines"] == max(1, int(gpus) // 8)
        lines = path.read_text().splitlines()
        assert lines[0].startswith(f"# {gpus} GPUs, ") and name in lines[2] and len(lines[0]) < 100
        assert any("--machine_rank" in line for line in lines) == several
        # What differs between those of an engine is how many there are.
        other = yaml.safe_load(CONFIGS[f"{engine}-16.yaml"].read_text())
        counts = {"num_processes", "num_machines", "parallelism_config"}
        assert {k: told[k] for k in {*told} - counts} == {k: other[k] for k in {*other} - counts}
        if engine == "hsdp":
            sizes = told["parallelism_config"].values()
            assert list(sizes) == [told["num_machines"], 8]


@pytest.mark.parametrize("path", CONFIGS.values(), ids=CONFIGS)
def test_accelerate_reads_them(path):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    words = ["--config_file", str(path), "-m", "fastdpo.cli", "train"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    engine, gpus = path.stem.split("-")
    assert args.num_processes == int(gpus) and args.mixed_precision == "no"
    assert args.num_machines == max(1, int(gpus) // 8)
    found = {"ddp": args.multi_gpu, "fsdp2": args.use_fsdp, "deepspeed": args.use_deepspeed}
    assert [name for name, used in found.items() if used] == [ENGINES[engine]]
    assert bool(getattr(defaults, "parallelism_config", None)) == (engine == "hsdp")


def test_the_command_lists_and_copies(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [x.split()[0] for x in listed] == [*files()] and all(len(x) < 120 for x in listed)
    assert listed.index(next(x for x in listed if x.startswith("fsdp2-16"))) > 0
    assert main(["fsdp2-8.yaml", "fastdpo.slurm", "storm-7b.yaml"]) == 0
    assert {x.name for x in tmp_path.iterdir()} == {
        "fsdp2-8.yaml",
        "fastdpo.slurm",
        "storm-7b.yaml",
    }
    capsys.readouterr()
    for name, why in (("fsdp2-8.yaml", "in this folder already"), ("fsdp-8.yaml", "no file")):
        assert main([name, "zero2-8.yaml"]) == 2 and why in capsys.readouterr().err
    assert not (tmp_path / "zero2-8.yaml").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ddp-2.yaml", "fsdp2-2.yaml", "zero2-2.yaml", "zero3-2.yaml", "hsdp-16.yaml"]
)
def test_a_launch_by_one_gives_its_engine(start, tmp_path, name):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    config = tmp_path / name
    told = yaml.safe_load(CONFIGS[name].read_text())
    if name == "hsdp-16.yaml":  # on four processes of one machine
        told |= {"num_machines": 1, "num_processes": 4}
        told["parallelism_config"]["parallelism_config_dp_shard_size"] = 2
    config.write_text(yaml.safe_dump(told))
    program = tmp_path / "program.py"
    program.write_text(
        "from fastdpo.train.config import TrainConfig\n"
        "from fastdpo.train.launch import launched\n"
        "engine = launched(TrainConfig())\n"
        "mesh = getattr(engine, 'mesh', None)\n"
        "if engine.is_main:\n"
        "    print('engine', engine.name, engine.world, mesh and tuple(mesh.shape))\n"
    )
    words = ["accelerate", "launch", f"--config_file={config}", "--main_process_port=0"]
    code, said = run([*words, str(program)], tmp_path)
    assert code == 0, said
    engine = name.partition("-")[0]
    meshes = {"fsdp2": (2,), "hsdp": (2, 2)}
    wanted = f"engine {ENGINES[engine]} {told['num_processes']} {meshes.get(engine)}\n"
    assert wanted in said, said


def slurm(folder, *words, machines=2):
    """The job on so many machines, which are processes here, with one GPU each, which is a CPU."""
    (folder / "srun").write_text(
        "#!/bin/bash\n"
        "while [[ $1 == --* ]]; do shift; done\n"
        'for ((i = 0; i < SLURM_NNODES; i++)); do SLURM_NODEID=$i "$@" & all+=($!); done\n'
        'for one in "${all[@]}"; do wait $one || code=$?; done; exit ${code:-0}\n'
    )
    (folder / "scontrol").write_text(
        "#!/bin/bash\n"
        'if [ "$1" = show ]; then echo localhost; echo other; else echo "$@" >> asked; fi\n'
    )
    for name in ("srun", "scontrol"):
        (folder / name).chmod(0o755)
    job = {"SLURM_NNODES": str(machines), "SLURM_GPUS_ON_NODE": "1"}
    job |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "a[1-2]"}
    return run(["bash", "fastdpo.slurm", *words], folder, **job)


def test_the_job_is_a_script_and_says_what_it_needs(tmp_path):
    assert subprocess.run(["bash", "-n", SLURM]).returncode == 0
    shutil.copy(SLURM, tmp_path)
    code, said = slurm(tmp_path)
    assert code == 2 and "usage: sbatch fastdpo.slurm COMMAND OPTIONS" in said
    code, said = run(["bash", "fastdpo.slurm", "train"], tmp_path)
    assert code and "the job has no GPUs; give --gpus-per-node" in said


@pytest.mark.slow
def test_the_job_trains_on_two_machines_and_goes_back_into_the_queue(start, tmp_path):
    folder = tmp_path
    for name in ("model", "pairs.jsonl"):
        (folder / name).symlink_to(start / name)
    for path in (SLURM, CONFIGS["fsdp2-8.yaml"]):
        shutil.copy(path, folder)
    code, said = slurm(folder, *TRAIN, "--output_dir=out")
    assert code == 0, said
    assert (folder / "out" / "policy" / "model.safetensors").is_file()
    code, said = slurm(folder, *TRAIN, "--output_dir=out", "--model=nothing")
    assert code and "error: " in said and not (folder / "asked").exists()
    # The signal that comes before the end, from a run that takes no notice of it.
    (folder / "accelerate").write_text(
        "#!/bin/bash\nkill -USR1 $(ps -o ppid= -p $PPID); sleep 1; exit 7\n"
    )
    (folder / "accelerate").chmod(0o755)
    code, said = slurm(folder, *TRAIN, machines=1)
    assert code == 7 and "goes back into the queue" in said
    assert (folder / "asked").read_text() == f"requeue {os.getpid()}\n"
