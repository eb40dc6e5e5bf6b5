"""Drift of a long video without any model: curves over time, first against last part, jumps at the edges of blocks.

``|M(first 15 %) - M(last 15 %)|`` is the rule of Helios, here with measures M that need no network. The difference of
the first and the last five seconds is the rule of Forcing-KV. Motion is optical flow (Lucas and Kanade 1981, coarse to
fine). VBench and Forcing-KV use RAFT, so compare the numbers here only with each other. The dynamic degree is reported
too, because a frozen video has the least drift.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from causvid_jax.config import require

LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)
EDGE_SHARE = 0.15
SECONDS = 5.0
FLOW_SIDE = 128
"""Frames are reduced to about this many pixels on the shorter side before their flow is computed."""
LEVELS, ROUNDS, RADIUS = 3, 4, 3
"""Levels of the pyramid, steps on each of them, and radius in pixels of the windows of the optical flow."""


@dataclasses.dataclass(frozen=True)
class Drift:
    """The measures of one video.

    Attributes:
        curves: measure to its value in every frame ``[T]``; of ``motion``, in pixels, in every pair of frames
            ``[T - 1]``.
        helios: measure to ``|M(first 15 %) - M(last 15 %)|``.
        first, last: measure to its mean in the first and last five seconds.
        discontinuity: jump of the flow at edges of blocks over the jump elsewhere; 1 means invisible edges.
        dynamic_degree: share of pairs of frames, at 8 frames a second, that move.
    """

    curves: Mapping[str, np.ndarray]
    helios: Mapping[str, float]
    first: Mapping[str, float]
    last: Mapping[str, float]
    discontinuity: float
    dynamic_degree: float

    def summary(self) -> dict[str, object]:
        """Return everything but the curves."""
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "curves"}
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in rest.items()}


def measure(video: np.ndarray, fps: float, block_frames: int, first_block: int) -> Drift:
    """Measure the drift of a video uint8 ``[T, H, W, 3]`` of ``fps`` frames per second.

    Its first block has ``first_block`` pixel frames, the others ``block_frames``.

    Raises:
        ConfigError: a video of fewer than four frames or shorter than two blocks.
    """
    frames = len(video)
    require(frames >= 4, f"the video has {frames} frames; drift needs at least 4")
    edges = np.arange(first_block, frames, block_frames)
    require(len(edges) > 0, f"the video has {frames} frames, less than two blocks of {block_frames}")
    curves = frame_curves(video)
    flows = flow_pairs(video)
    scale = min(video.shape[1:3]) / min(flows.shape[1:3])
    size = np.linalg.norm(flows, axis=-1) * scale  # pixels of the video
    curves["motion"] = np.array([fastest(field) for field in size])
    part, seconds = max(1, round(EDGE_SHARE * frames)), max(1, round(SECONDS * fps))
    return Drift(
        curves,
        {name: abs(float(curve[:part].mean() - curve[-part:].mean())) for name, curve in curves.items()},
        {name: float(curve[:seconds].mean()) for name, curve in curves.items()},
        {name: float(curve[-seconds:].mean()) for name, curve in curves.items()},
        block_discontinuity(flows, edges),
        dynamic_degree(curves["motion"], fps, min(video.shape[1:3])),
    )


def frame_curves(video: np.ndarray) -> dict[str, np.ndarray]:
    """Return luma, contrast, saturation and sharpness of every frame, each ``[T]`` in [0, 1].

    Luma is the mean brightness and contrast its standard deviation; saturation is the mean of ``1 - min / max`` over
    the channels; sharpness is the mean absolute difference of neighbouring pixels.
    """
    names = ("luma", "contrast", "saturation", "sharpness")
    rows = []
    for frame in video:
        pixels = frame.astype(np.float32) / 255.0
        luma, most = pixels @ LUMA, pixels.max(axis=-1)
        saturation = np.where(most > 0, 1 - pixels.min(axis=-1) / np.maximum(most, 1e-6), 0.0)
        steps = [np.abs(np.diff(luma, axis=axis)).mean() for axis in (0, 1)]
        rows.append((luma.mean(), luma.std(), saturation.mean(), float(np.mean(steps))))
    return dict(zip(names, np.array(rows, np.float64).T, strict=True))


def fastest(size: np.ndarray) -> float:
    """Return the mean of the largest 5 % of the lengths ``[h, w]`` of a flow field, as in VBench's dynamic degree."""
    ordered = np.sort(size.reshape(-1))
    return float(ordered[-max(1, round(0.05 * ordered.size)) :].mean())


def dynamic_degree(motion: np.ndarray, fps: float, side: int) -> float:
    """Return the share of pairs of frames whose fastest pixels move more than ``6 side / 256`` pixels in 1/8 s.

    ``motion [T - 1]`` is in pixels per frame, ``side`` the shorter side of the video. VBench's threshold, at its 8
    frames per second.
    """
    return float((motion * fps / 8.0 > 6.0 * side / 256.0).mean())


