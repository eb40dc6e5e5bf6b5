"""What the programs for SLURM and Cloud TPU would run, read from their dry runs."""

import json
import shlex
import subprocess

import pytest

from launch.slurm import train as slurm
from launch.tpu import jobset, queued_resource

TRAIN = ["--config=configs/wan_1_3b.py", "--stage=distill", "--workdir=/work/my run"]
MORE = ["--", "--config.parallel.fsdp=8"]


def dry(main, *arguments, capsys):
    assert main([*arguments, "--dry_run", *MORE]) == 0
    return capsys.readouterr().out


def test_slurm_job_is_valid_shell_that_goes_on_until_trained(capsys, tmp_path):
    out = dry(slurm.main, *TRAIN, "--nodes=4", "--python=python", "--sbatch=--partition=gpu", capsys=capsys)
    command, _, rest = out.partition("\n")
    script, end = rest.rsplit("END\n", 1)
    assert command == "sbatch <<'END'" and end == ""
    options = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--signal=TERM@120", "--requeue"} <= {*options}
    assert "--partition=gpu" in options
    (line,) = [line for line in script.splitlines() if line.startswith("srun")]
    expected = ["python", "-m", "launch.train", *TRAIN, "--config.parallel.fsdp=8"]
    assert shlex.split(line)[2:] == expected
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0

    # Run with stand-ins: trained or not, status 0 or not.
    work = tmp_path / "my run"
    (work / "distill").mkdir(parents=True)
    stand_in = "srun() { return $WANTED; }; scontrol() { echo scontrol $*; }; SLURM_JOB_ID=7\n"
    script = stand_in + script.replace("/work/my run", str(work))

    def shell(wanted):
        done = subprocess.run(["bash"], input=script, text=True, capture_output=True, env={"WANTED": str(wanted)})
        return done.returncode, done.stdout

    assert shell(0) == (0, "scontrol requeue 7\n")
    assert shell(2) == (2, "")
    (work / "distill" / "weights.safetensors").touch()
    assert shell(0) == (0, "")


def test_queued_resource_commands(capsys):
    where = ["--zone=us-east5-a", "--type=v5p-128", "--name=pod"]
    gcloud = ["gcloud", "compute", "tpus"]

    def lines(action, *more):
        out = dry(queued_resource.main, action, *TRAIN, *where, *more, capsys=capsys)
        return [shlex.split(line) for line in out.splitlines()]

    (create,) = lines("create", "--spot")
    assert create[:5] == [*gcloud, "queued-resources", "create"]
    assert {"pod", "--node-id=pod", "--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5", "--spot"} <= {
        *create
    }
    (create,) = lines("create", "--slices=2", "--project=lab")
    assert {"--node-count=2", "--node-prefix=pod", "--project=lab"} <= {*create}
    assert [line[6] for line in lines("copy", "--slices=2")] == ["pod-0:causvid_jax", "pod-1:causvid_jax"]
    (install,) = lines("install")
    assert install[-1] == "--command=cd causvid_jax && python3 -m pip install -e '.[tpu]'"
    first, second = lines("train", "--slices=2")
    assert (first[5], second[5]) == ("pod-0", "pod-1") and "--worker=all" in first
    there = shlex.split(first[-1].removeprefix("--command=cd causvid_jax && "))
    assert there == ["python3", "-m", "launch.train", *TRAIN, "--config.parallel.fsdp=8"]
    assert lines("delete") == [[*gcloud, "queued-resources", "delete", "pod", "--zone=us-east5-a", "--force"]]


def test_jobset_has_a_pod_for_every_host(capsys):
    options = ["--image=registry/causvid", "--claim=filestore", "--slices=2", "--topology=v5p:4x4x4"]
    out = dry(jobset.main, *TRAIN, *options, capsys=capsys)
    assert out.startswith("kubectl apply -f - <<'END'\n")
    made = json.loads(out.partition("\n")[2].removesuffix("END\n"))
    (slices,) = made["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert slices["replicas"] == 2 and job["parallelism"] == job["completions"] == 16
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5p-slice"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4x4"
    train, finished = container["command"][2].split(" && ")
    assert shlex.split(train) == ["python3", "-m", "launch.train", *TRAIN, "--wait=900", "--config.parallel.fsdp=8"]
    assert shlex.split(finished) == ["test", "-e", "/work/my run/distill/weights.safetensors"]


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (jobset.main, ["--image=i", "--claim=c", "--topology=v5p-128"], "'v5p-128'; accepted: v4, v5e, v5p, v6e with"),
        (queued_resource.main, ["create", "--zone=z", "--type=v9-8"], "'v9-8'; give its --runtime"),
        (slurm.main, ["--stage=sampling"], "invalid choice: 'sampling'"),
    ],
)
def test_impossible_requests_are_refused(main, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*TRAIN, *arguments, "--dry_run"])
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_missing_tool_is_one_sentence(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.main(TRAIN) == 2
    assert (
        capsys.readouterr().err == "error: sbatch is not installed here; --dry_run prints the input that it would get\n"
    )
