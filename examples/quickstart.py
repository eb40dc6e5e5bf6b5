"""Stream two seconds of a moving digit with the included weights and write them as a video.

python examples/quickstart.py --prompt="a red 3 moving left" --output=quickstart.mp4
"""

import argparse
import time

import numpy as np

import causvid_jax as cv
from causvid_jax import media


def main(arguments: list[str] | None = None) -> np.ndarray:
    """Write a video and return its frames, uint8 ``[T, H, W, 3]``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", default="a red 3 moving left")
    parser.add_argument("--blocks", type=int, default=3, help="a block is 12 frames, the first one 9")
    parser.add_argument("--output", default="quickstart.mp4")
    options = parser.parse_args(arguments)

    pipe = cv.load("digits")
    state, video, begin = pipe.stream(options.prompt, seed=0), [], time.perf_counter()
    for frames, state in pipe.frames(state, blocks=options.blocks):  # noqa: B007, B020
        video.append(frames[0])
        print(f"{sum(map(len, video))} frames after {time.perf_counter() - begin:.1f} s")
    clip = np.concatenate(video)
    media.write_video(options.output, clip, pipe.config.video.fps, upscale=8)
    print(f"Wrote {options.output}")
    return clip


if __name__ == "__main__":
    main()
