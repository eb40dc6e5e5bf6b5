"""The report with samplers that are known: real clips, and clips wrong in a way that each figure must show."""

import json
import time

import numpy as np
import pytest

from causvid_jax.config import CausalConfig, ConfigError, DataConfig, Recipe, VideoConfig
from causvid_jax.data import digits
from causvid_jax.evaluation import classifier, contact_sheet, frame_metrics, report
from tests.refusals import refused
from tests.tiny import changed

RECIPE = Recipe(
    name="fake",
    video=VideoConfig(height=32, width=32, frames=81),
    data=DataConfig(handwriting="upright"),
)
PLAN = report.Plan(
    samples=6,
    switch_samples=3,
    long_samples=4,
    reference=24,
    batch=4,
    long_factor=2,
    longest_factor=3,
    longest_samples=2,
    repeats=1,
    seed=1,
)


def render(prompts, seed, frames):
    rng = np.random.default_rng(seed)
    video = VideoConfig(height=32, width=32, frames=1 + 4 * (frames // 4))  # at least as many
    return np.stack([digits.sample_clip(rng, "test", RECIPE.data, video, p)[0][:frames] for p in prompts])


class Fake:
    """Real clips from every sampler, but: the teacher is slow and never moves, and a new prompt is obeyed late."""

    def __init__(self, late_blocks=1):
        self.late = 12 * late_blocks
        self.calls = []

    def teacher(self, prompts, seed, *, decode=True):
        self.calls.append(("teacher", len(prompts), decode))
        time.sleep(0.2)
        return np.repeat(render(prompts, seed, 1), 81, axis=1)

    def student(self, prompts, seed, *, frames, switch=None, decode=True):
        self.calls.append(("student", len(prompts), decode))
        if not decode:
            return np.zeros(1)
        video = render(prompts, seed, frames)
        if switch is not None:
            at, after = switch
            video[:, at + self.late :] = render(after, seed + 99, frames - at - self.late)
        return video


@pytest.fixture(scope="module")
def result():
    fake = Fake()
    samplers = report.Samplers(
        reconstruct=lambda video: video,
        teacher=fake.teacher,
        student=fake.student,
        reconstruct_tiny=lambda video: video[:, ::-1],
    )
    return report.evaluate(RECIPE, classifier.load(RECIPE.data), samplers, PLAN), fake


def test_scores_of_every_row(result):
    scores = result[0].report["scores"]
    assert {name: row["clips"] for name, row in scores.items()} == {
        "real": 6,
        "vae": 6,
        "taehv": 6,
        "teacher": 6,
        "student": 6,
        "long": 4,
        "longest": 2,
    }
    assert scores["vae"] == scores["real"]
    assert scores["taehv"]["color"] == 1.0 and scores["taehv"]["direction"] == 0.0
    for name in ("real", "student", "long"):
        assert scores[name]["all"] == 1.0
        assert 0.9 < scores[name]["discontinuity"] < 1.1
    assert scores["teacher"]["digit"] == scores["teacher"]["color"] == 1.0
    assert scores["teacher"]["direction"] == scores["teacher"]["all"] == 0.0
    assert scores["teacher"]["discontinuity"] == 1.0


def test_frames_of_every_row(result):
    frames = result[0].report["frames"]
    np.testing.assert_allclose(frames["real"]["sharpness"]["mean"], 1.0, rtol=1e-12)
    assert frames["vae"]["psnr"]["worst"] > 100 > 30 > frames["taehv"]["psnr"]["mean"]
    assert frames["student"]["direction"]["mean"] == 1.0 and frames["teacher"]["direction"]["mean"] == 0.0
    for name in ("real", "student", "long"):
        assert frames[name]["digit"]["mean"] > 0.9 and frames[name]["color"]["mean"] == 1.0
    assert "| teacher |" in contact_sheet.markdown(result[0].report).split("frame by frame")[1]


def test_sharpness_is_relative_to_real_clips_of_the_same_digit():
    """A few streams of one digit are not compared with the mean over all digits."""
    prompts = [f"a {color} {digit} moving left" for digit in (0, 5) for color in ("red", "green")]
    values = frame_metrics.sharpness(report.real_clips(RECIPE, prompts, 0))
    real = report.real_sharpness(RECIPE, prompts, 0)
    np.testing.assert_allclose([real[0], real[5]], [values[:2].mean(), values[2:].mean()])
    relative = frame_metrics.relative_sharpness(values[2:], [5, 5], real)
    np.testing.assert_allclose(relative, 2 * values[2:] / (values[2] + values[3]))


def test_switch_that_takes_one_block_more(result):
    switch = result[0].report["switch"]
    for scores in (switch, switch["every_block"]):
        assert (scores["within_1"], scores["within_2"], scores["within_3"], scores["median_blocks"]) == (0, 1, 1, 2)
    assert switch["old_caption_before"] == 1.0
    assert switch["new_caption_by_block"] == [0.0] + [1.0] * 6
    assert switch["clips"] == 3 and switch["cache"] == RECIPE.causal.on_prompt_switch


def test_targets_and_timing(result):
    seconds = result[0].report["seconds_per_clip"]
    assert 0.05 <= seconds["teacher"]["with_decode"] < 0.5
    assert seconds["student"]["without_decode"] < 0.01
    met = {target["name"]: target["met"] for target in result[0].report["targets"]}
    assert met["network passes per frame, teacher / student"]
    assert met["teacher, digit"] and not met["teacher, direction"] and met["student, direction"]
    assert met["new prompt holds within 2 blocks"] and met["longest, direction"] and met["longest, digit lost"]
    assert met["VAE, PSNR at the worst frame index"] and met["VAE, PSNR lost at the first frame"]
    assert {size for _, size, _ in result[1].calls} == {PLAN.batch}  # one batch size: one compilation


def test_a_student_without_a_teacher(result):
    """The same figures, and nothing of the teacher."""
    fake = Fake()
    samplers = report.Samplers(reconstruct=lambda video: video, teacher=None, student=fake.student)
    alone = report.evaluate(RECIPE, classifier.load(RECIPE.data), samplers, PLAN)
    scores, both = alone.report["scores"], result[0].report
    assert scores == {name: row for name, row in both["scores"].items() if name not in ("teacher", "taehv")}
    assert alone.report["switch"] == both["switch"]
    assert list(alone.report["passes"]) == list(alone.report["seconds_per_clip"]) == ["student"]
    assert alone.report["targets"] == [t for t in both["targets"] if "teacher" not in t["name"]]
    assert {name for name, *_ in fake.calls} == {"student"} and "teacher" not in contact_sheet.markdown(alone.report)
    assert contact_sheet.contact_sheet(alone.clips, examples=2, columns=5).size[1] == 6 * (64 + 18)


def test_streams_of_whole_blocks():
    """Ten clips of the prescribed geometry are 837 frames, and their last 81 have the borders of a clip."""
    starts = report.stream_starts(RECIPE, 10)
    assert starts[-1] == 837
    assert starts[starts > 837 - 81].tolist() == [756 + n for n in (9, 21, 33, 45, 57, 69, 81)]
    causal = CausalConfig(frames_per_block=4, independent_first_frame=True)
    single = changed(RECIPE, causal=causal)  # blocks 1, 4, 4, 4, 4, 4
    assert report.stream_starts(single, 1).tolist() == [0, 1, 17, 33, 49, 65, 81]
    assert report.stream_starts(single, 2)[5:].tolist() == [65 + 16 * n for n in range(8)]


def test_one_misread_block_does_not_undo_a_switch_but_a_caption_that_is_lost_does():
    prompts = report.held_out_prompts(RECIPE, 3, 0)
    after = report.switched_prompts(RECIPE, prompts, 0)
    starts = report.stream_starts(RECIPE, 2)
    at = (len(starts) - 1) // 2
    video = Fake(0).student(prompts, 0, frames=int(starts[-1]), switch=(int(starts[at]), after))
    video[1, starts[at + 3] + 4 : starts[at + 3] + 8] = 0  # a third of one block of the second clip is black
    video[2, starts[at + 3] :] = video[2, starts[at + 3]]  # the third stands still from its fourth block on
    switch = report.switch_report(RECIPE, classifier.load(RECIPE.data), video, prompts, after, starts, at)
    assert (switch["within_1"], switch["within_3"], switch["ever"]) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    strict = switch["every_block"]
    assert (strict["within_1"], strict["within_3"], strict["ever"]) == pytest.approx((1 / 3, 1 / 3, 2 / 3))


@pytest.mark.parametrize("count", [1, 2])
def test_prompts_are_held_out_and_switches_change_everything(count):
    recipe = changed(RECIPE, data={"digits_per_clip": count})
    prompts = report.held_out_prompts(recipe, 70, seed=0)
    held_out = set(digits.captions(recipe.data, "test"))
    assert len(set(prompts[:56])) == 56 and held_out.issuperset(prompts)
    for old, new in zip(prompts, report.switched_prompts(recipe, prompts, seed=0), strict=True):
        assert new in held_out
        before, after = classifier.target_triples(old), classifier.target_triples(new)
        assert len(after) == count
        assert not any(a == b for x in before for y in after for a, b in zip(x, y, strict=True))


def test_report_is_json_and_markdown_and_a_picture(result):
    data = json.loads(json.dumps(result[0].report))
    text = contact_sheet.markdown(data)
    assert "| real test clips | 1.000 | 1.000 | 1.000 | 1.000 |" in text
    assert "| teacher | 100 | 100 |" in text and "| student | 35 | 5 |" in text
    assert "| within 2 blocks | 1.000 |" in text
    sheet = contact_sheet.contact_sheet(result[0].clips, examples=2, columns=5)
    assert sheet.size == (2 * (5 * 66 + 8) - 8, 7 * (64 + 18))
    # The first tile of the first row is the first frame of the first real clip.
    tile = np.asarray(sheet)[14 : 14 + 64 : 2, 0:64:2]
    np.testing.assert_array_equal(tile, result[0].clips["real"][1][0, 0])


def test_prompts_of_the_validation_split():
    recipe = changed(RECIPE, data={"validation_fraction": 0.05})
    prompts = report.held_out_prompts(recipe, 20, 0, "validation")
    after = report.switched_prompts(recipe, prompts, 0, "validation")
    assert {*prompts, *after} <= set(digits.captions(recipe.data, "validation"))
    with pytest.raises(ConfigError, match="data.validation_fraction is 0.0; no caption is held out for it"):
        report.held_out_prompts(RECIPE, 20, 0, "validation")


def test_plans_that_measure_nothing_are_refused():
    refused("--samples is 1", report.Plan, samples=1)
    refused("--switch_samples is 1", report.Plan, switch_samples=1)
