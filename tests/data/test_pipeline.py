import collections
import json

import numpy as np
import pytest

from causvid_jax.config import ConfigError
from causvid_jax.data import pipeline
from tests.refusals import refused


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


def test_crops_reach_every_start_and_change_from_epoch_to_epoch():
    batches = pipeline.clip_batches(_source(1, 6), batch_size=1, seed=0, frames=4)
    starts = collections.Counter(round(float((next(batches)["video"][0, 0, 0, 0, 0] + 1) * 127.5)) for _ in range(90))
    assert set(starts) == {0, 1, 2} and min(starts.values()) > 15


def _together(count, steps, *, state=None, batch_size=4, source=None, rows=None):
    """Captions ``[steps, batch_size]`` and videos that ``count`` processes read, and where they stand then."""
    parts, states = [], []
    rows = np.arange(batch_size).reshape(count, -1).tolist() if rows is None else rows
    for process in range(count):
        options = {"batch_size": batch_size, "seed": 5, "frames": 5, "rows": rows[process]}
        batches = pipeline.clip_batches(source or _source(), **options)
        if state is not None:
            batches.set_state(state)
        got = [next(batches) for _ in range(steps)]
        parts.append((_numbers(got), np.stack([batch["video"] for batch in got])))
        states.append(batches.get_state())
    assert states == [states[0]] * count
    together = (np.concatenate([part[i] for part in parts], axis=1) for i in (0, 1))
    return *together, json.loads(json.dumps(states[0]))


def _numbers(batches):
    numbers = np.array([[_number(c) for c in batch["caption"]] for batch in batches])
    index = np.stack([batch["index"] for batch in batches])
    np.testing.assert_array_equal(index, np.where(numbers < 100, numbers, numbers - 100 + 4))
    return numbers


@pytest.mark.parametrize("count", [1, 2, 4])
def test_no_example_is_lost_or_repeated_in_an_epoch_on_any_number_of_processes(count):
    numbers, videos, _ = _together(count, 9)
    epochs = numbers.reshape(3, 12)
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert (epochs[0] != epochs[1]).any()
    # Order, crops and the place of every row in its batch are those of one process.
    alone, whole, _ = _together(1, 9)
    np.testing.assert_array_equal(numbers, alone)
    np.testing.assert_array_equal(videos, whole)


def test_rows_can_be_named():
    alone, whole, _ = _together(1, 5)
    rows = [[0, 3], [2, 1]]
    numbers, videos, state = _together(2, 5, rows=rows)
    np.testing.assert_array_equal(numbers, alone[:, [0, 3, 2, 1]])
    np.testing.assert_array_equal(videos, whole[:, [0, 3, 2, 1]])
    assert state == {"examples": 20}
    for bad in ([4], []):
        refused("accepted: some rows of the batch", pipeline.clip_batches, _source(), batch_size=4, seed=0, rows=bad)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_a_restart_on_another_number_of_processes_goes_on_with_the_same_epoch(before, after):
    expected, videos, _ = _together(1, 9)
    first, seen, state = _together(before, 4)
    rest, unseen, end = _together(after, 5, state=state)
    assert (state, end) == ({"examples": 16}, {"examples": 36})
    np.testing.assert_array_equal(np.concatenate([first, rest]), expected)
    np.testing.assert_array_equal(np.concatenate([seen, unseen]), videos)


def test_another_batch_size_goes_on_with_the_next_example():
    expected = _together(1, 9)[0].reshape(-1)
    first, _, state = _together(1, 3)
    rest, _, _ = _together(2, 4, state=state, batch_size=6)
    np.testing.assert_array_equal(np.concatenate([first.reshape(-1), rest.reshape(-1)]), expected)


@pytest.mark.parametrize("count", [1, 2])
def test_a_mixture_keeps_its_weights_and_the_epochs_of_every_dataset(count):
    parts = [_source(4), [dict(e, caption=f"clip {100 + i}".encode()) for i, e in enumerate(_source(6))]]
    mixture = pipeline.Mixture(parts, (3.0, 1.0))
    numbers, videos, _ = _together(count, 24, source=mixture)
    order = numbers.reshape(-1)
    small, large = order[order < 100], order[order >= 100] - 100
    assert (len(small), len(large)) == (72, 24)
    for start in range(0, 96, 16):  # the share holds along the way, too
        assert (order[start : start + 16] < 100).sum() == 12
    for numbers, size in ((small, 4), (large, 6)):
        epochs = numbers.reshape(-1, size)
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1
    again, same, _ = _together(1, 20, source=mixture, state={"examples": 16})
    np.testing.assert_array_equal(again.reshape(-1), order[16:])
    np.testing.assert_array_equal(same, videos[4:])


def test_seed_and_threads():
    def captions(seed, threads):
        batches = pipeline.clip_batches(_source(), batch_size=12, seed=seed, threads=threads)
        return next(batches)["caption"].tolist()

    assert captions(0, 1) == captions(0, 4) != captions(1, 1)


def test_latents_are_cut_at_frame_zero_and_trajectories_kept_whole():
    latents = np.arange(2 * 5, dtype=np.float16).reshape(2, 5, 1, 1, 1)
    source = [{"latents": x, "caption": b"x"} for x in latents]
    batch = next(pipeline.example_batches(source, batch_size=2, seed=0, frames=3))
    order = np.argsort(batch["index"])
    np.testing.assert_array_equal(batch["latents"][order, :, 0, 0, 0], [[0, 1, 2], [5, 6, 7]])
    assert batch["latents"].dtype == np.float32
    source = [{"trajectory": latents, "caption": b"a red 3 moving left"}]
    batch = next(pipeline.example_batches(source, batch_size=1, seed=0))
    np.testing.assert_array_equal(batch["trajectory"], latents[None].astype(np.float32))
    assert batch["caption"].tolist() == ["a red 3 moving left"]


def test_embedded_captions_are_padded_where_a_length_is_asked_for():
    source = [{"text": np.full((2, 3), 1 + i, np.float16), "caption": b"x"} for i in range(2)]
    batch = next(pipeline.example_batches(source, batch_size=2, seed=0, text_length=4))
    expected = np.zeros((2, 4, 3), np.float32)
    expected[:, :2] = np.array([1, 2])[:, None, None]
    np.testing.assert_array_equal(batch["text"][np.argsort(batch["index"])], expected)
    assert batch["text"].dtype == np.float32
    assert set(next(pipeline.example_batches(source, batch_size=2, seed=0))) == {"caption", "index"}
    with pytest.raises(ConfigError, match="a caption has 2 tokens; text.length is 1"):
        next(pipeline.example_batches(source, batch_size=2, seed=0, text_length=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 99}, "the clips have 17"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_impossible_requests_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        next(pipeline.clip_batches(_source(), **{"batch_size": 2, "seed": 0, **options}))
    refused("empty", pipeline.clip_batches, [], batch_size=1, seed=0)
    refused("must be positive", pipeline.Mixture, [_source()], [0.0])
