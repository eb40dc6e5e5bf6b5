"""Writes unipc.npz: diffusers' UniPCMultistepScheduler on an analytic velocity. Needs the ``parity`` extra.

Run as ``python tests/golden/make_unipc.py``. The velocity is ``tanh(x) cos(t / 300) + 0.3 x - 0.1``, with the integer
timesteps that the scheduler hands out; the file holds its sigmas, so that only the solver is compared.
"""

import pathlib

import numpy as np
import torch
from diffusers import UniPCMultistepScheduler

STEPS = 8


def main():
    noise = np.random.default_rng(0).standard_normal((1, 2, 2, 2, 4)).astype(np.float32)
    arrays = {"noise": noise}
    for shift in (3.0, 8.0):
        scheduler = UniPCMultistepScheduler(
            solver_order=2,
            solver_type="bh2",
            predict_x0=True,
            lower_order_final=True,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )
        scheduler.set_timesteps(STEPS)
        x, states = torch.from_numpy(noise), []
        for t in scheduler.timesteps:
            velocity = torch.tanh(x) * torch.cos(t.float() / 300) + 0.3 * x - 0.1
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
            states.append(x.numpy())
        arrays[f"sigmas_{shift:g}"] = scheduler.sigmas.numpy()
        arrays[f"x0_{shift:g}"] = states[-1]
    np.savez(pathlib.Path(__file__).with_name("unipc.npz"), **arrays)


if __name__ == "__main__":
    main()
