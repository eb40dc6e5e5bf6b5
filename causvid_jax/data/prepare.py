"""Make the datasets of a recipe in its working directory, one stage at a time.

The stages, in the order of a training:

- ``data`` writes pixel clips (moving digits, or clips of own videos) for the training of the codecs.
- ``latents`` encodes these clips with the trained VAE.
- ``videos`` splits and encodes a folder of videos in one step with an existing VAE.
- ``prompts`` embeds a list of prompts.
- ``trajectories`` runs the trained teacher's ODE.
- ``streams`` runs the student; the tiny decoder is trained on its streams.
- ``assets`` copies the trained weights into the package.

Every stage keeps existing data and resumes after an interruption. It returns a summary for the user and raises a
ConfigError if weights, data or options are missing or do not fit.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from causvid_jax.checkpoints import workdir as paths
from causvid_jax.config import ConfigError, Recipe, require
from causvid_jax.data import arrays, captions, generate, moving_digits, pictures, pipeline, sources, videos
from causvid_jax.data.options import DEFAULTS, Options
from causvid_jax.distributed import collectives
from causvid_jax.sampling.weights import networks
from causvid_jax.text import encoder


def data(recipe: Recipe, workdir: pathlib.Path, options: Options = DEFAULTS) -> str:
    """Write pixel clips for the training of the codecs: moving digits, or clips of own videos."""
    if recipe.data.name == "videos":
        return _own_clips(recipe, workdir, options)
    config = dataclasses.replace(recipe.data, train_clips=options.count or recipe.data.train_clips)
    builder = moving_digits.prepare(workdir / "data", config, recipe.video)
    return f"{builder.data_path}: {config.train_clips} training and {config.test_clips} test clips"


def _own_clips(recipe: Recipe, workdir: pathlib.Path, options: Options) -> str:
    root, listed = _list_videos(options, "data")
    # Other encoders than that of words accept every caption, and their files are not needed yet.
    reader = encoder.open_encoder(recipe) if recipe.text.kind == "words" else None
    folder, given = sources.folder(workdir, sources.CLIPS), {"prompt_encoder": reader, **_splitting(options)}
    summary = _write(options, videos.write_pixels, folder, root, listed, recipe.video, **given)
    if arrays.is_complete(folder):
        train, test = (len(sources.clips(recipe, workdir, split)) for split in ("train", "test"))
        summary += f" ({train} for training, {test} for tests)"
    return f"{summary}; {_videos_of(folder)}"


def latents(recipe: Recipe, workdir: pathlib.Path, options: Options = DEFAULTS) -> str:
    """Encode the pixel clips with the trained VAE."""
    clips = sources.clips(recipe, workdir, "train")
    params, config = paths.load_stage(recipe, "vae", workdir)
    clip_encoder = pictures.open_encoder(dataclasses.replace(recipe, vae=config), params, workdir)
    folder = sources.folder(workdir, sources.LATENTS)
    reader = None
    if recipe.data.name == "videos":
        clips_folder = sources.folder(workdir, sources.CLIPS)
        name = captions.digest([(clips_folder / arrays.IDENTITY).read_text()])
        reader = encoder.open_encoder(recipe, workdir)
        _fill(reader, [line["caption"] for line in videos.part_of(videos.used(clips_folder), "train")])
    else:
        name = moving_digits.MovingDigitsConfig.of(recipe.data, recipe.video).name
    given = {"clips": name, "count": options.count, "prompt_encoder": reader}
    return _write(options, generate.write_latents, folder, clips, clip_encoder, **given)


def encode_videos(recipe: Recipe, workdir: pathlib.Path, options: Options = DEFAULTS) -> str:
    """Split a folder of videos into clips and encode them with an existing VAE; pixels are not stored."""
    root, listed = _list_videos(options, "videos")
    reader = encoder.open_encoder(recipe, workdir)
    # Encode all captions before the VAE is loaded; otherwise every chunk would load the text encoder again.
    _fill(reader, [video.caption for video in listed])
    params, config = paths.load_stage(recipe, "vae", workdir)
    clip_encoder = pictures.open_encoder(dataclasses.replace(recipe, vae=config), params, workdir)
    folder = sources.folder(workdir, options.name)
    given = {"prompt_encoder": reader, "batch": options.batch, **_splitting(options)}
    summary = _write(options, videos.write_latents, folder, root, listed, clip_encoder, **given)
    return f"{summary}; {_videos_of(folder)}"


def prompts(recipe: Recipe, workdir: pathlib.Path, options: Options = DEFAULTS) -> str:
    """Write the dataset of a list of prompts; without a list, only fill the prompt cache with the data's captions."""
    reader, listed = encoder.open_encoder(recipe, workdir), _prompt_list(recipe, options)
    if recipe.text.kind != "words":
        prompt_list = listed if listed is not None else sources.prompts(recipe, workdir)
        prompt_list = prompt_list[: options.count or len(prompt_list)]
        uncached = encoder.missing(reader, [recipe.text.negative_prompt, *prompt_list])
        _fill(reader, uncached)
        if listed is None:
            counts = f"{len(prompt_list)} captions and the negative prompt, {len(uncached)} of them new"
            return f"{workdir / 'prompts'}: {counts}"
    if listed is None:
        raise ConfigError("no --prompts is given and data.prompt_file is empty; --stage=prompts needs a list of them")
    folder = sources.folder(workdir, sources.PROMPTS)
    listed = listed[: options.count or len(listed)]
    return _write(options, generate.write_prompts, folder, recipe, listed, prompt_encoder=reader)


