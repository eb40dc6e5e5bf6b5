"""Every parser of a user's text or file returns or refuses; ``tests/fuzz.py`` runs them for longer."""

import hypothesis
import pytest

from tests import fuzz


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_any_input_is_read_or_refused(name):
    strategy, target = fuzz.TARGETS[name]
    outcomes = set()

    @hypothesis.settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @hypothesis.given(strategy)
    def run(example):
        outcomes.add(target(example))

    run()
    assert False in outcomes  # damage is noticed


@pytest.mark.parametrize("name", ["png", "jpg", "webp", "tiff", "bmp", "gif", "mp4", "safetensors", "csv", "jsonl"])
def test_the_inputs_that_are_damaged_are_valid(name):
    read = {"safetensors": fuzz.TARGETS["weights"], "csv": fuzz.TARGETS["captions"], "jsonl": fuzz.TARGETS["prompts"]}
    _, target = read.get(name, fuzz.TARGETS["videos" if name == "mp4" else "pictures"])
    assert target((name, fuzz.seed(name)))
