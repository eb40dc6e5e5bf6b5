"""Stream moving digits with the included weights and switch the prompt while the stream continues.

python examples/switch_prompt.py --output=switch.png
"""

import argparse

import numpy as np
from PIL import Image

import causvid_jax as cv


def main(arguments: list[str] | None = None) -> np.ndarray:
    """Stream, write every fourth frame side by side as a picture, and return all frames, uint8 ``[T, H, W, 3]``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", default=["a red 3 moving left", "a blue 7 moving up"])
    parser.add_argument("--blocks", type=int, default=6, help="blocks for each prompt")
    parser.add_argument("--output", default="switch.png", help="the picture")
    options = parser.parse_args(arguments)

    pipe = cv.load("digits")
    state, video = pipe.stream(options.prompts[0], seed=0), []
    for i, prompt in enumerate(options.prompts):
        if i > 0:
            state = pipe.switch(state, prompt)
        for frames, state in pipe.frames(state, blocks=options.blocks):  # noqa: B007, B020
            video.extend(frames[0])
    Image.fromarray(np.concatenate(video[::4], axis=1)).save(options.output)
    return np.stack(video)


if __name__ == "__main__":
    main()
