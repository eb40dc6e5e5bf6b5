import dataclasses
import os
import pathlib
import threading

import numpy as np
import pytest

from causvid_jax.config import DataConfig, VideoConfig
from causvid_jax.data import digits, moving_digits
from tests.refusals import refused

DATA = DataConfig(train_clips=12, test_clips=6)
VIDEO = VideoConfig(height=32, width=32, frames=5)


def _times(folder):
    return {p: p.stat().st_mtime_ns for p in pathlib.Path(folder).rglob("*") if p.is_file()}


def test_records_are_the_clips_of_their_index(tmp_path):
    builder = moving_digits.prepare(tmp_path, DATA, VIDEO)
    assert {name: s.num_examples for name, s in builder.info.splits.items()} == {"train": 12, "test": 6}
    for split in moving_digits.SPLITS:
        source = moving_digits.source(tmp_path, DATA, VIDEO, split)
        for index in range(len(source)):
            record, clip = source[index], moving_digits.clip(DATA, VIDEO, split, index)
            assert record["video"].dtype == np.uint8
            np.testing.assert_array_equal(record["video"], clip["video"])
            assert record["caption"].decode() == clip["caption"]
            held_out = clip["caption"] in digits.captions(DATA, "test")
            assert record["held_out"] == clip["held_out"] == held_out == (split == "test" and index % 2 == 0)


def test_a_clip_depends_on_seed_split_and_index_only():
    def of(split, index, **change):
        return moving_digits.clip(dataclasses.replace(DATA, **change), VIDEO, split, index)

    first = of("train", 3)
    np.testing.assert_array_equal(of("train", 3, train_clips=5000)["video"], first["video"])
    for other in (of("train", 4), of("test", 3), of("train", 3, seed=1)):
        assert other["video"].tobytes() != first["video"].tobytes()


def test_a_finished_dataset_is_reused_and_another_size_replaces_it(tmp_path):
    before = _times(moving_digits.prepare(tmp_path, DATA, VIDEO).data_path)
    assert _times(moving_digits.prepare(tmp_path, DATA, VIDEO).data_path) == before
    larger = dataclasses.replace(DATA, train_clips=13)
    moving_digits.prepare(tmp_path, larger, VIDEO)
    assert len(moving_digits.source(tmp_path, larger, VIDEO, "train")) == 13


def test_settings_that_change_pixels_make_another_dataset(tmp_path):
    a = moving_digits.prepare(tmp_path, DATA, VIDEO)
    b = moving_digits.prepare(tmp_path, dataclasses.replace(DATA, speed=2), VIDEO)
    c = moving_digits.prepare(tmp_path, dataclasses.replace(DATA, handwriting="upright"), VIDEO)
    assert len({x.data_path for x in (a, b, c)}) == 3 and os.path.isdir(a.data_path)


def test_a_clip_of_upright_handwriting_is_rendered_from_an_upright_scan():
    data = dataclasses.replace(DATA, handwriting="upright")
    clip = moving_digits.clip(data, VIDEO, "test", 0)
    [spec] = digits.parse_caption(clip["caption"])
    images, labels, _ = digits.handwriting("test", "upright")
    ink = np.sort(clip["video"][0].max(-1), axis=None)  # the torus moves pixels and keeps their values
    scans = [np.sort(np.round(255 * digits.resize(x, data)), axis=None) for x in images[labels == spec.digit]]
    assert any((ink[-scan.size :] == scan).all() for scan in scans)


@pytest.mark.parametrize("name", ["train.array_record", "test.array_record"])
def test_a_lost_file_is_noticed_and_mended(tmp_path, name):
    builder = moving_digits.prepare(tmp_path, DATA, VIDEO)
    [lost] = pathlib.Path(builder.data_path).glob(f"*{name}*")
    lost.unlink()
    refused("--stage=data", moving_digits.source, tmp_path, DATA, VIDEO, "train")
    moving_digits.prepare(tmp_path, DATA, VIDEO)
    assert len(moving_digits.source(tmp_path, DATA, VIDEO, "train")) == 12


def test_a_second_process_waits_for_the_first(tmp_path, monkeypatch):
    builder_module = moving_digits.moving_digits_dataset_builder
    whole, others = builder_module.clip, []

    def clip(data, video, split, index):
        if index == 4 and not others:
            others.append(threading.Thread(target=moving_digits.prepare, args=(tmp_path, DATA, VIDEO)))
            others[0].start()
            others[0].join(0.5)
            assert others[0].is_alive()
        return whole(data, video, split, index)

    monkeypatch.setattr(builder_module, "clip", clip)
    folder = moving_digits.prepare(tmp_path, DATA, VIDEO).data_path
    before = _times(folder)
    others[0].join(60)
    assert len(before) > 2 and before == _times(folder)


def test_an_interrupted_run_leaves_nothing_that_reads_as_a_dataset(tmp_path, monkeypatch):
    builder_module = moving_digits.moving_digits_dataset_builder
    whole = builder_module.clip

    def stopped(data, video, split, index):
        if index == 4:
            raise KeyboardInterrupt
        return whole(data, video, split, index)

    monkeypatch.setattr(builder_module, "clip", stopped)
    with pytest.raises(KeyboardInterrupt):
        moving_digits.prepare(tmp_path, DATA, VIDEO)
    refused("no complete", moving_digits.source, tmp_path, DATA, VIDEO, "train")
    (tmp_path / "moving_digits" / moving_digits.MovingDigitsConfig.of(DATA, VIDEO).name).mkdir(
        parents=True, exist_ok=True
    )
    monkeypatch.setattr(builder_module, "clip", whole)
    moving_digits.prepare(tmp_path, DATA, VIDEO)
    assert len(moving_digits.source(tmp_path, DATA, VIDEO, "test")) == 6
    assert not list(tmp_path.rglob("*incomplete*"))
