"""VBench: totals against hand-computed ones, its clips end to end on the digits student, drift against known motion."""

import collections
import json
import os
import pathlib
import shutil
import sys
import types

import av
import numpy as np
import pytest

from causvid_jax.checkpoints import source
from causvid_jax.cli import common
from causvid_jax.config import ConfigError
from causvid_jax.evaluation.vbench import clips, drift, score, totals
from tests import tiny
from tests.refusals import refused

QUALITY = ("subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness")
QUALITY += ("aesthetic_quality", "imaging_quality", "dynamic_degree")


def test_totals_are_those_of_the_formula_by_hand():
    """Scores at the ends of their ranges, and a mixture computed with pencil and paper."""
    high = {name: entry.high for name, entry in totals.DIMENSIONS.items()}
    low = {name: entry.low for name, entry in totals.DIMENSIONS.items()}
    assert totals.totals(high) == pytest.approx({"quality": 1.0, "semantic": 1.0, "total": 1.0})
    assert totals.totals(low) == pytest.approx({"quality": 0.0, "semantic": 0.0, "total": 0.0})
    # dynamic degree counts half: 0.5 / 6.5 of quality; scene at half its range is a ninth of a half of semantic.
    mixture = low | {"dynamic_degree": 1.0, "scene": 0.4111}
    result = totals.totals(mixture)
    assert result["quality"] == pytest.approx(0.5 / 6.5) and result["semantic"] == pytest.approx(0.5 / 9)
    assert result["total"] == pytest.approx((4 * 0.5 / 6.5 + 0.5 / 9) / 5)
    # motion smoothness 0.9 is (0.9 - 0.706) / 0.2915 = 0.66552
    assert totals.normalised("motion_smoothness", 0.9) == pytest.approx(0.665523, abs=1e-6)
    assert {name for name, entry in totals.DIMENSIONS.items() if entry.group == "quality"} == set(QUALITY)
    text = totals.describe(high)
    assert "| **total** | | **100.00** |" in text and "| here | 100.00 | 100.00 | 100.00 |" in text
    assert "(arXiv 2506.08009, table 1) | 84.31 | 85.07 | 81.28 |" in text
    for total, quality, semantic in totals.PUBLISHED.values():
        assert total == pytest.approx((4 * quality + semantic) / 5, abs=0.02)


def test_partial_runs_are_refused(tmp_path):
    scores = dict.fromkeys(totals.DIMENSIONS, 0.5)
    without = {name: value for name, value in scores.items() if name != "color"}
    refused("1 of 16 dimensions have no score, first color; a partial run has no total", totals.totals, without)
    refused("the score of color is no number", totals.totals, scores | {"color": float("nan")})
    result = tmp_path / "color_eval_results.json"
    result.write_text(json.dumps({"color": [0.7, [{"video_path": "a"}] * 4]}))
    assert totals.read_results([result], {"color": 4}) == {"color": 0.7}
    refused("scored color on 4 videos of 5; a partial run", totals.read_results, [result], {"color": 5})
    flicker = tmp_path / "flicker_eval_results.json"
    for count, accepted in ((0, False), (3, True), (5, True), (6, False)):  # static clips, of at most five a prompt
        flicker.write_text(json.dumps({totals.FLICKER: [0.9, [{"video_path": "a"}] * count]}))
        if accepted:
            assert totals.read_results([flicker], {totals.FLICKER: 5}) == {totals.FLICKER: 0.9}
        else:
            refused(f"on {count} videos of 5; a partial run", totals.read_results, [flicker], {totals.FLICKER: 5})
    refused("which another file has too", totals.read_results, [result, result], {})


