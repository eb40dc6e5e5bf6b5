import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from causvid_jax.config import ConfigError, RunError
from causvid_jax.data import arrays
from tests.refusals import refused

SHAPE = (3, 2, 2, 4)


def _chunk(index):
    rng = np.random.default_rng(index)
    for i in range(2):
        yield {"latents": rng.normal(size=SHAPE).astype(np.float16), "caption": f"chunk {index} example {i}"}


def _write(folder, make_chunk=_chunk, **options):
    return arrays.write_dataset(
        folder,
        name="latents",
        features=arrays.array_features(latents=SHAPE),
        make_chunk=make_chunk,
        **{"chunks": 4, "identity": {"weights": "abc"}, "progress": False, **options},
    )


def _bytes(folder):
    return {p.name: p.read_bytes() for p in folder.glob("latents-*")}


def test_examples_come_back_in_order(tmp_path):
    assert _write(tmp_path)
    source = arrays.source(tmp_path)
    expected = [example for index in range(4) for example in _chunk(index)]
    assert len(source) == 8
    for got, example in zip((source[i] for i in range(8)), expected, strict=True):
        assert got["latents"].dtype == np.float16 and got["caption"].decode() == example["caption"]
        np.testing.assert_array_equal(got["latents"], example["latents"])
    info = tfds.builder_from_directory(str(tmp_path)).info
    assert info.splits["train"].shard_lengths == [2] * 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_writer_resumes_to_the_same_bytes(tmp_path, error):
    whole, stopped, asked = tmp_path / "whole", tmp_path / "stopped", []
    _write(whole)

    def breaks(index):
        for i, example in enumerate(_chunk(index)):
            if (index, i) == (2, 1):
                raise error
            yield example

    with pytest.raises(error):
        _write(stopped, breaks)
    assert not arrays.is_complete(stopped)
    refused("no finished dataset", arrays.source, stopped)

    def counted(index):
        asked.append(index)
        return _chunk(index)

    assert _write(stopped, counted)
    assert asked == [2, 3]
    assert _bytes(stopped) == _bytes(whole)
    assert _write(stopped, counted) and asked == [2, 3]


def test_a_lost_shard_is_written_again(tmp_path):
    _write(tmp_path)
    before = _bytes(tmp_path)
    (tmp_path / "latents-train.array_record-00001-of-00004").unlink()
    assert not arrays.is_complete(tmp_path)
    assert _write(tmp_path) and _bytes(tmp_path) == before


def test_a_full_disk_is_one_sentence_and_the_same_command_continues(tmp_path, monkeypatch):
    """ArrayRecord reports the failed write when the shard is closed."""
    real, left = arrays.array_record_module.ArrayRecordWriter, [2]

    class Full:
        def __init__(self, *given):
            self.write, self._close = (writer := real(*given)).write, writer.close

        def close(self):
            self._close()
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("write() failed: No space left on device; writing x.tmp; at byte 16384")

    with monkeypatch.context() as patch:
        patch.setattr(arrays.array_record_module, "ArrayRecordWriter", Full)
        with pytest.raises(RunError, match=r"00002-of-00004 cannot be written: No space left on device; make room or"):
            _write(tmp_path / "full")
    assert len(_bytes(tmp_path / "full")) == 2 and not list(tmp_path.rglob("*.tmp"))
    assert _write(tmp_path / "full") and _write(tmp_path / "whole")
    assert _bytes(tmp_path / "full") == _bytes(tmp_path / "whole")


def test_the_same_command_twice_at_once_writes_whole_shards(tmp_path):
    """A second process writes a shard while the first one is in the middle of it."""
    _write(tmp_path / "alone")
    folder, seen = tmp_path / "both", []

    def interrupted_by_another(index):
        for i, example in enumerate(_chunk(index)):
            yield example
            if (index, i) == (1, 0):
                _write(folder)
                seen.append(_bytes(folder))

    assert _write(folder, interrupted_by_another)
    assert _bytes(folder) == seen[0] == _bytes(tmp_path / "alone")


def test_processes_share_the_chunks(tmp_path):
    assert not _write(tmp_path, process_id=1, process_count=2)
    assert not arrays.is_complete(tmp_path)
    assert _write(tmp_path, process_id=0, process_count=2)
    assert len(arrays.source(tmp_path)) == 8


def test_another_identity_is_refused(tmp_path):
    _write(tmp_path)
    with pytest.raises(ConfigError, match="config differs, weights was 'abc' and is now 'xyz'") as error:
        _write(tmp_path, identity={"weights": "xyz", "config": "y" * 1000})
    assert len(str(error.value)) < 300
    assert json.loads((tmp_path / "identity.json").read_text())["weights"] == "abc"
    _write(tmp_path, identity={"weights": "abc", "dtype": "float32"})  # written before identities had a type
    _write(tmp_path / "typed", identity={"dtype": "bfloat16"})
    refused("dtype was 'bfloat16' and is now 'float32'", _write, tmp_path / "typed", identity={"dtype": "float32"})


def test_a_dataset_folder_runs_no_code(tmp_path, monkeypatch):
    """tfds imports the class that features.json names: a module of the current folder would run."""
    assert _write(tmp_path / "d")
    (tmp_path / "evil.py").write_text("open('ran', 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    features, info = tmp_path / "d" / "features.json", tmp_path / "d" / "dataset_info.json"
    whole = features.read_text()
    features.write_text(whole.replace("tensorflow_datasets.core.features.tensor_feature.Tensor", "evil.Tensor"))
    refused("has the feature type 'evil.Tensor'; it is not accepted", arrays.source, tmp_path / "d")
    assert not (tmp_path / "ran").exists()
    features.write_text("{")
    refused("its metadata is missing or damaged", arrays.source, tmp_path / "d")
    features.write_text(whole)
    info.write_text(info.read_text().replace('"{DATASET}-', '"../{DATASET}-'))
    refused("names files outside of it", arrays.source, tmp_path / "d")
