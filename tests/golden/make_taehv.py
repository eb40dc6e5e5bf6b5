"""Writes taehv.npz: a frame-by-frame PyTorch TAEHV with random weights. Needs the ``parity`` extra.

``python tests/golden/make_taehv.py`` writes the file; ``--check`` draws new weights and inputs and compares the JAX
codec with PyTorch there and then. The file holds inputs and outputs; :func:`random_weights` draws the weights again.

No installable package has TAEHV, so the reference is written here, from the published description and under the
published parameter names, as a list of frames that every layer maps to a list of frames. It speaks pixels in [0, 1] and
does not clamp them.
"""

import pathlib

import numpy as np
import script

GOLDEN = pathlib.Path(__file__).with_name("taehv.npz")
SEED = 11
# Every width different, so that none can stand in for another.
SIZES = {"z_dim": 4, "encoder_dim": 10, "decoder_dims": (14, 12, 8, 6)}


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Every parameter random, by name: kernels keep the variance, biases lie around 0."""

    def spread(_, draw):
        return draw / np.sqrt(np.prod(draw.shape[1:])) if draw.ndim == 4 else 0.2 * draw

    return script.draw(shapes, seed, spread)


def networks():
    """(encoder and decoder as one module, the function that runs either on a list of frames [B, C, H, W])."""
    import torch
    from torch import nn

    class Remember(nn.Module):
        def __init__(self, width):
            super().__init__()
            inner = [nn.Conv2d(n * width, width, 3, padding=1) for n in (2, 1, 1)]
            self.conv = nn.Sequential(inner[0], nn.ReLU(), inner[1], nn.ReLU(), inner[2])

        def frames(self, frames):
            out, before = [], torch.zeros_like(frames[0])
            for frame in frames:
                out.append(torch.relu(frame + self.conv(torch.cat((frame, before), dim=1))))
                before = frame
            return out

    class Merge(nn.Module):
        def __init__(self, width, count):
            super().__init__()
            self.count, self.conv = count, nn.Conv2d(count * width, width, 1, bias=False)

        def frames(self, frames):
            groups = [frames[i : i + self.count] for i in range(0, len(frames), self.count)]
            return [self.conv(torch.cat(group, dim=1)) for group in groups]

    class Split(nn.Module):
        def __init__(self, width, count):
            super().__init__()
            self.count, self.conv = count, nn.Conv2d(width, count * width, 1, bias=False)

        def frames(self, frames):
            return [part for frame in frames for part in self.conv(frame).chunk(self.count, dim=1)]

    class SoftClamp(nn.Module):
        def forward(self, x):
            return 3 * torch.tanh(x / 3)

    width, dims = SIZES["encoder_dim"], SIZES["decoder_dims"]
    encoder = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for count in (2, 2, 1):
        encoder += [Merge(width, count), nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)]
        encoder += [Remember(width) for _ in range(3)]
    encoder += [nn.Conv2d(width, SIZES["z_dim"], 3, padding=1)]
    decoder = [SoftClamp(), nn.Conv2d(SIZES["z_dim"], dims[0], 3, padding=1), nn.ReLU()]
    for here, after, count in zip(dims, dims[1:], (1, 2, 2), strict=False):
        decoder += [Remember(here) for _ in range(3)] + [nn.Upsample(scale_factor=2), Split(here, count)]
        decoder += [nn.Conv2d(here, after, 3, padding=1, bias=False)]
    decoder += [nn.ReLU(), nn.Conv2d(dims[-1], 3, 3, padding=1)]

    def run(net, frames):
        for layer in net:
            frames = layer.frames(frames) if hasattr(layer, "frames") else [layer(frame) for frame in frames]
        return frames

    return nn.ModuleDict({"encoder": nn.Sequential(*encoder), "decoder": nn.Sequential(*decoder)}).eval(), run


def reference(seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(state dict, inputs and outputs, channels last): 13 frames to 4 latents, other 4 latents to 13 frames."""
    import torch

    model, run = networks()
    state = random_weights(script.shapes_of(model), seed)
    script.load(model, state)
    rng = np.random.default_rng(seed)
    video = rng.uniform(0, 1, (1, 13, 16, 8, 3)).astype(np.float32)
    # Wide enough for the soft clamp to matter.
    latents = (2 * rng.standard_normal((1, 4, 2, 1, SIZES["z_dim"]))).astype(np.float32)

    def apply(net, x):
        frames = [
            torch.from_numpy(np.ascontiguousarray(frame)) for frame in np.moveaxis(x, 1, 0).transpose(0, 1, 4, 2, 3)
        ]
        with torch.no_grad():
            out = torch.stack(run(net, frames), dim=1)
        return out.numpy().transpose(0, 1, 3, 4, 2)

    filled = np.concatenate([video, np.repeat(video[:, -1:], 3, axis=1)], axis=1)
    encoded, decoded = apply(model["encoder"], filled), apply(model["decoder"], latents)
    return state, {"video": video, "encoded": encoded, "latents": latents, "decoded": decoded[:, 3:]}


def errors_of(state: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest absolute difference of the JAX codec from the recorded outputs: encoder, decoder, decoder in chunks."""
    import functools

    import jax

    from causvid_jax.checkpoints import load
    from causvid_jax.config import TAEHVConfig
    from causvid_jax.models import taehv

    config = TAEHVConfig(**SIZES)
    params = load(state, config=config)[0]
    bind = functools.partial(functools.partial, config=config)
    encode, decode, chunk = (jax.jit(bind(f)) for f in (taehv.encode, taehv.decode, taehv.decode_chunk))
    raw = jax.jit(functools.partial(taehv.decode, config=config, clamp=False))
    whole, clamped = raw(params, arrays["latents"]), decode(params, arrays["latents"])
    height, width = arrays["latents"].shape[2:4]
    cache, parts = taehv.init_decode_cache(config, batch=1, height=height, width=width), []
    for i in range(0, 4, 2):
        frames, cache = chunk(params, arrays["latents"][:, i : i + 2], cache)
        parts.append(frames)
    got = {
        "encoded": (encode(params, 2 * arrays["video"] - 1), arrays["encoded"]),
        "decoded, not clamped": (whole, 2 * arrays["decoded"] - 1),
        "decoded": (clamped, 2 * np.clip(arrays["decoded"], 0, 1) - 1),
        "decoded in chunks": (np.concatenate(parts, axis=1)[:, 3:], 2 * np.clip(arrays["decoded"], 0, 1) - 1),
    }
    return {name: float(np.abs(ours - theirs).max()) for name, (ours, theirs) in got.items()}


def check(seed: int) -> None:
    """Compare live."""
    state, arrays = reference(seed)
    spread = {name: arrays[name].std() for name in ("encoded", "decoded")}
    for name, error in errors_of(state, arrays).items():
        print(
            f"taehv {name}: max |jax - torch| = {error:.1e}, std {spread[name.split()[0].strip(',')]:.2f} (seed {seed})"
        )
        assert error <= 1e-4, name


if __name__ == "__main__":
    script.main(__doc__, GOLDEN, lambda: reference(SEED)[1], check)
