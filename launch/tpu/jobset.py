"""Train on TPU slices of a GKE cluster: ``python3 -m launch.tpu.jobset --image=... --topology=v5p:4x4x4 ...``.

Applies by ``kubectl`` a JobSet with a job for each slice and a pod for each of its hosts, on a cluster where JobSet is
installed. The hosts find each other by GKE's environment variables. A preempted pod saves a checkpoint, and the JobSet
restarts all pods from there. ``--dry_run`` prints the JobSet.
"""

import argparse
import json
import math
import sys
from typing import Any

from launch import remote

ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
CHIPS_PER_HOST = 4


def jobset(arguments: argparse.Namespace, kind: str, topology: str) -> dict[str, Any]:
    """Return the JobSet for slices of ``topology`` (``4x4x4``, in chips) of TPU ``kind``, a key of ACCELERATORS."""
    chips = math.prod(int(size) for size in topology.split("x"))
    hosts = max(1, chips // CHIPS_PER_HOST)
    # Nodes appear one after another, so the first pods wait longer. For a Job status 0 must mean "trained".
    line = f"{remote.train_command(arguments, 'python3', '--wait=900')} && {remote.finished(arguments)}"
    container = {
        "name": "train",
        "image": arguments.image,
        "command": ["bash", "-c", line],
        "resources": {"limits": {"google.com/tpu": chips // hosts}},
        "volumeMounts": [{"name": "work", "mountPath": arguments.mount}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 300,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[kind],
            "cloud.google.com/gke-tpu-topology": topology,
        },
        "containers": [container],
        "volumes": [{"name": "work", "persistentVolumeClaim": {"claimName": arguments.claim}}],
    }
    job = {"parallelism": hosts, "completions": hosts, "backoffLimit": 0, "template": {"spec": pod}}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": f"{arguments.name}-{arguments.stage}",
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": arguments.restarts},
            "replicatedJobs": [{"name": "slice", "replicas": arguments.slices, "template": {"spec": job}}],
        },
    }


def main(given: list[str] | None = None) -> int:
    """Apply the JobSet, or print it; return the status of ``kubectl``."""
    parser = remote.parser("Train on TPU slices of a GKE cluster.")
    parser.add_argument("--image", required=True, help="container with this package and its extra tpu")
    parser.add_argument("--topology", required=True, help="KIND:AxB or KIND:AxBxC of one slice, for example v5p:4x4x4")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--claim", required=True, help="persistent volume claim (ReadWriteMany) that holds --workdir")
    parser.add_argument("--mount", default="/work", help="where the claim is mounted")
    parser.add_argument("--restarts", type=int, default=100)
    arguments = remote.parse(parser, given)
    kind, _, topology = arguments.topology.partition(":")
    sizes = topology.split("x")
    if kind not in ACCELERATORS or len(sizes) not in (2, 3) or not all(size.isdigit() and int(size) for size in sizes):
        parser.error(f"--topology is {arguments.topology!r}; accepted: {', '.join(ACCELERATORS)} with :AxB or :AxBxC")
    text = json.dumps(jobset(arguments, kind, topology), indent=1)
    return remote.execute([["kubectl", "apply", "-f", "-"]], dry_run=arguments.dry_run, text=text)


if __name__ == "__main__":
    sys.exit(main())
