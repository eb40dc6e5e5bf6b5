"""Make the data of a recipe: ``python -m launch.prepare --config=configs/digits.py --workdir=DIR --stage=data``.

Stages, in the order of the road: ``data`` writes the clips of moving digits and ``latents`` encodes them with the
trained VAE; ``videos`` does both for a folder of videos (``--videos=DIR --captions=FILE``); ``prompts`` embeds a list
of prompts (``--prompts=FILE``), and leaves the rows of a UMT5 encoder, the negative prompt's among them, in
``WORKDIR/prompts``, where trajectories and training find them: neither has room for the encoder; ``trajectories`` runs
the trained teacher's ODE; ``streams`` lets the trained student stream, for the tiny decoder to learn from. Each writes
a tfds dataset under ``WORKDIR/data``, keeps what is there already, and after an interruption goes on where it stopped.
Several machines share a stage as they share a training (docs/hosts.md), or each by itself with ``--host_index=I
--host_count=N``. ``assets``, when all is trained, makes the weights of ``WORKDIR`` those that come with the package.
Formats and rules: docs/data.md.
"""

import dataclasses
import pathlib
from typing import Any

import jax
from absl import flags, logging

from causvid_jax.checkpoints import workdir as stages
from causvid_jax.cli import common, processes
from causvid_jax.config import ConfigError, Recipe, require
from causvid_jax.data import arrays, captions, generate, moving_digits, pipeline, videos
from causvid_jax.data import sources as recipe_data
from causvid_jax.distributed import collectives
from causvid_jax.text import encoder

_CONFIG = common.define_config_flag()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the recipe keeps its data, weights and logs.")
_STAGE = flags.DEFINE_string(
    "stage", None, "What to make: data, latents, videos, prompts, trajectories, streams or assets."
)
_COUNT = flags.DEFINE_integer("count", 0, "How many examples to make; 0 takes the number the recipe names.")
_VIDEOS = flags.DEFINE_string("videos", None, "videos: the folder that holds them.")
_CAPTIONS = flags.DEFINE_string("captions", None, "videos: .csv or .jsonl with file and caption; none: a.txt by a.mp4.")
_PROMPTS = flags.DEFINE_string("prompts", None, "prompts, trajectories: the list; none: the recipe's data.prompt_file.")
_NAME = flags.DEFINE_string("name", "latents", "videos: the dataset's folder under WORKDIR/data.")
_CLIPS_PER_VIDEO = flags.DEFINE_integer("clips_per_video", 0, "videos: the most that a video gives; 0: all there are.")
_SHARD_VIDEOS = flags.DEFINE_integer("shard_videos", 64, "videos: how many go into a shard, what a crash can cost.")
_BATCH = flags.DEFINE_integer("batch", 1, "videos: clips per device and call of the VAE.")
_WORKERS = flags.DEFINE_integer("workers", 2, "videos: how many are decoded at a time.")
_HOST_INDEX = flags.DEFINE_integer("host_index", None, "This machine's number from 0; none: JAX's process index.")
_HOST_COUNT = flags.DEFINE_integer("host_count", None, "How many machines share the stage; none: JAX's process count.")
processes.define_flags()


def data(recipe: Recipe, workdir: pathlib.Path, count: int) -> str:
    """Write the clips; ``count`` replaces the number of training clips."""
    _require_digits(recipe, "data")
    config = dataclasses.replace(recipe.data, train_clips=count or recipe.data.train_clips)
    builder = moving_digits.prepare(workdir / "data", config, recipe.video)
    return f"{builder.data_path}: {config.train_clips} training and {config.test_clips} test clips"


def latents(recipe: Recipe, workdir: pathlib.Path, count: int) -> str:
    """Encode the first ``count`` training clips (0: all)."""
    _require_digits(recipe, "latents")
    clips = moving_digits.source(workdir / "data", recipe.data, recipe.video, "train")
    params, config = stages.load_stage(recipe, "vae", workdir)
    name = moving_digits.MovingDigitsConfig.of(recipe.data, recipe.video).name
    folder = recipe_data.folder(workdir, recipe_data.LATENTS)
    before = arrays.is_complete(folder)
    generate.write_latents(folder, clips, params, config, clips=name, count=count, **_host())
    return _summary(folder, before)


