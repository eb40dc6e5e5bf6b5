import collections

import numpy as np
import pytest

from causvid_jax.config import ConfigError
from causvid_jax.data import pipeline


def _source(count=12, frames=17):
    """Clips whose every pixel of frame t of clip i is 20 i + t."""
    base = np.arange(frames, dtype=np.uint8)[:, None, None, None]
    return [
        {"video": np.broadcast_to(base + 20 * i, (frames, 2, 2, 3)).copy(), "caption": f"clip {i}".encode()}
        for i in range(count)
    ]


def _number(caption):
    return int(caption.split()[1])


def test_batches_hold_contiguous_crops_scaled_to_one():
    batch = next(pipeline.clip_batches(_source(), batch_size=6, seed=0, frames=5))
    assert batch["video"].shape == (6, 5, 2, 2, 3) and batch["video"].dtype == np.float32
    pixels = (batch["video"] + 1) * 127.5
    for clip, caption in zip(pixels, batch["caption"], strict=True):
        start = clip[0, 0, 0, 0] - 20 * _number(caption)
        assert 0 <= round(float(start)) <= 12
        np.testing.assert_allclose(clip[:, 0, 0, 0], clip[0, 0, 0, 0] + np.arange(5), atol=1e-3)
    np.testing.assert_array_equal(pipeline.to_float(np.array([0, 255], np.uint8)), [-1, 1])


def test_crops_reach_every_start_and_change_from_epoch_to_epoch():
    batches = pipeline.clip_batches(_source(1, 6), batch_size=1, seed=0, frames=4)
    starts = collections.Counter(round(float((next(batches)["video"][0, 0, 0, 0, 0] + 1) * 127.5)) for _ in range(90))
    assert set(starts) == {0, 1, 2} and min(starts.values()) > 15


@pytest.mark.parametrize("count", [1, 2, 4])
def test_no_example_is_lost_or_repeated_in_an_epoch_on_any_number_of_processes(count):
    epochs, per_process = 3, 12 // count
    rows = []
    for process in range(count):
        batches = pipeline.clip_batches(
            _source(), batch_size=3, seed=5, frames=5, process_id=process, process_count=count
        )
        got = [next(batches) for _ in range(epochs * per_process // 3)]
        numbers = np.concatenate([[_number(c) for c in b["caption"]] for b in got])
        videos = np.concatenate([b["video"] for b in got])
        rows.append((numbers, videos))
    numbers = np.stack([r[0] for r in rows], 1).reshape(epochs, 12)  # the global order, interleaved
    for epoch in numbers:
        assert sorted(epoch) == list(range(12))
    assert (numbers[0] != numbers[1]).any()
    # The global order and the crops are those of one process.
    alone = pipeline.clip_batches(_source(), batch_size=36, seed=5, frames=5)
    whole = next(alone)
    assert [_number(c) for c in whole["caption"]] == numbers.reshape(-1).tolist()
    together = np.stack([r[1] for r in rows], 1).reshape(whole["video"].shape)
    np.testing.assert_array_equal(together, whole["video"])


@pytest.mark.parametrize("shares", [[[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]], [[0, 1], [2, 3], [4], [5]], [[0, 3]]])
def test_processes_read_their_rows_of_the_batches_of_one_process(shares):
    def take(count, rows, state=None):
        batches = pipeline.clip_batches(_source(), batch_size=6, seed=5, frames=5, rows=rows)
        if state is not None:
            batches.set_state(state)
        return [next(batches) for _ in range(count)], batches.get_state()

    alone = pipeline.clip_batches(_source(), batch_size=6, seed=5, frames=5)
    expected = [next(alone) for _ in range(5)]
    _, state = take(2, [0])  # any other share: the state counts batches, so it holds for all of them
    for rows in shares:
        (got, end), (rest, again) = take(5, rows), take(3, rows, state)
        assert end == again
        for batch, whole in [*zip(got, expected, strict=True), *zip(rest, expected[2:], strict=True)]:
            np.testing.assert_array_equal(batch["video"], whole["video"][rows])
            assert batch["caption"].tolist() == whole["caption"][rows].tolist()


def test_resume_continues_exactly():
    def fresh():
        return pipeline.clip_batches(_source(), batch_size=5, seed=1, frames=9)

    batches = fresh()
    for _ in range(4):
        next(batches)
    state = batches.get_state()
    expected = [next(batches) for _ in range(6)]
    resumed = fresh()
    resumed.set_state(state)
    for batch in expected:
        again = next(resumed)
        np.testing.assert_array_equal(again["video"], batch["video"])
        np.testing.assert_array_equal(again["caption"], batch["caption"])


def test_seed_and_threads():
    def captions(seed, threads):
        batches = pipeline.clip_batches(_source(), batch_size=12, seed=seed, threads=threads)
        return next(batches)["caption"].tolist()

    assert captions(0, 1) == captions(0, 4) != captions(1, 1)


def test_latents_are_cut_at_frame_zero_and_trajectories_kept_whole():
    latents = np.arange(2 * 5, dtype=np.float16).reshape(2, 5, 1, 1, 1)
    source = [{"latents": x, "caption": b"x"} for x in latents]
    batch = next(pipeline.latent_batches(source, batch_size=2, seed=0, frames=3, shuffle=False))
    np.testing.assert_array_equal(batch["latents"][..., 0, 0, 0], [[0, 1, 2], [5, 6, 7]])
    assert batch["latents"].dtype == np.float32
    source = [{"trajectory": latents, "caption": b"a red 3 moving left"}]
    batch = next(pipeline.trajectory_batches(source, batch_size=1, seed=0))
    np.testing.assert_array_equal(batch["trajectory"], latents[None].astype(np.float32))
    assert batch["caption"].tolist() == ["a red 3 moving left"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 99}, "the clips have 17"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"process_id": 2, "process_count": 2}, "accepted: 0 to 1"),
    ],
)
def test_impossible_requests_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        next(pipeline.clip_batches(_source(), **{"batch_size": 2, "seed": 0, **options}))
    with pytest.raises(ConfigError, match="empty"):
        pipeline.clip_batches([], batch_size=1, seed=0)
