"""The roofline of a program's text against sums by hand, and the table of six chips for a small shape."""

import dataclasses
import importlib
import json
import pathlib

import pytest

from causvid_jax.analysis import estimate, flops, topology
from causvid_jax.config import ConfigError
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """HloModule jit_next_block

%sliced (p.0: bf16[4,64,32], p.1: s32[]) -> bf16[64,32] {
  %p.0 = bf16[4,64,32]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %piece = bf16[1,64,32]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %flat = bf16[64,32]{1,0} bitcast(%piece)
}

%written (q.0: f32[100,32], q.1: f32[2,32]) -> f32[100,32] {
  %q.0 = f32[100,32]{1,0} parameter(0)
  %q.1 = f32[2,32]{1,0} parameter(1)
  %at = s32[] constant(0)
  ROOT %update = f32[100,32]{1,0} dynamic-update-slice(%q.0, %q.1, %at, %at)
}

%condition (c: (s32[], f32[100,32])) -> pred[] {
  %c = (s32[], f32[100,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %most = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %most), direction=LT
}

%body (b: (s32[], f32[100,32])) -> (s32[], f32[100,32]) {
  %b = (s32[], f32[100,32]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%b), index=0
  %memory = f32[100,32]{1,0} get-tuple-element(%b), index=1
  %weights = bf16[4,64,32]{2,1,0} constant({...})
  %x = f32[2,64]{1,0} constant({...})
  %layer = bf16[64,32]{1,0} fusion(%weights, %n), kind=kLoop, calls=%sliced
  %y = f32[2,32]{1,0} dot(%x, %layer), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %new = f32[100,32]{1,0} fusion(%memory, %y), kind=kLoop, calls=%written
  ROOT %next = (s32[], f32[100,32]{1,0}) tuple(%n, %new)
}

ENTRY %main (a: f32[100,32]) -> f32[100,32] {
  %a = f32[100,32]{1,0} parameter(0)
  %begin = s32[] constant(0)
  %carry = (s32[], f32[100,32]{1,0}) tuple(%begin, %a)
  %q = bf16[1,6,2,8]{3,2,1,0} constant({...})
  %k = bf16[1,21,2,8]{3,2,1,0} constant({...})
  %attended = (bf16[1,6,2,8]{3,2,1,0}, u8[64]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax"
  %loop = (s32[], f32[100,32]{1,0}) while(%carry), condition=%condition, body=%body
  ROOT %out = f32[100,32]{1,0} get-tuple-element(%loop), index=1
}
"""
SLICED = 64 * 32 * 2 + 4 + 64 * 32 * 2  # one layer of four, its index, and its copy
DOT = 2 * 64 * 4 + 64 * 32 * 2 + 2 * 32 * 4
UPDATE = 2 * 32 * 4 * 2  # two rows of a hundred
ATTENTION = (6 + 21 + 21) * 16 * 2 + 6 * 16 * 2  # without the kernel's scratch memory


