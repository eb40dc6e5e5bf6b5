"""Real encoded videos, good and broken, all the way to a training step."""

import collections
import dataclasses
import json
import re
import tracemalloc

import jax
import numpy as np
import pytest
import real_videos

from causvid_jax.checkpoints import store, wan_vae
from causvid_jax.checkpoints import workdir as stages
from causvid_jax.config import ConfigError, VideoConfig
from causvid_jax.data import arrays, captions, clips, pipeline, prepare, videos
from causvid_jax.data import sources as recipe_data
from causvid_jax.media import read_video, to_float
from causvid_jax.models import vae
from causvid_jax.text import words
from causvid_jax.training import stages as training
from causvid_jax.training.metrics import read_metrics
from tests.refusals import refused
from tests.tiny import changed, random_params, tiny_recipe

VIDEO = VideoConfig(height=16, width=16, frames=9, fps=8)
CLIPS = {"china.mp4": 1, "slow.mkv": 3, "tall.webm": 1, "wide/flower.avi": 2}
REASONS = {
    "empty.mp4": "is empty",
    "missing.mp4": "does not exist",
    "no_end.mkv": r"is damaged: it ends after \d\.\d\d of the 6\.00 s that it declares",
    "no_index.mp4": "is damaged: Invalid data",
    "short.mp4": r"is too short: 4 frames at 8 per second \(0.50 s\); a clip has 9 \(1.12 s\)",
    "silent.mp4": "has no caption",
    "text.mp4": "is damaged: Invalid data",
}
WORDS = ("roofs", "in", "china", "a", "flower", "tall", "slow")
READS = {"text_dim": len(WORDS) + 8}
CHANGES = {
    "video": {"fps": 8},
    "data": {"name": "videos"},
    "text": {"vocabulary": WORDS, "dim": len(WORDS) + 8},
    "teacher": READS,
    "student": READS,
}
RECIPE = tiny_recipe(**CHANGES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    real_videos.write_folder(root)
    return root


@pytest.fixture(scope="module")
def listed(folder):
    return captions.list_videos(folder, folder / "captions.jsonl")


def stub(video):
    """Latents that tell clips apart: the mean colour of the first frame and of the last."""
    means = np.stack([video[:, 0], video[:, -1]], 1).mean(axis=(2, 3), dtype=np.float32)
    return {"latents": means[:, :, None, None]}


def write(folder, root, listed, encode=stub, **options):
    return videos.write_clips(
        folder,
        root,
        listed,
        encode,
        lambda given: words.encode_words(given, RECIPE.text),
        config=VIDEO,
        features=arrays.array_features(videos.ORIGIN, latents=(2, 1, 1, 3), text=(None, RECIPE.text.dim)),
        identity={},
        **{"size": 3, "shard_videos": 3, "progress": False, **options},
    )


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.array_record*")}


@pytest.mark.parametrize(
    ("name", "image", "fps", "seconds", "size"),
    [
        ("china.mp4", real_videos.CHINA, 24, 1.5, (32, 64)),
        ("wide/flower.avi", real_videos.FLOWER, 30, 2.5, (48, 96)),
        ("tall.webm", real_videos.FLOWER, 12, 1.2, (64, 32)),
        ("slow.mkv", real_videos.CHINA, 5, 4.0, (32, 32)),
    ],
)
def test_clips_show_the_frames_of_their_time_scaled_and_cropped(folder, name, image, fps, seconds, size):
    made = list(clips.split_into_clips(folder / name, VIDEO))
    assert len(made) == CLIPS[name] and {(c.shape, c.dtype) for c in made} == {((9, 16, 16, 3), np.dtype(np.uint8))}
    height, width = size
    side = min(size)
    source = real_videos.shot(image, fps, seconds, *size).astype(float)
    top, left, step = (height - side) // 2, (width - side) // 2, side // 16
    source = source[:, top : top + side, left : left + side].reshape(-1, 16, step, 16, step, 3).mean(axis=(2, 4))
    for k, frame in enumerate(np.concatenate(made)):
        # What is on the screen at k / 8 s; a time within a quarter of a frame of the next picture may show that one.
        shown = {min(len(source) - 1, int(k / 8 * fps + early)) for early in (1e-6, 0.25 * fps / 8)}
        errors = np.abs(source - frame).mean(axis=(1, 2, 3))
        assert min(errors[i] for i in shown) < 5 and min(shown) - 1 <= errors.argmin() <= max(shown) + 1
    assert len(list(clips.split_into_clips(folder / name, VIDEO, limit=1))) == 1
    np.testing.assert_array_equal(made[0], read_video(folder / name, 16, 16, 9, 8))


def test_every_video_gives_its_clips_or_a_reason(folder, listed, tmp_path):
    assert write(tmp_path, folder, listed)
    source = arrays.source(tmp_path)
    got = [source[i] for i in range(len(source))]
    counts = collections.Counter(e["file"].decode() for e in got)
    assert counts == CLIPS
    assert videos.used(tmp_path) == [
        {"file": v.file, "caption": v.caption, "clips": CLIPS[v.file]} for v in listed if v.file in CLIPS
    ]
    skipped = {line["file"]: line["reason"] for line in videos.skipped(tmp_path)}
    assert skipped.keys() == REASONS.keys()
    for name, reason in REASONS.items():
        assert re.match(reason, skipped[name]), (name, skipped[name])
    for name in CLIPS:
        of_video = [e for e in got if e["file"].decode() == name]
        assert [float(e["start"]) for e in of_video] == [9 / 8 * n for n in range(CLIPS[name])]
        expected = stub(np.stack(list(clips.split_into_clips(folder / name, VIDEO))))["latents"]
        np.testing.assert_allclose([e["latents"] for e in of_video], expected, atol=0.1)
        row = of_video[0]["text"]
        caption = of_video[0]["caption"].decode()
        assert row.shape == (len(caption.split()), RECIPE.text.dim) and row.dtype == np.float16
        np.testing.assert_array_equal(row, words.encode_words([caption], RECIPE.text)[0, : len(row)])


def test_hosts_and_interruptions_change_no_byte(folder, listed, tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    write(whole, folder, listed, size=1)
    calls = []

    def breaks(video):
        calls.append(len(video))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return stub(video)

    with pytest.raises(KeyboardInterrupt):
        write(shared, folder, listed, breaks, size=1, process_id=0, process_count=2)
    assert 0 < len([n for n in shards(shared) if n.endswith("of-00004")]) < 4
    assert not write(shared, folder, listed, size=1, process_id=0, process_count=2)
    assert write(shared, folder, listed, size=1, process_id=1, process_count=2)
    assert shards(shared) == shards(whole)
    for name in (videos.USED, videos.SKIPPED):
        assert (shared / name).read_bytes() == (whole / name).read_bytes()

    def never(video):
        raise AssertionError("a finished dataset was made again")

    assert write(shared, folder, listed, never, size=1)


def test_a_word_that_the_text_encoder_does_not_know_costs_one_video(folder, listed, tmp_path):
    odd = [dataclasses.replace(v, caption="a red roof") if v.file == "tall.webm" else v for v in listed]
    assert write(tmp_path, folder, odd)
    reasons = {line["file"]: line["reason"] for line in videos.skipped(tmp_path)}
    assert reasons["tall.webm"].startswith("has a caption that cannot be encoded: unknown word 'red'")
    assert len(arrays.source(tmp_path)) == 6


def test_a_folder_without_any_usable_video_is_refused(folder, listed, tmp_path):
    bad = [v for v in listed if v.file in ("short.mp4", "empty.mp4")]
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"none of the 2 videos in .* gave a clip \(empty.mp4 is empty .*short.mp4"
        ):
            write(tmp_path, folder, bad)
    assert not arrays.is_complete(tmp_path)


@pytest.fixture(scope="module")
def workdir(folder, tmp_path_factory):
    """Encode the folder twice, with a VAE of random weights."""
    workdir = tmp_path_factory.mktemp("run")
    params = random_params(vae.abstract(RECIPE.vae), 1, 0.2)
    store.save_params(stages.stage_path(workdir, "vae"), params, wan_vae.metadata(RECIPE.vae))
    options = prepare.Options(videos=str(folder), captions=str(folder / "captions.jsonl"), batch=2)
    output = [prepare.run("videos", RECIPE, workdir, options) for _ in range(2)]
    (workdir / "output.json").write_text(json.dumps(output))
    return workdir


def test_the_summary_says_what_was_done_and_the_second_time_that_nothing_is_to_do(workdir):
    first, second = json.loads((workdir / "output.json").read_text())
    where = workdir / "data" / "latents"
    tail = f"7 clips of 4 videos, 7 videos skipped: the reasons are in {where / 'skipped.jsonl'}"
    assert first == f"{where}: 7 examples; {tail}"
    assert second == f"{where}: was complete already, nothing to do: 7 examples; {tail}"


def test_real_videos_become_latents(folder, workdir):
    params, _ = stages.load_stage(RECIPE, "vae", workdir)
    source = arrays.source(workdir / "data" / "latents")
    first = source[0]
    assert first["file"] == b"china.mp4"
    pixels = to_float(next(clips.split_into_clips(folder / "china.mp4", VIDEO)))[None]
    expected = jax.jit(lambda v: vae.encode(params, v, config=RECIPE.vae))(pixels)[0]
    np.testing.assert_allclose(first["latents"], expected, atol=4e-3)

    batch = next(pipeline.example_batches(source, batch_size=4, seed=0, text_length=8))
    assert batch["text"].shape == (4, 8, RECIPE.text.dim) and batch["latents"].shape == (4, 3, 4, 4, 4)
    np.testing.assert_array_equal(batch["text"], words.encode_words(list(batch["caption"]), RECIPE.text))


def test_the_recipe_reads_a_mixture_and_knows_its_captions(workdir):
    assert set(recipe_data.prompts(RECIPE, workdir)) == {"roofs in china", "slow roofs", "a tall flower", "a flower"}
    other = str(workdir / "data" / "latents")
    recipe = changed(RECIPE, data={"mixture": (("latents", 3.0), (other, 1.0))})
    source = recipe_data.latents(recipe, workdir)
    assert isinstance(source, pipeline.Mixture) and source.weights == (3.0, 1.0) and len(source) == 14
    missing = changed(RECIPE, data={"mixture": (("cats", 1.0),)})
    refused("no finished dataset at .*cats", recipe_data.latents, missing, workdir)
    refused("no captions of videos .*--stage=videos, or name a list", recipe_data.prompts, missing, workdir)


def test_own_videos_become_clips_and_latents_and_train_the_tiny_codec(folder, workdir, tmp_path):
    """The other stages are trained on own videos by ``examples/own_videos.py``, which a test runs."""
    stage = {"steps": 2, "samples": 1, "optimizer": {"learning_rate": 1e-3}}
    recipe = tiny_recipe(**CHANGES, train_taehv=stage)
    refused("no clips at .*prepare --stage=data --videos=DIR", training.train, "vae", recipe, tmp_path / "new")
    options = prepare.Options(videos=str(folder), captions=str(folder / "captions.jsonl"))
    summary = prepare.run("data", recipe, tmp_path, options)
    assert "clips: 7 examples (6 for training, 1 for tests); 7 clips of 4 videos, 7 videos skipped" in summary
    source = recipe_data.clips(recipe, tmp_path, "train")
    first = next(clips.split_into_clips(folder / "slow.mkv", VIDEO))
    np.testing.assert_array_equal(source[0]["video"], first)
    (tmp_path / "vae").symlink_to(workdir / "vae")
    training.train("taehv", recipe, tmp_path)
    losses = [record["loss"] for record in read_metrics(tmp_path / "taehv") if "loss" in record]
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert "latents: 6 examples" in prepare.run("latents", recipe, tmp_path)
    params, config = stages.load_stage(recipe, "vae", tmp_path)
    expected = vae.encode(params, to_float(first)[None], config=config)[0]
    encoded = arrays.source(tmp_path / "data" / "latents")[0]
    np.testing.assert_allclose(encoded["latents"], expected, atol=2e-2, rtol=2e-2)
    np.testing.assert_array_equal(encoded["text"], words.encode_words(["slow roofs"], recipe.text)[0][:2])
    assert set(recipe_data.prompts(recipe, tmp_path)) == {"slow roofs", "a tall flower", "a flower"}


def test_a_clip_that_lacks_one_frame_repeats_its_last(tmp_path):
    """5.00 s are 80 frames at 16 per second; a clip of 81 is shown until then."""
    real_videos.encode(tmp_path / "a.mp4", real_videos.shot(real_videos.CHINA, 24, 1.0, 32, 32), 24, "libx264")
    (clip,) = clips.split_into_clips(tmp_path / "a.mp4", VideoConfig(height=32, width=32, frames=17, fps=16))
    np.testing.assert_array_equal(clip[16], clip[15])
    with pytest.raises(clips.Unusable, match="too short: 16 frames at 16 per second"):
        list(clips.split_into_clips(tmp_path / "a.mp4", VideoConfig(height=32, width=32, frames=21, fps=16)))


def test_every_50th_video_is_for_tests():
    used = [f"{i}.mp4" for i in range(101)]
    assert videos.part_of(used, "test") == ["0.mp4", "50.mp4", "100.mp4"]
    train = videos.part_of(used, "train")
    assert len(train) == 98 and not set(train) & {"0.mp4", "50.mp4", "100.mp4"}
    assert videos.part_of(used[:1], "train") == videos.part_of(used[:1], "test") == used[:1]


def test_each_video_is_decoded_once_and_the_splits_share_no_clip(folder, tmp_path, monkeypatch):
    """The videos to test on, and the first one to train on, were decoded twice."""
    decoded, split = [], clips.split_into_clips

    def counted(path, config, limit=0):
        decoded.append(path.relative_to(folder).as_posix())
        return split(path, config, limit)

    monkeypatch.setattr(clips, "split_into_clips", counted)
    captioned = {
        "china.mp4": "roofs",
        "slow.mkv": "slow roofs",
        "tall.webm": "a red roof",
        "wide/flower.avi": "a flower",
    }
    table = tmp_path / "captions.json"
    table.write_text(json.dumps({"a.mp4": "roofs", **captioned}))
    options = prepare.Options(videos=str(folder), captions=str(table))
    summary = prepare.run("data", RECIPE, tmp_path, options)
    assert "clips: 6 examples (5 for training, 1 for tests); 6 clips of 3 videos" in summary
    assert sorted(decoded) == ["china.mp4", "slow.mkv", "wide/flower.avi"]
    prepare.run("data", RECIPE, tmp_path, options)
    assert len(decoded) == 3
    reasons = {line["file"]: line["reason"] for line in videos.skipped(tmp_path / "data" / "clips")}
    assert reasons["tall.webm"].startswith("has a caption that cannot be encoded: unknown word 'red'")
    train, test = (recipe_data.clips(RECIPE, tmp_path, name) for name in ("train", "test"))
    assert [train[i]["file"].decode() for i in range(len(train))] == ["slow.mkv"] * 3 + ["wide/flower.avi"] * 2
    assert [test[i]["file"].decode() for i in range(len(test))] == ["china.mp4"]
    assert recipe_data.prompts(RECIPE, tmp_path) == ["slow roofs", "a flower"]


def test_a_long_video_needs_the_memory_of_a_few_clips(tmp_path, monkeypatch):
    """All its clips were in memory until its last frame was decoded."""
    config, count = VideoConfig(height=192, width=192, frames=9, fps=8), 48
    made = np.random.default_rng(0).integers(0, 256, (9, 192, 192, 3), np.uint8)

    def decode(*_, **__):
        for n in range(count):
            yield 0, made + np.uint8(n)  # 1 MB each
        yield 0, None

    monkeypatch.setattr(clips, "decode_ahead", decode)
    monkeypatch.setattr(videos, "IN_MEMORY", 2**22)
    tracemalloc.start()
    try:
        videos.write_pixels(tmp_path, tmp_path, [captions.Video("a.mp4", "a", 1)], config, progress=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24e6
    source = arrays.source(tmp_path)
    assert len(source) == count
    for n in (0, 31, 47):
        np.testing.assert_array_equal(source[n]["video"], made + np.uint8(n))
        assert source[n]["start"] == np.float32(n * 9 / 8)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]
