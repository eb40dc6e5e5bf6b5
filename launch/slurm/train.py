"""Submit a training to SLURM: ``python3 -m launch.slurm.train --nodes=4 --config=... --stage=... --workdir=...``.

Each node has one task with all its GPUs. Two minutes before the time limit the tasks get SIGTERM, save the same step
and end; the job then requeues itself until the stage is trained. SLURM requeues a job that lost a node. ``--dry_run``
prints the job script.
"""

import argparse
import sys

from launch import remote


def script(arguments: argparse.Namespace) -> str:
    """Return the job script for ``sbatch``."""
    options = {
        "job-name": f"{arguments.name}-{arguments.stage}",
        "nodes": arguments.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": arguments.gpus,
        "cpus-per-task": arguments.cpus,
        "time": arguments.time,
        "signal": "TERM@120",
        "output": f"{arguments.workdir}/slurm-%j.log",
        "open-mode": "append",
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in options.items() if value)]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {option}" for option in arguments.sbatch)]
    return "\n".join(
        [
            *lines,
            f"srun --kill-on-bad-exit=1 {remote.train_command(arguments, arguments.python)}",
            "status=$?",
            f"if [ $status -eq 0 ] && ! {remote.finished(arguments)}; then",
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            "exit $status",
            "",
        ]
    )


def main(given: list[str] | None = None) -> int:
    """Submit the job, or print its script; return the status of ``sbatch``."""
    parser = remote.parser("Submit a training to SLURM.")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=8, help="per node; 0 for none")
    parser.add_argument("--cpus", type=int, default=16, help="per node")
    parser.add_argument("--time", default="24:00:00", help="limit of one turn of the job")
    parser.add_argument("--python", default=sys.executable, help="interpreter on the nodes")
    parser.add_argument("--sbatch", action="append", default=[], help="one more option, as --sbatch=--partition=gpu")
    arguments = remote.parse(parser, given)
    return remote.execute([["sbatch"]], dry_run=arguments.dry_run, text=script(arguments))


if __name__ == "__main__":
    sys.exit(main())