def trajectories(recipe: Recipe, workdir: pathlib.Path, options: Options = DEFAULTS) -> str:
    """Run the teacher's ODE for ``train_init.trajectories`` training prompts, or for clips if it is causal."""
    if recipe.train_init.teacher == "causal":
        return _causal_trajectories(recipe, workdir, options)
    names = networks(recipe, "teacher")
    loaded = {name: paths.load_stage(recipe, name, workdir)[0] for name in names}
    params = loaded if len(names) > 1 else loaded["teacher"]
    count = options.count or recipe.train_init.trajectories
    clips: pipeline.Source | None = None
    if recipe.reads_picture:
        # A picture belongs to the caption of its clip, so the captions come from the clips too.
        clips = sources.with_pictures(recipe, workdir)
        listed = [pipeline.as_text(clips[i % len(clips)]["caption"]) for i in range(count)]
    else:
        prompt_list = _prompt_list(recipe, options) or sources.prompts(recipe, workdir)
        listed = generate.prompt_sequence(prompt_list, count, recipe.data.seed)
    folder = sources.folder(workdir, sources.TRAJECTORIES)
    reader = encoder.open_encoder(recipe, workdir, compute=False)
    given = {"seed": recipe.train_init.seed, "prompt_encoder": reader, "clips": clips}
    return _write(options, generate.write_trajectories, folder, params, recipe, listed, **given)


def _causal_trajectories(recipe: Recipe, workdir: pathlib.Path, options: Options) -> str:
    params, _ = paths.load_stage(recipe, "causal", workdir)
    codec = paths.open_stage(recipe, "vae", workdir).config
    latents_folder = sources.folder(workdir, sources.LATENTS)
    clips, lines = sources.checked_source(latents_folder, recipe, workdir, vae="vae"), []
    for frames, number in ((0, recipe.train_init.trajectories), *recipe.train_init.extra_trajectories):
        line = _write(
            options,
            generate.write_causal_trajectories,
            sources.causal_folder(workdir, frames),
            params,
            dataclasses.replace(recipe, vae=codec),
            clips,
            count=options.count or number,
            identity=(latents_folder / arrays.IDENTITY).read_text(),
            frames=frames,
            seed=recipe.train_init.seed,
            prompt_encoder=encoder.open_encoder(recipe, workdir, compute=False),
        )
        lines.append(line)
    return "\n".join(lines)


def streams(recipe: Recipe, workdir: pathlib.Path, options: Options = DEFAULTS) -> str:
    """Write the student's streams of ``train_taehv.rollouts``; ``count`` replaces the number of each entry."""
    require(
        bool(recipe.train_taehv.rollouts),
        "train_taehv.rollouts is empty; accepted: (clips, number) pairs, for example ((1, 640), (10, 96))",
    )
    params, recipe = paths.load_decoders(dataclasses.replace(recipe, decoder="vae"), workdir)
    params["student"], _ = paths.load_stage(recipe, "distill", workdir)
    prompt_list = _prompt_list(recipe, options) or sources.prompts(recipe, workdir)
    reader = encoder.open_encoder(recipe, workdir, compute=False)
    lines, first = [], 0
    for clips, number in recipe.train_taehv.rollouts:
        number = options.count or number
        listed = generate.prompt_sequence(prompt_list, number, recipe.data.seed + clips)
        folder, given = sources.streams_folder(workdir, clips), {"clips": clips, "seed": first}
        lines.append(
            _write(options, generate.write_streams, folder, params, recipe, listed, prompt_encoder=reader, **given)
        )
        first += number
    return "\n".join(lines)