@pytest.fixture
def chips(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("chips")


def test_the_roofline_of_a_program_is_the_sum_by_hand(chips):
    """A loop of five turns: a slice, a product and an update in place; before it an attention kernel."""
    found = {cost.name: (cost.bytes, cost.flops, cost.turns) for cost in chips.roofline.costs(PROGRAM)}
    assert found == {
        "layer": (SLICED, 0, 5),
        "y": (DOT, 2 * 2 * 32 * 64, 5),
        "new": (UPDATE, 0, 5),
        "attended": (ATTENTION, 4 * 6 * 21 * 2 * 8, 1),
    }
    sums = chips.roofline.roofline(chips.roofline.costs(PROGRAM), rate=1.0, bandwidth=1.0)
    assert sums.launches == 16 and sums.bytes == 5 * (SLICED + DOT + UPDATE) + ATTENTION
    products = 5 * 2 * 2 * 32 * 64 + 4 * 6 * 21 * 2 * 8
    assert sums.flops == products
    assert sums.seconds == products + 5 * (SLICED + UPDATE) and sums.bound_by_bandwidth == 5 * (SLICED + UPDATE)


FRAME = """HloModule frame

%sum (s.0: f32[], s.1: f32[]) -> f32[] {
  %s.0 = f32[] parameter(0)
  %s.1 = f32[] parameter(1)
  ROOT %s = f32[] add(%s.0, %s.1)
}

%rotated (cache: bf16[21,8,4], k: f32[3,8,4], cos: f32[3,8,2], at: s32[]) -> bf16[21,8,4] {
  %cache = bf16[21,8,4]{2,1,0} parameter(0)
  %k = f32[3,8,4]{2,1,0} parameter(1)
  %cos = f32[3,8,2]{2,1,0} parameter(2)
  %at = s32[] parameter(3)
  %a = f32[3,8,2]{2,1,0} slice(%k), slice={[0:3], [0:8], [0:2]}
  %b = f32[3,8,2]{2,1,0} slice(%k), slice={[0:3], [0:8], [2:4]}
  %ac = f32[3,8,2]{2,1,0} multiply(%a, %cos)
  %bc = f32[3,8,2]{2,1,0} multiply(%b, %cos)
  %sum.1 = f32[3,8,2]{2,1,0} add(%ac, %bc)
  %difference = f32[3,8,2]{2,1,0} subtract(%ac, %bc)
  %both = f32[3,8,4]{2,1,0} concatenate(%difference, %sum.1), dimensions={2}
  %narrow = bf16[3,8,4]{2,1,0} convert(%both)
  %frame = bf16[1,8,4]{2,1,0} slice(%narrow), slice={[1:2], [0:8], [0:4]}
  %zero = s32[] constant(0)
  ROOT %update = bf16[21,8,4]{2,1,0} dynamic-update-slice(%cache, %frame, %at, %zero, %zero)
}

%normed (x: f32[3,8,4]) -> f32[1,8] {
  %x = f32[3,8,4]{2,1,0} parameter(0)
  %none = f32[] constant(0)
  %total = f32[8]{0} reduce(%x, %none), dimensions={0,2}, to_apply=%sum
  %row = f32[1,8]{1,0} bitcast(%total)
  ROOT %first = f32[1,8]{1,0} slice(%row), slice={[0:1], [0:8]}
}

ENTRY %main (cache.1: bf16[21,8,4], k.1: f32[3,8,4], cos.1: f32[3,8,2], at.1: s32[]) -> bf16[21,8,4] {
  %cache.1 = bf16[21,8,4]{2,1,0} parameter(0)
  %k.1 = f32[3,8,4]{2,1,0} parameter(1)
  %cos.1 = f32[3,8,2]{2,1,0} parameter(2)
  %at.1 = s32[] parameter(3)
  %sums = f32[1,8]{1,0} fusion(%k.1), kind=kInput, calls=%normed
  ROOT %one = bf16[21,8,4]{2,1,0} fusion(%cache.1, %k.1, %cos.1, %at.1), kind=kLoop, calls=%rotated
}
"""


def test_a_fusion_reads_only_what_its_result_needs(chips):
    """One frame of three is rotated and written to the cache; a sum needs all of them."""
    found = {cost.name: cost.bytes for cost in chips.roofline.costs(FRAME)}
    frame, angles, index, written = 8 * 4 * 4, 8 * 2 * 4, 4, 8 * 4 * 2
    assert found["one"] == pytest.approx(frame + angles + index + written)
    assert found["sums"] == 3 * frame + 8 * 4


def test_the_table_of_a_small_shape(chips, tmp_path, capsys, monkeypatch):
    """Three GPUs by a program that is there, at their own rates; a TPU by shapes, since nothing can compile for it."""
    recipe = tiny.tiny_recipe(causal={"window": 4})
    monkeypatch.setattr(chips, "load_recipe", lambda name: recipe)

    def describe(name):
        raise ConfigError("no compiler")

    monkeypatch.setattr(topology, "describe", describe)
    (tmp_path / "h200.hlo").write_text(PROGRAM)
    output = tmp_path / "chips.json"
    rows = chips.main(["--chips=h100,h200,b200,v5p", f"--programs={tmp_path}", f"--output={output}"])
    text = capsys.readouterr().out
    work = flops.stream_block(recipe)
    for row, peak, bandwidth in zip(
        rows, (989e12, 989e12, 2250e12, 459e12), (3.35e12, 4.8e12, 8e12, 2.765e12), strict=True
    ):
        ideal = 1e3 * work / (0.8 * peak)
        assert row.products_ms == pytest.approx(ideal) and row.above_ms == pytest.approx(row.roofline_ms - ideal)
        if row.chip == "v5p":
            parts = estimate.estimate(recipe, "stream", topology.parse("h100:1")).parts
            passes = len(recipe.diffusion.denoising_timesteps) + 1
            moved = passes * (parts["parameters"] + parts["caches"])
            assert row.program == "shapes" and row.launches == 0
        else:
            moved = 5 * (SLICED + DOT + UPDATE) + ATTENTION
            assert row.program == "h200:1" and row.launches == 16
        assert row.gigabytes == pytest.approx(moved / 1e9)
        assert row.roofline_ms >= max(ideal, 1e3 * moved / bandwidth) * (1 - 1e-9)
        assert f"| {row.chip} | {row.program} | {row.tflop:.4g} TFLOP |" in text
    assert json.loads(output.read_text())["rows"] == [dataclasses.asdict(row) for row in rows]
    with pytest.raises(ConfigError, match="--chips names h20; accepted: h100, h200, b200, v5e, v5p, v6e"):
        chips.main(["--chips=h20"])
