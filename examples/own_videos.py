"""Train every stage on your own videos and stream from the result.

    python examples/own_videos.py --config=configs/own.py --videos=clips --captions=captions.csv --workdir=runs/own \\
        --prompt="a red ball moves left"

``captions.csv`` has the columns ``file`` and ``caption``. Every stage keeps what is finished, so the same command
continues after an interruption. The programs ``causvid prepare`` and ``causvid train`` do the same stage by stage.
"""

import argparse
import pathlib

import numpy as np

import causvid_jax as cv
from causvid_jax import media
from causvid_jax.config.recipes import load_recipe
from causvid_jax.data import prepare
from causvid_jax.training import stages


def main(arguments: list[str] | None = None) -> np.ndarray:
    """Train, write one clip of the student as a video, and return its frames, uint8 ``[T, H, W, 3]``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/own.py", help="a recipe with data.name = 'videos'")
    parser.add_argument("--videos", required=True, help="the folder of your videos")
    parser.add_argument("--captions", required=True, help="their captions: csv, tsv, json or jsonl")
    parser.add_argument("--workdir", required=True, help="where data, weights and logs go")
    parser.add_argument("--prompt", required=True)
    options = parser.parse_args(arguments)

    recipe, workdir = load_recipe(options.config), pathlib.Path(options.workdir)
    clips = prepare.Options(videos=options.videos, captions=options.captions)
    print(prepare.run("data", recipe, workdir, clips))
    stages.train("vae", recipe, workdir)
    print(prepare.run("latents", recipe, workdir, prepare.Options()))
    stages.train("teacher", recipe, workdir)
    print(prepare.run("trajectories", recipe, workdir, prepare.Options()))
    stages.train("init", recipe, workdir)
    stages.train("distill", recipe, workdir)

    pipe = cv.load(recipe, checkpoint=workdir)
    state, video = pipe.stream(options.prompt, seed=0), []
    blocks = len(recipe.causal.block_sizes(recipe.video.latent_frames))
    for frames, state in pipe.frames(state, blocks=blocks):  # noqa: B007, B020
        video.append(frames[0])
    clip = np.concatenate(video)
    media.write_video(workdir / "sample.mp4", clip, recipe.video.fps)
    print(f"Wrote {workdir / 'sample.mp4'}")
    return clip


if __name__ == "__main__":
    main()