def encode_videos(recipe: Recipe, workdir: pathlib.Path, count: int) -> str:
    """Cut and encode the first ``count`` (0: all) videos of ``--videos``."""
    root = _flag(_VIDEOS)
    require(root, "no --videos is given; --stage=videos needs the folder that holds them")
    options = {flag.name: _flag(flag) for flag in (_CLIPS_PER_VIDEO, _SHARD_VIDEOS, _BATCH, _WORKERS)}
    for name, value in options.items():
        least = 0 if name == _CLIPS_PER_VIDEO.name else 1
        require(value >= least, f"--{name} is {value}; it must be at least {least}")
    listed = captions.list_videos(root, _flag(_CAPTIONS))
    chosen, reader = listed[: count or len(listed)], encoder.open_encoder(recipe, workdir)
    # Once, and before the VAE is there: a chunk alone would have the encoder's weights read for each.
    _fill(reader, [video.caption for video in chosen])
    params, config = stages.load_stage(recipe, "vae", workdir)
    folder = recipe_data.folder(workdir, _flag(_NAME))
    before = arrays.is_complete(folder)
    videos.write_latents(
        folder,
        root,
        chosen,
        params,
        dataclasses.replace(recipe, vae=config),
        prompt_encoder=reader,
        **{**options, **_host()},
    )
    used, skipped = videos.used(folder), videos.skipped(folder)
    closing = f"{_summary(folder, before)}; {sum(line['clips'] for line in used)} clips of {len(used)} videos"
    if not skipped:
        return closing
    return f"{closing}, {len(skipped)} videos skipped: the reasons are in {folder / videos.SKIPPED}"


def prompts(recipe: Recipe, workdir: pathlib.Path, count: int) -> str:
    """Embed the first ``count`` (0: all) prompts of the list; without one, only encode the data's captions."""
    reader, chosen = encoder.open_encoder(recipe, workdir), _prompt_list(recipe)
    if recipe.text.kind != "words":
        known = chosen if chosen is not None else recipe_data.prompts(recipe, workdir)
        wanted = encoder.missing(reader, [recipe.text.negative_prompt, *known[: count or len(known)]])
        _fill(reader, wanted)
        if chosen is None:
            return f"{workdir / 'prompts'}: {len(known)} captions and the negative prompt, {len(wanted)} of them new"
    if chosen is None:
        raise ConfigError("no --prompts is given and data.prompt_file is empty; --stage=prompts needs a list of them")
    folder = recipe_data.folder(workdir, recipe_data.PROMPTS)
    before = arrays.is_complete(folder)
    generate.write_prompts(folder, recipe, chosen[: count or len(chosen)], prompt_encoder=reader, **_host())
    return _summary(folder, before)


def trajectories(recipe: Recipe, workdir: pathlib.Path, count: int) -> str:
    """Run the teacher's ODE for ``count`` (0: as many as the init stage asks for) training captions."""
    if recipe.train_init.teacher == "causal":
        return _causal_trajectories(recipe, workdir, count)
    params, _ = stages.load_stage(recipe, "teacher", workdir)
    known = _prompt_list(recipe) or recipe_data.prompts(recipe, workdir)
    chosen = generate.prompt_sequence(known, count or recipe.train_init.trajectories, recipe.data.seed)
    folder = recipe_data.folder(workdir, recipe_data.TRAJECTORIES)
    before = arrays.is_complete(folder)
    reader = encoder.open_encoder(recipe, workdir, compute=False)
    generate.write_trajectories(
        folder, params, recipe, chosen, seed=recipe.train_init.seed, prompt_encoder=reader, **_host()
    )
    return _summary(folder, before)


def _causal_trajectories(recipe: Recipe, workdir: pathlib.Path, count: int) -> str:
    params, _ = stages.load_stage(recipe, "causal", workdir)
    coder = stages.open_stage(recipe, "vae", workdir).config
    given = recipe_data.folder(workdir, recipe_data.LATENTS)
    clips, lines = arrays.source(given), []
    for frames, number in ((0, recipe.train_init.trajectories), *recipe.train_init.extra_trajectories):
        folder = generate.causal_folder(workdir, frames)
        before = arrays.is_complete(folder)
        generate.write_causal_trajectories(
            folder,
            params,
            dataclasses.replace(recipe, vae=coder),
            clips,
            count=count or number,
            identity=(given / arrays.IDENTITY).read_text(),
            frames=frames,
            seed=recipe.train_init.seed,
            prompt_encoder=encoder.open_encoder(recipe, workdir, compute=False),
            **_host(),
        )
        lines.append(_summary(folder, before))
    return "\n".join(lines)


