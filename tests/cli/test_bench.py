"""The benchmark's flags: one sentence for what it cannot do, before any compute."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
DRIVER = """
import json, sys
from absl import flags
from causvid_jax.config import ConfigError
from causvid_jax.analysis import bench_sampler
from causvid_jax.cli import bench, common

def compute(*_, **__):
    raise AssertionError("computed")
bench_sampler.run = compute
errors = []
for arguments in json.load(sys.stdin):
    flags.FLAGS.unparse_flags()
    for flag in flags.FLAGS.flags_by_module_dict()["causvid_jax.cli.bench"]:
        flag.unparse()
    try:
        sys.argv = ["bench", *arguments]  # where overrides of the configuration are looked for
        common._parse_flags(sys.argv)
        bench.main()
        errors.append(None)
    except ConfigError as caught:
        errors.append(str(caught))
print(json.dumps(errors))
"""


def test_bad_flags_are_refused(tmp_path):
    config, output = "--config=configs/digits.py", f"--output={tmp_path / 'bench.json'}"
    cases = [
        ([output], "no --config is given"),
        ([config], "no --output is given; it must be a file that ends in .json"),
        ([config, "--output=bench.txt"], "must end in .json"),
        ([config, output, "--repeats=1"], "--repeats is 1; it must be at least 2"),
        ([config, output, "--codecs=wan,h264"], "--codecs names 'h264'; accepted: wan, taehv"),
        ([config, output, "--weights=int4"], "--weights is 'int4'; accepted: compute, float32"),
        ([config, output, "--config.causal.window=1"], "causal.window is 1"),
        ([config, output, "--streams=1000000"], "and the device has"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([arguments for arguments, _ in cases]),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    for (arguments, message), error in zip(cases, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert error and message in error and "\n" not in error, (arguments, error)
