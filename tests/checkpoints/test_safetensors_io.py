"""safetensors files written as a stream: what others read of ours, what a failure or a kill leaves."""

import os
import signal
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from causvid_jax.checkpoints import safetensors_io, store
from causvid_jax.config import ConfigError
from causvid_jax.config.files import atomic, format_bytes

ARRAYS = {
    "b/odd": np.arange(3, dtype=np.float16),
    "a": np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32),
    "half": np.arange(7).astype(ml_dtypes.bfloat16),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 3), np.float32),
    "many": np.arange(24, dtype=np.int64).reshape(2, 3, 4),
}


def write(path, arrays=None, checksum=True, pieces=None):
    arrays = ARRAYS if arrays is None else arrays
    layout = {name: (np.shape(array), np.asarray(array).dtype) for name, array in arrays.items()}
    whole = lambda name: (np.asarray(arrays[name]),)  # noqa: E731
    safetensors_io.write_safetensors(path, layout, pieces or whole, {"note": "x"}, checksum)


def test_the_library_reads_what_is_written_and_the_checksum_is_that_of_the_store(tmp_path):
    write(tmp_path / "w.safetensors")
    flat = safetensors.numpy.load_file(tmp_path / "w.safetensors")
    assert flat.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert flat[name].dtype == np.asarray(array).dtype and flat[name].shape == np.shape(array)
        np.testing.assert_array_equal(flat[name], array)
    with safetensors.safe_open(str(tmp_path / "w.safetensors"), "np") as file:
        assert file.metadata() == {"note": "x", "sha256": store.checksum(flat, {"note": "x"})}
    store.verify(tmp_path / "w.safetensors")
    store.load_params(tmp_path / "w.safetensors")


def test_tensors_are_aligned_and_read_one_by_one(tmp_path):
    write(tmp_path / "w.safetensors", checksum=False)
    tensors, metadata = safetensors_io.open_safetensors(tmp_path / "w.safetensors")
    assert metadata == {"note": "x"}
    for name, array in ARRAYS.items():
        assert (tensors[name].shape, tensors[name].dtype) == (np.shape(array), np.asarray(array).dtype)
        with tensors[name].view() as view:
            np.testing.assert_array_equal(view, array)
            assert view.flags.aligned


def test_a_file_that_is_replaced_after_it_was_opened_is_read_as_it_was(tmp_path):
    """A stage writes its weights again while a sampler reads them; the sampler had tensors of both."""
    write(tmp_path / "w.safetensors", checksum=False)
    tensors, _ = safetensors_io.open_safetensors(tmp_path / "w.safetensors")
    write(tmp_path / "w.safetensors", {name: 0 * np.asarray(array) for name, array in ARRAYS.items()}, checksum=False)
    for name, array in ARRAYS.items():
        with tensors[name].view() as view:
            np.testing.assert_array_equal(view, array)


def test_pieces_make_a_tensor(tmp_path):
    write(tmp_path / "w.safetensors", {"many": ARRAYS["many"]}, pieces=lambda name: iter(ARRAYS[name]))
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "w.safetensors")["many"], ARRAYS["many"])
    store.verify(tmp_path / "w.safetensors")


def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "w.safetensors"
    write(path)
    before = path.read_bytes()

    def fail(name):
        if name == "many":
            raise ZeroDivisionError
        return (np.asarray(ARRAYS[name]),)

    with pytest.raises(ZeroDivisionError):
        write(path, pieces=fail)
    with pytest.raises(ValueError, match="came to 0 bytes"):
        write(path, pieces=lambda name: ())
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_a_temporary_that_the_next_removes_and_a_live_one_keeps_its_own(tmp_path):
    """kill -9 in the middle; then a write while another process still writes the same target."""
    program = textwrap.dedent(
        """
        import sys, time
        import numpy as np
        from causvid_jax.checkpoints import safetensors_io as files

        def pieces(name):
            yield np.zeros(4, np.float32)
            print("half", flush=True)
            time.sleep(60)

        files.write_safetensors(sys.argv[1], {"a": ((8,), np.dtype(np.float32))}, pieces, {}, True)
        """
    )
    path = tmp_path / "w.safetensors"

    def start():
        process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "half\n"
        return process

    killed, live = start(), None
    try:
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
        (left,) = tmp_path.iterdir()
        assert left.match(".w.safetensors.*.tmp")
        live = start()
        (own,) = tmp_path.iterdir()
        assert own.match(".w.safetensors.*.tmp") and own != left
        write(path)
        assert set(tmp_path.iterdir()) == {own, path}
    finally:
        for process in (killed, live):
            if process is not None:
                process.kill()
                process.wait()
                process.stdout.close()


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with atomic(tmp_path / "folder", directory=True) as temporary:
        (temporary / "inner").write_text("x")
        assert not (tmp_path / "folder").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "other", directory=True) as temporary:
        (temporary / "inner").write_text("x")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    with pytest.raises(ConfigError, match="folder cannot be written"), atomic(tmp_path / "folder", True):
        pass


def test_bytes_for_people():
    assert [format_bytes(n) for n in (640, 3_200_000, 57_153_966_336)] == ["640 bytes", "3.20 MB", "57.15 GB"]
