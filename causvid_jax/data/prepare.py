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

import jax

from causvid_jax.checkpoints import workdir as paths
from causvid_jax.config import ConfigError, Recipe, require
from causvid_jax.data import arrays, captions, generate, moving_digits, pictures, pipeline, sources, videos
from causvid_jax.distributed import collectives
from causvid_jax.sampling.weights import networks
from causvid_jax.text import encoder

LIMIT = 10**9


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a stage besides the recipe.

    Attributes:
        count: number of examples to make (``data``, ``videos``: number of digit clips or videos to use); 0 takes all,
            or the recipe's number.
        videos: folder of own videos.
        captions: file of their captions (:func:`captions.read_captions`); "" takes ``a.txt`` beside ``a.mp4``.
        prompts: file of prompts (:func:`captions.read_prompts`); "" takes ``data.prompt_file``.
        name: dataset that the stage ``videos`` writes below ``WORKDIR/data``.
        clips_per_video: maximum number of clips per video; 0 for all.
        shard_videos: videos per shard; an interruption loses at most one shard.
        batch: clips per device and call of the VAE.
        workers: videos decoded at a time.
        host_index, host_count: share of a machine that runs without ``jax.distributed``; None takes JAX's processes.

    Raises:
        ConfigError: a number out of bounds, or only one of ``host_index`` and ``host_count``.
    """

    count: int = 0
    videos: str = ""
    captions: str = ""
    prompts: str = ""
    name: str = sources.LATENTS
    clips_per_video: int = 0
    shard_videos: int = 64
    batch: int = 1
    workers: int = 2
    host_index: int | None = None
    host_count: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("count", 0), ("clips_per_video", 0), ("shard_videos", 1), ("batch", 1), ("workers", 1)):
            value = getattr(self, name)
            require(least <= value <= LIMIT, f"--{name} is {value}; accepted: at least {least} and at most {LIMIT}")
        index, count = self.host_index, self.host_count
        if index is None or count is None:
            require(index is count, f"--host_index is {index} and --host_count is {count}; give both or neither")
            return
        require(0 <= index < count, f"--host_index is {index} of --host_count {count}; accepted: 0 to {count - 1}")

    def host(self) -> dict[str, int]:
        """Return this machine's share of the work, as keyword arguments of :func:`arrays.write_dataset`.

        Raises:
            ConfigError: ``host_index`` is set in a run of several JAX processes.
        """
        if self.host_index is None or self.host_count is None:
            return pipeline.this_process()
        require(
            jax.process_count() == 1,
            f"--host_index is {self.host_index}, but this is process {jax.process_index()} of {jax.process_count()} "
            "of one run, which share the stage without it",
        )
        return {"process_id": self.host_index, "process_count": self.host_count}


def data(recipe: Recipe, workdir: pathlib.Path, options: Options = Options()) -> str:
    """Write pixel clips for the training of the codecs: moving digits, or clips of own videos."""
    if recipe.data.name == "videos":
        return _own_clips(recipe, workdir, options)
    config = dataclasses.replace(recipe.data, train_clips=options.count or recipe.data.train_clips)
    builder = moving_digits.prepare(workdir / "data", config, recipe.video)
    return f"{builder.data_path}: {config.train_clips} training and {config.test_clips} test clips"


def _own_clips(recipe: Recipe, workdir: pathlib.Path, options: Options) -> str:
    root, listed = _list_videos(options, "data")
    shared = {
        "clips_per_video": options.clips_per_video,
        "shard_videos": options.shard_videos,
        "workers": options.workers,
    }
    lines = []
    for split, some in zip(("train", "test"), videos.held_out(listed), strict=True):
        folder = sources.folder(workdir, sources.clips_name(split))
        before = arrays.is_complete(folder)
        videos.write_pixels(folder, root, some, recipe.video, **shared, **options.host())
        lines.append(_video_summary(folder, before))
    return "\n".join(lines)


def latents(recipe: Recipe, workdir: pathlib.Path, options: Options = Options()) -> str:
    """Encode the pixel clips with the trained VAE."""
    clips = sources.clips(recipe, workdir, "train")
    params, config = paths.load_stage(recipe, "vae", workdir)
    clip_encoder = pictures.open_encoder(dataclasses.replace(recipe, vae=config), params, workdir)
    folder = sources.folder(workdir, sources.LATENTS)
    before = arrays.is_complete(folder)
    reader = None
    if recipe.data.name == "videos":
        clips_folder = sources.folder(workdir, sources.CLIPS)
        name = captions.digest([(clips_folder / arrays.IDENTITY).read_text()])
        reader = encoder.open_encoder(recipe, workdir)
        _fill(reader, [line["caption"] for line in videos.used(clips_folder)])
    else:
        name = moving_digits.MovingDigitsConfig.of(recipe.data, recipe.video).name
    generate.write_latents(
        folder,
        clips,
        params,
        config,
        clips=name,
        count=options.count,
        prompt_encoder=reader,
        clip_encoder=clip_encoder,
        **options.host(),
    )
    return _summary(folder, before)


def encode_videos(recipe: Recipe, workdir: pathlib.Path, options: Options = Options()) -> str:
    """Split a folder of videos into clips and encode them with an existing VAE; pixels are not stored."""
    root, listed = _list_videos(options, "videos")
    reader = encoder.open_encoder(recipe, workdir)
    # Encode all captions before the VAE is loaded; otherwise every chunk would load the text encoder again.
    _fill(reader, [video.caption for video in listed])
    params, config = paths.load_stage(recipe, "vae", workdir)
    folder = sources.folder(workdir, options.name)
    before = arrays.is_complete(folder)
    videos.write_latents(
        folder,
        root,
        listed,
        params,
        dataclasses.replace(recipe, vae=config),
        prompt_encoder=reader,
        clip_encoder=pictures.open_encoder(dataclasses.replace(recipe, vae=config), params, workdir),
        clips_per_video=options.clips_per_video,
        shard_videos=options.shard_videos,
        batch=options.batch,
        workers=options.workers,
        **options.host(),
    )
    return _video_summary(folder, before)


def prompts(recipe: Recipe, workdir: pathlib.Path, options: Options = Options()) -> str:
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
    before = arrays.is_complete(folder)
    listed = listed[: options.count or len(listed)]
    generate.write_prompts(folder, recipe, listed, prompt_encoder=reader, **options.host())
    return _summary(folder, before)


def trajectories(recipe: Recipe, workdir: pathlib.Path, options: Options = Options()) -> str:
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
    before = arrays.is_complete(folder)
    reader = encoder.open_encoder(recipe, workdir, compute=False)
    generate.write_trajectories(
        folder,
        params,
        recipe,
        listed,
        seed=recipe.train_init.seed,
        prompt_encoder=reader,
        clips=clips,
        **options.host(),
    )
    return _summary(folder, before)


def _causal_trajectories(recipe: Recipe, workdir: pathlib.Path, options: Options) -> str:
    params, _ = paths.load_stage(recipe, "causal", workdir)
    codec = paths.open_stage(recipe, "vae", workdir).config
    latents_folder = sources.folder(workdir, sources.LATENTS)
    clips, lines = sources.checked_source(latents_folder, recipe, workdir, vae="vae"), []
    for frames, number in ((0, recipe.train_init.trajectories), *recipe.train_init.extra_trajectories):
        folder = sources.causal_folder(workdir, frames)
        before = arrays.is_complete(folder)
        generate.write_causal_trajectories(
            folder,
            params,
            dataclasses.replace(recipe, vae=codec),
            clips,
            count=options.count or number,
            identity=(latents_folder / arrays.IDENTITY).read_text(),
            frames=frames,
            seed=recipe.train_init.seed,
            prompt_encoder=encoder.open_encoder(recipe, workdir, compute=False),
            **options.host(),
        )
        lines.append(_summary(folder, before))
    return "\n".join(lines)


def streams(recipe: Recipe, workdir: pathlib.Path, options: Options = Options()) -> str:
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
        listed = generate.prompt_sequence(prompt_list, options.count or number, recipe.data.seed + clips)
        folder = sources.streams_folder(workdir, clips)
        before = arrays.is_complete(folder)
        generate.write_streams(
            folder, params, recipe, listed, clips=clips, seed=first, prompt_encoder=reader, **options.host()
        )
        lines.append(_summary(folder, before))
        first += number
    return "\n".join(lines)


def assets(recipe: Recipe, workdir: pathlib.Path, options: Options = Options()) -> str:
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


def _prompt_list(recipe: Recipe, options: Options) -> list[str] | None:
    path = options.prompts or recipe.data.prompt_file
    return captions.read_prompts(path) if path else None


def _fill(reader: encoder.Encoder, prompts: list[str]) -> None:
    """Encode this JAX process's share of ``prompts`` into the cache."""
    encoder.fill(reader, prompts[jax.process_index() :: jax.process_count()])
    collectives.barrier("captions encoded")


def _summary(folder: pathlib.Path, before: bool) -> str:
    collectives.barrier(f"{folder.name} written")
    if not arrays.is_complete(folder):
        return f"{folder}: this process is done; the last process to end finishes the dataset"
    prefix = "was complete already, nothing to do: " if before else ""
    return f"{folder}: {prefix}{len(arrays.source(folder))} examples"


def _video_summary(folder: pathlib.Path, before: bool) -> str:
    summary, used, skipped = _summary(folder, before), videos.used(folder), videos.skipped(folder)
    summary = f"{summary}; {sum(line['clips'] for line in used)} clips of {len(used)} videos"
    if not skipped:
        return summary
    return f"{summary}, {len(skipped)} videos skipped: the reasons are in {folder / videos.SKIPPED}"


def run(stage: str, recipe: Recipe, workdir: pathlib.Path, options: Options = Options()) -> str:
    """Run a stage of :data:`STAGES` and return its summary; raise a ConfigError for another name."""
    require(stage in STAGES, f"--stage is {stage!r}; accepted: {', '.join(STAGES)}")
    return STAGES[stage](recipe, workdir, options)
