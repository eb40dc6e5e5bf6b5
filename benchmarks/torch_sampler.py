"""A PyTorch version of the streaming student, which ``benchmarks/compare_torch.py`` compares with ours.

It does less than ours in two ways: attention slices the cache to the slots in use (one compilation per length), and the
residual stream is in the compute type. The network is ``benchmarks/torch_network.py``.
"""

import contextlib
import os

import numpy as np
import torch
from torch_network import Student, load_ours, rotary

from causvid_jax.config import CausalConfig, Recipe, TransformerConfig
from causvid_jax.diffusion import flow


class Stream:
    """A stream of blocks: a ring cache of ``slots`` latent frames of ``tokens`` tokens, and one pass on the next block.

    Attributes:
        position: index of the next block's first latent frame.
    """

    def __init__(self, student: Student, text, causal: CausalConfig, slots: int, tokens: int, compiled: str | None):
        net, device, dtype = student.net, text.device, student.patch.weight.dtype
        self.net, self.causal, self.slots, self.tokens, self.device = net, causal, slots, tokens, device
        self.text = student.encode_text(text)
        shape = (text.shape[0], slots * tokens, net.num_heads, net.dim // net.num_heads)
        self.cache = [tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in "kv") for _ in student.blocks]
        self.run = torch.compile(student, mode=compiled, dynamic=False) if compiled else student
        self.position = 0

    def block(self, grid: tuple[int, int]):
        """Return (rotary table, slots of the tokens, number of slots in use) of the block at the position."""
        k = self.causal.frames_per_block
        frames = torch.arange(self.position, self.position + k, device=self.device)
        turn = rotary(frames, *grid, self.net.dim // self.net.num_heads, self.net.rope_theta)
        slots = (frames % self.slots)[:, None] * self.tokens + torch.arange(self.tokens, device=self.device)
        return turn, slots.flatten(), min(self.position + k, self.slots) * self.tokens

    def velocity(self, x, timestep: torch.Tensor, ready):
        """Return the velocity of ``x [B, K, h, w, C]`` at ``timestep [B, K]``; ``ready`` is of :meth:`block`."""
        turn, slots, used = ready
        return self.run(x, timestep, turn, self.text, self.cache, slots, used)


class Sampler:
    """The student of a recipe with random weights, and a stream of it at any length."""

    def __init__(self, recipe: Recipe, device: torch.device, compiled: str | None):
        net, causal = recipe.student, recipe.causal
        torch.manual_seed(0)
        dtype = getattr(torch, net.dtype)
        with torch.device(device):
            student = Student(net)
            for parameter in student.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, std=0.02)
            student = student.cast(dtype).eval()
            rows = torch.randn(1, recipe.text.length, recipe.text.dim)
        height, width = recipe.latent_size
        _, p, q = net.patch_size
        self.grid = (height // p, width // q)
        slots = causal.window or recipe.video.latent_frames
        self.stream = Stream(student, rows, causal, slots, self.grid[0] * self.grid[1], compiled)
        self.shape = (1, causal.frames_per_block, height, width, recipe.vae.z_dim)
        steps = [float(t) for t in flow.student_timesteps(recipe.diffusion)]
        self.table = [(t, t / 1000, s / 1000) for t, s in zip(steps, [*steps[1:], 0.0], strict=True)]
        self.device, self.clean = device, causal.context_noise
        self.timesteps = {t: torch.full((1, causal.frames_per_block), t, device=device) for t in (*steps, self.clean)}

    def denoise(self, ready):
        """Return x0 ``[1, K, h, w, C]`` of the block at the stream's position, after all denoising steps."""
        x = torch.randn(self.shape, device=self.device)
        for timestep, sigma, following in self.table:
            x0 = x - sigma * self.stream.velocity(x, self.timesteps[timestep], ready)
            x = x0 if not following else (1 - following) * x0 + following * torch.randn(self.shape, device=self.device)
        return x

    def write(self, ready, latents):
        """Write the block of clean ``latents`` to the cache by one pass."""
        return self.stream.velocity(latents, self.timesteps[self.clean], ready)


def check() -> None:
    """Check that velocities equal the JAX student's, block by block beyond the end of a window, in float32."""
    import jax
    import jax.numpy as jnp

    from causvid_jax.models import transformer

    jax.config.update("jax_default_matmul_precision", "highest")
    # A head size of 12 splits its rotary pairs evenly, one of 20 (4, 3, 3) does not.
    net = TransformerConfig(
        dim=40, ffn_dim=56, num_heads=2, num_layers=3, in_channels=6, out_channels=6, text_dim=14, text_length=9
    )
    causal, seed = CausalConfig(frames_per_block=2, window=6), int.from_bytes(os.urandom(4))
    rng = np.random.default_rng(seed)
    scale = {"scale": 1.0}

    def draw(path, leaf):
        return (scale.get(path[-1].key, 0.0) + 0.15 * rng.standard_normal(leaf.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, transformer.abstract(net))
    text = rng.standard_normal((1, 9, 14)).astype(np.float32)
    student = Student(net).eval()
    load_ours(student, params)
    theirs = Stream(student, torch.tensor(text), causal, causal.window, 12, None)
    ours = jax.jit(lambda p, x, t, c, cache: transformer.cached(p, x, t, c, cache, config=net, causal=causal))
    encoded = transformer.encode_text(params, jnp.asarray(text), config=net)
    cache = transformer.init_cache(net, causal, batch=1, height=6, width=8)
    worst, size = 0.0, 0.0
    for block in range(5):
        theirs.position = 2 * block
        ready = theirs.block((3, 4))
        for timestep in (987.5, 41.25, 0.0):  # the last one stays in the cache
            x = rng.standard_normal((1, 2, 6, 8, 6)).astype(np.float32)
            timesteps = np.full((1, 2), timestep, np.float32)
            expected, cache = ours(params, x, timesteps, encoded, cache)
            velocity = theirs.velocity(torch.tensor(x), torch.tensor(timesteps), ready).numpy()
            worst, size = max(worst, float(np.abs(velocity - expected).max())), float(np.std(expected))
        cache = transformer.advance(cache, 2)
    print(f"torch sampler: max |torch - jax| = {worst:.1e} over 15 passes, std {size:.2f} (seed {seed})")
    assert worst <= 5e-5 * max(1.0, size)


def kernels(name: str):
    """Return the context in which scaled dot-product attention uses the kernel ``name``; "auto" leaves the choice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kinds = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
    return contextlib.nullcontext() if name == "auto" else sdpa_kernel([getattr(SDPBackend, kinds[name])])