INFO = [
    {"prompt_en": "a red 3", "dimension": ["color", "object_class"]},
    {"prompt_en": "a blue 7", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a red 3", "dimension": ["scene"]},
]
EXTENDED = "a red 3 moving left\na blue 7 moving up\na green 5 moving down\n"


@pytest.fixture
def lists(tmp_path):
    (tmp_path / "info.json").write_text(json.dumps(INFO))
    (tmp_path / "extended.txt").write_text(EXTENDED)
    return tmp_path


def test_the_plan_names_seeds_and_counts_clips_as_vbench_does(lists):
    entries = clips.read_entries(lists / "info.json", lists / "extended.txt")
    plan = clips.plan(entries, clips.Protocol())
    assert [clip.name for clip in plan[:5]] == [f"a red 3-{i}.mp4" for i in range(5)]
    assert len(plan) == 5 + 25 and [clip.seed for clip in plan[5:]] == list(range(25))
    assert {clip.text for clip in plan} == {"a red 3 moving left", "a blue 7 moving up"}
    expected = clips.expected_videos(entries, clips.Protocol())
    assert (expected["color"], expected["scene"], expected["temporal_flickering"]) == (5, 5, 5)
    assert clips.expected_videos(entries, clips.Protocol(samples=3, flicker_samples=2))["color"] == 3
    parts = [plan[i::3] for i in range(3)]
    assert sorted(clip.name for part in parts for clip in part) == sorted(clip.name for clip in plan)
    for text, words in (("a\n", "has 1 lines and"), ("a\n\nb\n", "is empty")):
        (lists / "extended.txt").write_text(text)
        refused(words, clips.read_entries, lists / "info.json", lists / "extended.txt")
    for shard in ("3/3", "1", "-1/2", "a/b"):
        refused("accepted: I/N", clips.parse_shard, shard)


def test_the_digits_student_is_sampled_end_to_end_and_resumed(lists, capsys, monkeypatch):
    """Two shards sample a fake list; a removed clip comes back bit for bit; another setting is refused."""
    opened, open_file = [], source.open_safetensors
    monkeypatch.setattr(source, "open_safetensors", lambda path, *more: opened.append(path) or open_file(path, *more))
    folder = lists / "run" / clips.VIDEOS
    flags = [f"--info={lists}/info.json", f"--extended={lists}/extended.txt", f"--output={lists}/run"]
    flags += ["--config=digits"]
    flags += ["--samples=1", "--flicker_samples=2", "--frames=10", "--batch=2"]
    for shard in ("0/2", "1/2"):
        common.call("vbench", [*flags, "--stage=sample", f"--shard={shard}"])
    assert set(collections.Counter(opened).values()) == {2}  # once by each shard
    names = sorted(os.listdir(folder))  # and no other file, whose suffix VBench could take for that of the clips
    assert names == ["a blue 7-0.mp4", "a blue 7-1.mp4", "a red 3-0.mp4"]
    with av.open(str(folder / names[0])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        comment = json.loads(container.metadata["comment"])
    assert len(frames) == 10 and np.std(frames) > 1
    assert comment == {"text": "a blue 7 moving up", "seed": 0, "recipe": "digits"}
    before = (folder / names[1]).read_bytes()
    (folder / names[1]).unlink()
    refused("lacks 1 of 3 clips, first 'a blue 7-1.mp4'", common.call, "vbench", [*flags, "--stage=score"])
    capsys.readouterr()
    common.call("vbench", [*flags, "--stage=sample"])
    assert "2 of 3 clips are there, 1 to sample" in capsys.readouterr().out
    assert (folder / names[1]).read_bytes() == before
    with pytest.raises(ConfigError, match="were sampled with another frames; give another --output"):
        common.call("vbench", [*flags, "--stage=sample", "--frames=11"])
    with pytest.raises(ConfigError, match="were sampled with another size; give another --output"):
        common.call("vbench", [*flags, "--stage=sample", "--config.video.height=64"])


def test_a_clip_that_ends_inside_a_block_has_room_for_the_block():
    recipe, rooms = tiny.tiny_recipe(causal={"window": 0, "frames_per_block": 3}), []
    pipe = types.SimpleNamespace(
        config=recipe,
        stream=lambda texts, seed, frames: rooms.append(frames),
        frames=lambda state: iter([(np.zeros((1, 13, 16, 16, 3), np.uint8), None)]),
    )
    list(clips._frames(pipe, [clips.Clip("a red 3", "a red 3", 0, "a red 3-0.mp4")], 13))
    assert rooms == [6]  # 13 frames are four latent frames, in blocks of three


@pytest.fixture
def package(monkeypatch):
    """A stand-in for the package ``vbench`` that finds clips as it does: by the suffix of the first file, 0 to 4.

    ``static`` is the set of clips that its filter finds static; ``calls`` are the evaluations.
    """
    fake = types.SimpleNamespace(calls=[], static={"a red 3-2.mp4", "a red 3-11.mp4", "a red 3-24.mp4"})

    class VBench:
        def __init__(self, device, info, output):
            self.entries, self.output = json.loads(pathlib.Path(info).read_text()), output

        def evaluate(self, *, videos_path, name, dimension_list, mode):
            names = sorted(os.listdir(videos_path), reverse=True)
            suffix = os.path.splitext(names[0])[1]
            wanted = [f"{e['prompt_en']}-{i}{suffix}" for e in self.entries for i in range(5)]
            videos = [{"video_path": f"{videos_path}/{each}"} for each in wanted if each in names]
            fake.calls.append((name, mode, dimension_list, videos_path))
            with open(f"{self.output}/{name}_eval_results.json", "w") as file:
                json.dump({name: [totals.DIMENSIONS[name].high, videos]}, file)

    def register_subparsers(subparsers):
        parser = subparsers.add_parser("static_filter")
        parser.add_argument("--videos_path", required=True)
        parser.add_argument("--result_path", default="./filter_results")
        parser.set_defaults(func=copy_static)

    def copy_static(arguments):
        chosen = pathlib.Path(arguments.result_path) / "filtered_videos"
        chosen.mkdir(parents=True)
        for i, name in enumerate(sorted(fake.static)):
            shutil.copy(pathlib.Path(arguments.videos_path) / name, chosen / f"a red 3-{i}.mp4")

    cuda = types.SimpleNamespace(is_available=lambda: False)
    static_filter = types.SimpleNamespace(register_subparsers=register_subparsers)
    for name, module in {
        "torch": types.SimpleNamespace(cuda=cuda, device=str),
        "vbench": types.SimpleNamespace(VBench=VBench),
        "vbench.cli": types.SimpleNamespace(static_filter=static_filter),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(score.importlib.util, "find_spec", lambda name: name == "vbench")
    return fake


@pytest.fixture
def sampled(lists):
    """Return the flags of a run whose clips, of one prompt of every dimension, are there."""
    entries = [{"prompt_en": "a red 3", "dimension": list(totals.DIMENSIONS)}]
    (lists / "info.json").write_text(json.dumps(entries))
    (lists / "run" / clips.VIDEOS).mkdir(parents=True)
    for i in range(25):
        (lists / "run" / clips.VIDEOS / f"a red 3-{i}.mp4").write_bytes(b"x")
    (lists / "run" / clips.VIDEOS / ".a red 3-7.mp4.lock").touch()  # of a killed sampler
    return [f"--info={lists}/info.json", f"--output={lists}/run", "--config=digits", "--stage=score"]


def test_scores_become_totals(sampled, package, lists, capsys):
    """Temporal flickering is computed last and on static clips; what VBench wrote is not computed again."""
    common.call("vbench", sampled)
    videos = str(lists / "run" / clips.VIDEOS)
    assert package.calls[0] == ("subject_consistency", "vbench_standard", ["subject_consistency"], videos)
    assert len(package.calls) == 16 and [call[0] for call in package.calls].index(totals.FLICKER) == 15
    assert {call[3] for call in package.calls[:15]} == {videos} and "static" in package.calls[15][3]
    out = capsys.readouterr().out
    assert "| **total** | | **100.00** |" in out and "temporal_flickering is computed on 3 static clips" in out
    common.call("vbench", sampled)
    assert len(package.calls) == 16 and "100.00" in (lists / "run" / "totals.md").read_text()


def test_a_run_whose_clips_all_move_has_no_total(sampled, package):
    package.static = set()
    refused("no clip of temporal flickering in .* is static", common.call, "vbench", sampled)


def test_missing_packages_are_named(sampled, lists):
    refused("scoring needs vbench; install it", common.call, "vbench", sampled)
    refused("has no vbench2_beta_long/eval_long.py", common.call, "vbench", [*sampled, f"--long={lists}"])


def test_the_program_of_long_videos_filters_static_clips_of_flickering_alone(tmp_path):
    program = tmp_path / "vbench2_beta_long" / "eval_long.py"
    program.parent.mkdir()
    program.write_text(
        "import json, os, sys\n"
        "folder = sys.argv[sys.argv.index('--output_path') + 1]\n"
        "os.makedirs(folder)\n"
        "json.dump(sys.argv[1:], open(folder + '/results_1_eval_results.json', 'w'))\n"
    )
    results = score.run_long(tmp_path, tmp_path / "videos", tmp_path / "results", ("color", totals.FLICKER))
    color, flicker = (json.loads(path.read_text()) for path in results)
    assert color[: color.index("--output_path")] == [
        *("--videos_path", str(tmp_path / "videos"), "--dimension", "color"),
        *("--mode", "long_vbench_standard", "--dev_flag"),
    ]
    assert "--static_filter_flag" in flicker and "--static_filter_flag" not in color


def texture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    spectrum = np.fft.fftfreq(height)[:, None] ** 2 + np.fft.fftfreq(width) ** 2
    noise = np.fft.fft2(rng.normal(size=(height, width))) * np.exp(-200 * spectrum)
    image = np.real(np.fft.ifft2(noise))
    return (image - image.min()) / np.ptp(image)


def moving(shifts, size=64):
    """Return a video of a texture at the given (x, y) shifts, uint8 ``[T, size, size, 3]``."""
    image = texture(256, 256)
    frames = [np.roll(image, (-int(y), -int(x)), (0, 1))[96 : 96 + size, 96 : 96 + size] for x, y in shifts]
    return (255 * np.repeat(np.stack(frames)[..., None], 3, axis=-1)).astype(np.uint8)


@pytest.mark.parametrize("shift", [(1, 0), (0, -2), (3, 2)])
def test_flow_is_the_shift_of_a_texture(shift):
    video = moving([(0, 0), shift])
    flow = drift.flow_pairs(video)[0][8:-8, 8:-8].reshape(-1, 2)
    np.testing.assert_allclose(np.median(flow, axis=0), -np.array(shift), atol=0.15)


def test_drift_sees_jumps_at_edges_of_blocks_brightness_and_frozen_frames():
    steady = np.cumsum(np.full((24, 2), (1, 0)), axis=0)
    jumps = (
        steady
        + np.where((np.arange(24) >= 8)[:, None], (0, 3), 0)
        + np.where((np.arange(24) >= 16)[:, None], (0, 3), 0)
    )
    smooth, broken = (drift.measure(moving(shifts), 8.0, 8, 8) for shifts in (steady, jumps))
    assert smooth.discontinuity < 1.5 < 3 < broken.discontinuity
    fading = moving(steady) * np.linspace(1, 0.5, 24)[:, None, None, None]
    faded = drift.measure(fading.astype(np.uint8), 8.0, 8, 8)
    assert smooth.helios["luma"] < 0.02 and faded.helios["luma"] == pytest.approx(0.44 * smooth.first["luma"], rel=0.15)
    fast = np.cumsum(np.full((24, 2), (3, 0)), axis=0)
    frozen = np.where((np.arange(24) < 12)[:, None], fast, fast[11])
    # At the edges, where the texture wraps around, flow is wrong, so even a slow shift counts as fast.
    still = np.zeros((24, 2), int)
    degree = [drift.measure(moving(shifts), 8.0, 8, 8).dynamic_degree for shifts in (fast, frozen, still)]
    assert degree[0] == 1.0 and degree[1] == pytest.approx(11 / 23, abs=0.05) and degree[2] == 0.0
    refused("less than two blocks", drift.measure, moving(steady[:6]), 8.0, 8, 8)
