"""A folder of real encoded videos: the photographs that ship inside scikit-learn, panned and zoomed."""

import json
import pathlib
from fractions import Fraction

import av
import numpy as np
from sklearn.datasets import load_sample_images

CHINA, FLOWER = load_sample_images().images


def shot(image, fps: int, seconds: float, height: int, width: int):
    """Frame n shows the photograph at n / fps seconds: a window that pans right and zooms in, scaled by area."""
    frames = []
    for n in range(round(fps * seconds)):
        t = n / fps
        scale = max(2, round(5 - t / 2))
        left, top = round(40 * t), round(15 * t)
        window = image[top : top + scale * height, left : left + scale * width]
        assert window.shape[:2] == (scale * height, scale * width)
        frames.append(window.reshape(height, scale, width, scale, 3).mean(axis=(1, 3)).round().astype(np.uint8))
    return np.stack(frames)


def encode(path: pathlib.Path, frames, fps: int, codec: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        if codec == "libx264":
            stream.options = {"crf": "12", "preset": "ultrafast"}
        elif codec == "libvpx-vp9":
            stream.options = {"crf": "10", "cpu-used": "8", "deadline": "realtime"}
        else:
            stream.options = {"qmin": "2", "qmax": "2"}
        for n, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, "rgb24")
            picture.pts = n
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))


def write_folder(root: pathlib.Path) -> pathlib.Path:
    """Ten files, of which four give clips of 9 frames at 8 a second (1.125 s); the captions file is returned.

    =====================  =========  =======  ====  ===========================================
    file                   codec      size     fps   clips
    =====================  =========  =======  ====  ===========================================
    china.mp4              H.264      64 x 32  24    1 (1.5 s)
    wide/flower.avi        MPEG-4     96 x 48  30    2 (2.5 s)
    tall.webm              VP9        32 x 64  12    1 (1.2 s)
    slow.mkv               H.264      32 x 32  5     3 (4 s)
    short.mp4              H.264      32 x 32  24    too short (0.5 s)
    no_end.mkv             H.264      64 x 32  24    cut off after 60% of its bytes
    no_index.mp4           H.264      64 x 32  24    cut off before its index
    empty.mp4, text.mp4, silent.mp4 (without a caption), missing.mp4 (named, but not there)
    =====================  =========  =======  ====  ===========================================
    """
    china = shot(CHINA, 24, 1.5, 32, 64)
    encode(root / "china.mp4", china, 24, "libx264")
    encode(root / "wide" / "flower.avi", shot(FLOWER, 30, 2.5, 48, 96), 30, "mpeg4")
    encode(root / "tall.webm", shot(FLOWER, 12, 1.2, 64, 32), 12, "libvpx-vp9")
    encode(root / "slow.mkv", shot(CHINA, 5, 4.0, 32, 32), 5, "libx264")
    encode(root / "short.mp4", shot(FLOWER, 24, 0.5, 32, 32), 24, "libx264")
    encode(root / "no_end.mkv", np.concatenate([china, china[::-1]] * 2), 24, "libx264")
    for name, source in (("no_end.mkv", "no_end.mkv"), ("no_index.mp4", "china.mp4")):
        data = (root / source).read_bytes()
        (root / name).write_bytes(data[: len(data) * 6 // 10])
    (root / "empty.mp4").touch()
    (root / "text.mp4").write_text("this is no video")
    (root / "silent.mp4").write_bytes((root / "china.mp4").read_bytes())
    captions = root / "captions.jsonl"
    names = {"china.mp4": "roofs in china", "wide/flower.avi": "a flower", "tall.webm": "a tall flower"}
    names |= {"slow.mkv": "slow roofs", "silent.mp4": "  "}
    names |= dict.fromkeys(("short.mp4", "no_end.mkv", "no_index.mp4", "empty.mp4", "text.mp4"), "a flower")
    names |= {"missing.mp4": "a flower"}
    captions.write_text("".join(json.dumps({"file": k, "caption": v}) + "\n" for k, v in names.items()))
    return captions