def assets(recipe: Recipe, workdir: pathlib.Path, options: Options = DEFAULTS) -> str:
    """Copy the trained weights into the package (:func:`causvid_jax.checkpoints.workdir.publish`)."""
    return "\n".join(f"{path}: {path.stat().st_size / 1e6:.1f} MB" for path in paths.publish(recipe.name, workdir))


Stage = Callable[[Recipe, pathlib.Path, Options], str]
STAGES: Mapping[str, Stage] = {
    "data": data,
    "latents": latents,
    "videos": encode_videos,
    "prompts": prompts,
    "trajectories": trajectories,
    "streams": streams,
    "assets": assets,
}


def by_one_process(stage: str, recipe: Recipe) -> bool:
    """Return whether one process runs the whole stage while the others wait."""
    return stage == "assets" or (stage == "data" and recipe.data.name == "moving_digits")


def _list_videos(options: Options, stage: str) -> tuple[pathlib.Path, list[captions.Video]]:
    require(options.videos, f"no --videos is given; --stage={stage} needs the folder of your videos")
    listed = captions.list_videos(options.videos, options.captions or None)
    return pathlib.Path(options.videos), listed[: options.count or len(listed)]


def _splitting(options: Options) -> dict[str, int]:
    """Return how videos are split into clips and shards, as keyword arguments of :func:`videos.write_clips`."""
    return {name: getattr(options, name) for name in ("clips_per_video", "shard_videos", "workers")}


def _prompt_list(recipe: Recipe, options: Options) -> list[str] | None:
    path = options.prompts or recipe.data.prompt_file
    return captions.read_prompts(path) if path else None


def _fill(reader: encoder.Encoder, prompts: list[str]) -> None:
    """Encode this JAX process's share of ``prompts`` into the cache."""
    encoder.fill(reader, prompts[jax.process_index() :: jax.process_count()])
    collectives.barrier("captions encoded")


def _write(options: Options, write: Callable[..., bool], folder: pathlib.Path, *arguments: Any, **given: Any) -> str:
    """Write this machine's share of the dataset ``folder`` by ``write``, and return a summary of the dataset."""
    before = arrays.is_complete(folder)
    write(folder, *arguments, **given, **_share(options))
    collectives.barrier(f"{folder.name} written")
    if not arrays.is_complete(folder):
        return f"{folder}: this process is done; the last process to end finishes the dataset"
    prefix = "was complete already, nothing to do: " if before else ""
    return f"{folder}: {prefix}{len(arrays.source(folder))} examples"


def _share(options: Options) -> dict[str, int]:
    """Return this machine's share of the work, as keyword arguments of :func:`arrays.write_dataset`."""
    if options.host_index is None or options.host_count is None:
        return {"process_id": jax.process_index(), "process_count": jax.process_count()}
    require(
        jax.process_count() == 1,
        f"--host_index is {options.host_index}, but this is process {jax.process_index()} of {jax.process_count()} "
        "of one run, which share the stage without it",
    )
    return {"process_id": options.host_index, "process_count": options.host_count}


def _videos_of(folder: pathlib.Path) -> str:
    """Return a text with the numbers of used and skipped videos of a dataset."""
    used, skipped = videos.used(folder), videos.skipped(folder)
    why = f", {len(skipped)} videos skipped: the reasons are in {folder / videos.SKIPPED}" if skipped else ""
    return f"{sum(line['clips'] for line in used)} clips of {len(used)} videos{why}"


def run(stage: str, recipe: Recipe, workdir: pathlib.Path, options: Options = DEFAULTS) -> str:
    """Run a stage of :data:`STAGES` and return its summary; raise a ConfigError for another name."""
    require(stage in STAGES, f"--stage is {stage!r}; accepted: {', '.join(STAGES)}")
    return STAGES[stage](recipe, workdir, options)
