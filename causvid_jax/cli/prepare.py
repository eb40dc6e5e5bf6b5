"""Make the datasets of a recipe: ``causvid prepare --config=configs/digits.py --workdir=DIR --stage=data``.

Stages, in the order of a training: ``data`` writes pixel clips (moving digits, or those of your own videos with
``--videos=DIR --captions=FILE``) and ``latents`` encodes them with the trained VAE; ``videos`` splits and encodes a
folder of videos with a published VAE; ``prompts`` embeds a list of prompts (``--prompts=FILE``) and fills the cache of
a UMT5 encoder in ``WORKDIR/prompts``, which trajectories and training read; ``trajectories`` runs the trained teacher's
ODE; ``streams`` runs the trained student for the tiny decoder to learn from; ``assets`` makes the weights of
``WORKDIR`` those that come with the package. Each writes a tfds dataset under ``WORKDIR/data``, keeps what exists and
resumes after an interruption. Several machines share a stage as they share a training (docs/hosts.md), or each by
itself with ``--host_index=I --host_count=N``. Formats and rules: docs/data.md.
"""

import dataclasses

import jax
from absl import flags, logging

from causvid_jax.cli import common, processes
from causvid_jax.config import require
from causvid_jax.data import prepare
from causvid_jax.distributed import collectives

_CONFIG = common.define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the recipe keeps its data, weights and logs.")
_STAGE = flags.DEFINE_string(
    "stage", None, "What to make: data, latents, videos, prompts, trajectories, streams or assets."
)
_COUNT = flags.DEFINE_integer("count", 0, "How many examples to make; 0 takes the number the recipe names.")
_VIDEOS = flags.DEFINE_string("videos", None, "data, videos: the folder of your videos.")
_CAPTIONS = flags.DEFINE_string("captions", None, "data, videos: csv, tsv, json or jsonl; none: a.txt by a.mp4.")
_PROMPTS = flags.DEFINE_string("prompts", None, "prompts, trajectories: the list; none: the recipe's data.prompt_file.")
_NAME = flags.DEFINE_string("name", "latents", "videos: the dataset's folder under WORKDIR/data.")
_CLIPS_PER_VIDEO = flags.DEFINE_integer("clips_per_video", 0, "data, videos: the most that a video gives; 0: all.")
_SHARD_VIDEOS = flags.DEFINE_integer("shard_videos", 64, "data, videos: videos per shard, which a crash can cost.")
_BATCH = flags.DEFINE_integer("batch", 1, "videos: clips per device and call of the VAE.")
_WORKERS = flags.DEFINE_integer("workers", 2, "data, videos: videos decoded at a time.")
_HOST_INDEX = flags.DEFINE_integer("host_index", None, "This machine's number from 0; none: JAX's process index.")
_HOST_COUNT = flags.DEFINE_integer("host_count", None, "How many machines share the stage; none: JAX's process count.")
processes.define_flags()


def main() -> None:
    """Check the flags, then make one stage's dataset."""
    recipe = common.load_recipe(_CONFIG)
    stage, workdir = _STAGE.value or "", _WORKDIR.value or ""
    require(workdir != "", "no --workdir is given; it must be a directory for data and weights")
    require(stage in prepare.STAGES, f"--stage is {stage!r}; accepted: {', '.join(prepare.STAGES)}")
    values = {field.name: flags.FLAGS[field.name].value for field in dataclasses.fields(prepare.Options)}
    options = prepare.Options(**{name: value for name, value in values.items() if value is not None})
    folder = common.writable_workdir(workdir)
    with processes.joined() as many:
        if many:
            processes.check(values | {"stage": stage, "config": dataclasses.asdict(recipe)}, folder)
        if stage != "data":
            common.enable_compilation_cache()
            logging.info("%d process(es), %d device(s) here", jax.process_count(), jax.local_device_count())
        others_wait = many and prepare.by_one_process(stage, recipe)
        if others_wait and not collectives.first():
            collectives.sync(stage)
            return
        summary = prepare.run(stage, recipe, folder, options)
        if others_wait:
            collectives.sync(stage)
        if not many or collectives.first():
            print(summary)
