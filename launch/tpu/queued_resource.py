"""Train on TPU VMs from a queued resource: ``python3 -m launch.tpu.queued_resource ACTION --zone=... --type=v5p-128``.

``create`` requests the slices, ``copy`` copies this checkout to every host, ``install`` installs it there, ``train``
runs ``launch.train`` on all hosts until the stage is trained or stopped, ``delete`` deletes the slices. The hosts find
each other by the metadata of the pod. ``--dry_run`` prints the ``gcloud`` commands.
"""

import argparse
import sys

from launch import remote

RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
FOLDER = "causvid_jax"
GCLOUD = ["gcloud", "compute", "tpus"]


def commands(arguments: argparse.Namespace) -> list[remote.Command]:
    """Return the commands of ``arguments.action``, one command for each slice where each slice has its own."""
    place = [f"--zone={arguments.zone}", *([f"--project={arguments.project}"] if arguments.project else [])]
    name, slices = arguments.name, arguments.slices
    nodes = [name] if slices == 1 else [f"{name}-{i}" for i in range(slices)]

    def on_hosts(line: str) -> list[remote.Command]:
        return [[*GCLOUD, "tpu-vm", "ssh", node, *place, "--worker=all", f"--command={line}"] for node in nodes]

    if arguments.action == "create":
        which = [f"--node-id={name}"] if slices == 1 else [f"--node-count={slices}", f"--node-prefix={name}"]
        kind = [f"--accelerator-type={arguments.type}", f"--runtime-version={arguments.runtime}"]
        spot = ["--spot"] if arguments.spot else []
        return [[*GCLOUD, "queued-resources", "create", name, *place, *which, *kind, *spot]]
    if arguments.action == "delete":
        return [[*GCLOUD, "queued-resources", "delete", name, *place, "--force"]]
    if arguments.action == "copy":
        copy = ["--recurse", "--worker=all"]
        return [[*GCLOUD, "tpu-vm", "scp", ".", f"{node}:{FOLDER}", *place, *copy] for node in nodes]
    if arguments.action == "install":
        return on_hosts(f"cd {FOLDER} && python3 -m pip install -e '.[tpu]'")
    return on_hosts(f"cd {FOLDER} && {remote.train_command(arguments)}")


def main(given: list[str] | None = None) -> int:
    """Run one action, or print its commands; return the first status that is not 0, else 0."""
    parser = remote.parser("Train on TPU VMs from a queued resource.")
    parser.add_argument("action", choices=("create", "copy", "install", "train", "delete"))
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", default="")
    parser.add_argument("--type", required=True, help=f"accelerator type, for example v5p-128; {', '.join(RUNTIMES)}")
    parser.add_argument("--runtime", default="", help="version of the TPU VM's software; default: by the type")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--spot", action="store_true", help="cheaper, and taken back at any time")
    arguments = remote.parse(parser, given)
    generation = arguments.type.partition("-")[0]
    arguments.runtime = arguments.runtime or RUNTIMES.get(generation, "")
    if not arguments.runtime:
        parser.error(f"--type is {arguments.type!r}; give its --runtime, or one of {', '.join(RUNTIMES)}")
    return remote.execute(commands(arguments), dry_run=arguments.dry_run)


if __name__ == "__main__":
    sys.exit(main())
