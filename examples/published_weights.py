"""Stream a video with published weights on one GPU, and switch the prompt in the middle.

    python examples/published_weights.py --wan=Wan2.1-T2V-1.3B --student=self_forcing_dmd.pt \\
        --prompts "a red panda in the snow" "a red panda on a beach" --output=panda.mp4

``--wan`` is the published folder: it has the VAE, the text encoder and its tokenizer. ``--student`` is a causal student
of CausVid, Self-Forcing or a relative, and ``--config`` has its settings (``causvid models`` lists them). Both are read
without conversion. At 480 x 832 and ``causal.window = 12`` the
stream takes about 14 GB of device memory at any length (docs/wan.md).
"""

import argparse
import dataclasses

import numpy as np

import causvid_jax as cv
from causvid_jax import media
from causvid_jax.config.recipes import load_recipe


def main(arguments: list[str] | None = None) -> int:
    """Write a video of ``--blocks`` blocks for each prompt; return its number of frames."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wan", required=True, help="the published folder, such as Wan2.1-T2V-1.3B")
    parser.add_argument("--student", required=True, help="the causal student, such as self_forcing_dmd.pt")
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--blocks", type=int, default=14, help="blocks for each prompt; a block is 12 frames")
    parser.add_argument("--window", type=int, default=12, help="latent frames that attention sees")
    parser.add_argument("--config", default="published:self_forcing_dmd", help="the recipe of the student")
    parser.add_argument("--output", default="published.mp4")
    options = parser.parse_args(arguments)

    recipe = load_recipe(options.config)
    recipe = dataclasses.replace(
        recipe,
        causal=dataclasses.replace(recipe.causal, window=options.window),
        student=dataclasses.replace(recipe.student, attention="auto"),
    )
    pipe = cv.load(recipe, checkpoint=options.wan, student=options.student)
    count = 0
    with media.VideoWriter(options.output, recipe.video.fps) as out:
        for i, prompt in enumerate(options.prompts):
            state = pipe.switch(state, prompt) if i else pipe.stream(prompt, seed=0)
            for frames, state in pipe.frames(state, blocks=options.blocks):  # noqa: B007, B020
                out.append(np.asarray(frames[0]))
                count += frames.shape[1]
                print(f"{count} frames", flush=True)
    print(f"Wrote {options.output}")
    return count


if __name__ == "__main__":
    main()