def block_discontinuity(flows: np.ndarray, edges: np.ndarray) -> float:
    """Return how much more the flow ``[T - 1, h, w, 2]`` jumps at ``edges``, where blocks begin, than elsewhere.

    ``jump_t`` is the mean length of ``flow(t - 1 to t) - flow(t - 2 to t - 1)``; the result is its mean at the first
    frames of blocks over its mean at all other frames.

    Raises:
        ConfigError: no frame at an edge, or none elsewhere.
    """
    jumps = np.linalg.norm(np.diff(flows, axis=0), axis=-1).mean(axis=(1, 2))  # entry i belongs to frame i + 2
    at_edge = np.isin(np.arange(len(jumps)) + 2, edges)
    require(at_edge.any() and not at_edge.all(), "a video needs frames at edges of blocks and between them")
    return float(jumps[at_edge].mean() / max(float(jumps[~at_edge].mean()), 1e-6))


# ---- optical flow ----------------------------------------------------------------------------------------------------


def flow_pairs(video: np.ndarray) -> np.ndarray:
    """Return the flow (x, y) between neighbouring frames, ``[T - 1, h, w, 2]``, in pixels of the reduced size h x w."""
    step = max(1, min(video.shape[1:3]) // FLOW_SIDE)
    gray = [_reduce(frame.astype(np.float32) @ LUMA / 255.0, step) for frame in video]
    return np.stack([optical_flow(a, b) for a, b in zip(gray, gray[1:], strict=False)])


def optical_flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the flow ``[h, w, 2]`` in pixels (x, y) that takes ``first`` to ``second`` (grey ``[h, w]`` in [0, 1]).

    Lucas and Kanade (1981), from coarse to fine: least-squares steps on every level of a pyramid.
    """
    pyramid = [(first, second)]
    while len(pyramid) < LEVELS and min(pyramid[-1][0].shape) >= 32:
        pyramid.append((_reduce(pyramid[-1][0], 2), _reduce(pyramid[-1][1], 2)))
    flow = np.zeros((*pyramid[-1][0].shape, 2), np.float32)
    for a, b in reversed(pyramid):
        if flow.shape[:2] != a.shape:
            flow = 2 * np.repeat(np.repeat(flow, 2, axis=0), 2, axis=1)
            rows, columns = (max(0, have - now) for have, now in zip(a.shape, flow.shape, strict=False))
            flow = np.pad(flow, ((0, rows), (0, columns), (0, 0)), mode="edge")[: a.shape[0], : a.shape[1]]
        for _ in range(ROUNDS):
            flow = flow + _lucas_kanade(a, _warp(b, flow))
    return flow


def _lucas_kanade(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the least-squares shift of every window of 7 x 7 pixels."""
    gy, gx = np.gradient((a + b) / 2)
    change = a - b
    xx, xy, yy = _window(gx * gx), _window(gx * gy), _window(gy * gy)
    xt, yt = _window(gx * change), _window(gy * change)
    ridge = 1e-4
    determinant = (xx + ridge) * (yy + ridge) - xy * xy
    u = ((yy + ridge) * xt - xy * yt) / determinant
    v = ((xx + ridge) * yt - xy * xt) / determinant
    return np.clip(np.stack([u, v], axis=-1), -2, 2).astype(np.float32)


def _window(x: np.ndarray) -> np.ndarray:
    """Return the mean over a square window, edges repeated."""
    for axis in (0, 1):
        padded = np.pad(x, [(RADIUS + 1, RADIUS) if i == axis else (0, 0) for i in (0, 1)], mode="edge")
        total = np.cumsum(padded, axis=axis, dtype=np.float64)
        size = 2 * RADIUS + 1
        x = (np.take(total, range(size, total.shape[axis]), axis) - np.take(total, range(x.shape[axis]), axis)) / size
    return x


def _warp(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Return ``image`` read at every pixel plus its flow, bilinearly, edges repeated."""
    height, width = image.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    x, y = np.clip(x + flow[..., 0], 0, width - 1), np.clip(y + flow[..., 1], 0, height - 1)
    left, top = np.minimum(x.astype(int), width - 2), np.minimum(y.astype(int), height - 2)
    dx, dy = x - left, y - top
    upper = image[top, left] * (1 - dx) + image[top, left + 1] * dx
    return (upper * (1 - dy) + (image[top + 1, left] * (1 - dx) + image[top + 1, left + 1] * dx) * dy).astype(
        np.float32
    )


def _reduce(image: np.ndarray, step: int) -> np.ndarray:
    """Return means of squares of ``step`` x ``step`` pixels."""
    height, width = (size // step for size in image.shape)
    return image[: height * step, : width * step].reshape(height, step, width, step).mean(axis=(1, 3))