def streams(recipe: Recipe, workdir: pathlib.Path, count: int) -> str:
    """The student's streams that ``train_taehv.rollouts`` names; ``count`` replaces every number of them."""
    require(
        bool(recipe.train_taehv.rollouts),
        "train_taehv.rollouts is empty; accepted: (clips, number) pairs, for example ((1, 640), (10, 96))",
    )
    params, recipe = stages.load_decoders(dataclasses.replace(recipe, decoder="vae"), workdir)
    params["student"], _ = stages.load_stage(recipe, "distill", workdir)
    known = _prompt_list(recipe) or recipe_data.prompts(recipe, workdir)
    reader = encoder.open_encoder(recipe, workdir, compute=False)
    lines, first = [], 0
    for clips, number in recipe.train_taehv.rollouts:
        chosen = generate.prompt_sequence(known, count or number, recipe.data.seed + clips)
        folder = generate.streams_folder(workdir, clips)
        before = arrays.is_complete(folder)
        generate.write_streams(
            folder, params, recipe, chosen, clips=clips, seed=first, prompt_encoder=reader, **_host()
        )
        lines.append(_summary(folder, before))
        first += number
    return "\n".join(lines)


def assets(recipe: Recipe, workdir: pathlib.Path, count: int) -> str:
    """Publish the trained weights; ``count`` means nothing here."""
    return "\n".join(f"{path}: {path.stat().st_size / 1e6:.1f} MB" for path in stages.publish(recipe.name, workdir))


def _require_digits(recipe: Recipe, stage: str) -> None:
    require(
        recipe.data.name == "moving_digits",
        f"--stage={stage} makes moving digits and data.name is {recipe.data.name!r}; accepted: --stage=videos",
    )


def _flag(flag: flags.FlagHolder) -> Any:
    """The value of a flag; its default where ``main`` did not run."""
    return flag.value if flags.FLAGS.is_parsed() else flag.default


def _prompt_list(recipe: Recipe) -> list[str] | None:
    path = _flag(_PROMPTS) or recipe.data.prompt_file
    return captions.read_prompts(path) if path else None


def _fill(reader: encoder.Encoder, wanted: list[str]) -> None:
    """Encode the captions that are ``wanted``, each process its share; machines that do not know each other, all."""
    encoder.fill(reader, wanted[jax.process_index() :: jax.process_count()])
    collectives.sync("captions encoded")


def _host() -> dict[str, int]:
    """Which machine of how many this is: by the flags, else by JAX."""
    index, count = _flag(_HOST_INDEX), _flag(_HOST_COUNT)
    if index is None and count is None:
        return pipeline.this_process()
    require(
        jax.process_count() == 1,
        f"--host_index is {index}, but this is process {jax.process_index()} of {jax.process_count()} that know each "
        "other; they share the stage without it",
    )
    require(
        index is not None and count is not None,
        f"--host_index is {index} and --host_count is {count}; give both or neither",
    )
    require(0 <= index < count, f"--host_index is {index} of --host_count {count}; accepted: 0 to {count - 1}")
    return {"process_id": index, "process_count": count}


def _summary(folder: pathlib.Path, before: bool) -> str:
    collectives.sync(f"{folder.name} written")
    if not arrays.is_complete(folder):
        return f"{folder}: this process is done, others are not; the last one to end finishes the dataset"
    done = "was complete already, nothing to do: " if before else ""
    return f"{folder}: {done}{len(arrays.source(folder))} examples"


STAGES = {
    "data": data,
    "latents": latents,
    "videos": encode_videos,
    "prompts": prompts,
    "trajectories": trajectories,
    "streams": streams,
    "assets": assets,
}


def main() -> None:
    """Check the flags, then make one stage's dataset."""
    recipe = common.load_recipe(_CONFIG)
    stage, workdir, count = _STAGE.value or "", _WORKDIR.value or "", _COUNT.value
    require(workdir != "", "no --workdir is given; it must be a directory for data and weights")
    require(stage in STAGES, f"--stage is {stage!r}; accepted: {', '.join(STAGES)}")
    require(count >= 0, f"--count is {count}; it must not be negative")
    folder = common.writable_workdir(workdir)
    with processes.joined() as many:
        if many:
            given = {flag.name: flag.value for flag in (_VIDEOS, _CAPTIONS, _PROMPTS, _NAME, _SHARD_VIDEOS)}
            given |= {"clips_per_video": _CLIPS_PER_VIDEO.value, "stage": stage, "count": count}
            processes.check(given | {"config": dataclasses.asdict(recipe)}, folder)
        if stage != "data":
            common.enable_compilation_cache()
            logging.info("%d process(es), %d device(s) here", jax.process_count(), jax.local_device_count())
        # These two are no work to share: one process does it, the others find it done.
        others_wait = many and stage in ("data", "assets")
        if others_wait and not collectives.first():
            collectives.sync(stage)
            return
        said = STAGES[stage](recipe, folder, count)
        if others_wait:
            collectives.sync(stage)
        if not many or collectives.first():
            print(said)
