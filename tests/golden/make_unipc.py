"""Writes unipc.npz: diffusers' UniPCMultistepScheduler on an analytic velocity. Needs the ``parity`` extra.

``python tests/golden/make_unipc.py`` writes the file; ``--check`` starts from new noise and compares our solver with
diffusers there and then. The velocity is ``tanh(x) cos(t / 300) + 0.3 x - 0.1``, with the integer timesteps that the
scheduler hands out; the file holds its sigmas, so that only the solver is compared.
"""

import pathlib

import numpy as np
import script

GOLDEN = pathlib.Path(__file__).with_name("unipc.npz")
STEPS = 8
SHIFTS = (3.0, 8.0)


def reference(seed: int) -> dict[str, np.ndarray]:
    """Noise, and sigmas and end state of diffusers' solver for every shift."""
    import torch
    from diffusers import UniPCMultistepScheduler

    noise = np.random.default_rng(seed).standard_normal((1, 2, 2, 2, 4)).astype(np.float32)
    arrays = {"noise": noise}
    for shift in SHIFTS:
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
        x = torch.from_numpy(noise)
        for t in scheduler.timesteps:
            velocity = torch.tanh(x) * torch.cos(t.float() / 300) + 0.3 * x - 0.1
            x = scheduler.step(velocity, t, x, return_dict=False)[0]
        arrays[f"sigmas_{shift:g}"] = scheduler.sigmas.numpy()
        arrays[f"x0_{shift:g}"] = x.numpy()
    return arrays


def check(seed: int) -> None:
    """Compare live."""
    import jax.numpy as jnp

    from causvid_jax.diffusion import flow, solvers

    def velocity(x, timestep):
        return jnp.tanh(x) * jnp.cos(flow.expand(timestep, x) / 300) + 0.3 * x - 0.1

    arrays = reference(seed)
    for shift in SHIFTS:
        got = solvers.unipc(velocity, arrays["noise"], arrays[f"sigmas_{shift:g}"], integer_timesteps=True)
        error = np.abs(got - arrays[f"x0_{shift:g}"]).max()
        print(f"unipc, shift {shift:g}: max |jax - diffusers| = {error:.1e} after {STEPS} steps (seed {seed})")
        assert error <= 5e-4


if __name__ == "__main__":
    script.main(__doc__, GOLDEN, lambda: reference(0), check)
