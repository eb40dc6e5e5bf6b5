"""Compare sessions one by one with the same sessions as one batch.

``python benchmarks/batched_sessions.py [STREAMS [ROUNDS]]`` generates blocks of the digits recipe. It alternates
between STREAMS single sessions and one program of all of them under ``jax.vmap``, each session at its own position. It
prints medians of the wall time and of the processor time of a round in milliseconds, their ratios, and whether both
give the same bits, which a replay needs.
"""

import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import causvid_jax as cv
from causvid_jax.sampling import stream


def main(streams: int = 4, rounds: int = 15) -> None:
    """Measure ``rounds`` blocks of ``streams`` sessions and print the medians."""
    pipe = cv.load("digits")
    one = functools.partial(stream.next_frames, config=pipe.config)
    batched = jax.jit(jax.vmap(one, in_axes=(None, 0)), donate_argnums=(1,))
    states = [pipe.stream(f"a red {i} moving left", seed=i) for i in range(streams)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    rows: dict[str, list[tuple[float, float]]] = {"turns": [], "batch": []}
    shown: dict[str, np.ndarray] = {}
    same = True
    for _ in range(rounds + 2):
        for name in rows:
            wall, processor = time.perf_counter(), time.process_time()
            if name == "turns":
                parts = []
                for i in range(streams):
                    _, frames, states[i] = one(pipe.params, states[i])
                    parts.append(np.asarray(frames))
                shown[name] = np.stack(parts)
            else:
                _, frames, stacked = batched(pipe.params, stacked)
                shown[name] = np.asarray(frames)
            rows[name].append((time.perf_counter() - wall, time.process_time() - processor))
        same &= bool(np.array_equal(shown["turns"], shown["batch"]))
    medians = {
        name: [statistics.median(column) for column in zip(*each[2:], strict=True)] for name, each in rows.items()
    }
    for name, (wall, processor) in medians.items():
        print(
            f"{name}: {1000 * wall:.0f} ms for a block of {streams} sessions, processor time {1000 * processor:.0f} ms"
        )
    ratio = [a / b for a, b in zip(medians["batch"], medians["turns"], strict=True)]
    print(f"batch / turns: {ratio[0]:.2f}, of processor time {ratio[1]:.2f}; same bits: {same}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
