"""A stream by its definition in numpy float64, an oracle of many settings: no ring of slots, no fixed shapes."""

import jax
import numpy as np
import scipy.special

from causvid_jax.diffusion import flow


def linear(p, x, eight_bits=False):
    """Return ``x W + b`` and the products of adapters; ``eight_bits`` rounds the kernel by column and x by token."""
    kernel = np.asarray(p["kernel"], np.float64)
    if eight_bits:
        (x8, x_scale), (kernel, scale) = rounded(x, -1), rounded(kernel, -2)
        product = (x8 @ kernel) * x_scale * scale
    else:
        product = x @ kernel
    for down, up, strength in p.get("loras", ()):
        product = product + strength * (x @ down) @ up
    return product + np.asarray(p["bias"], np.float64)


def rounded(x, axis):
    """Return whole numbers up to 127 and their scale over ``axis``."""
    scale = np.abs(x).max(axis, keepdims=True) / 127
    return np.round(x / np.where(scale > 0, scale, 1)), scale


def layer_norm(x, eps, p=None):
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return y if p is None else y * p["scale"] + p["bias"]


def rms_norm(x, p, eps):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * p["scale"]


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x):
    return x * scipy.special.ndtr(x)


def mlp(p, x, activation, eight_bits=False):
    return linear(p["fc2"], activation(linear(p["fc1"], x, eight_bits)), eight_bits)


def attention(q, k, v):
    """Return ``softmax(q k^T / sqrt(D)) v`` of ``[B, T, N, D]`` and ``[B, S, N, D]``."""
    weights = scipy.special.softmax(np.einsum("btnd,bsnd->bnts", q, k) / np.sqrt(q.shape[-1]), axis=-1)
    return np.einsum("bnts,bsnd->btnd", weights, v)


class PlainStream:
    """The stream of ``recipe`` with stacked ``params`` of the student; ``loras`` are (tree, strength) pairs."""

    def __init__(self, recipe, params, text, seed=0, picture=None):
        self.recipe, self.net, self.causal = recipe, recipe.student, recipe.causal
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        self.text, self.picture = np.asarray(text, np.float64), picture
        self.seeds = [seed + b for b in range(len(text))]
        self.position, self.block, self.kept, self.made = 0, 0, {}, []
        self.loras = []

    # ---- the network ----

    def layer(self, i):
        """Return the parameters of layer i with the adapters of its linear layers."""

        def pick(tree, loras):
            if not isinstance(tree, dict):
                return tree[i]
            result = {name: pick(x, [(t.get(name, {}), s) for t, s in loras]) for name, x in tree.items()}
            return result | {"loras": [(t["lora"]["down"][i], t["lora"]["up"][i], s) for t, s in loras if "lora" in t]}

        return pick(self.params["blocks"], [(tree["blocks"], strength) for tree, strength in self.loras])

    def rotate(self, x, frames):
        """Rotate ``[B, F, n, N, D]`` at the times ``frames``: pair j of an axis by position theta^(-j / pairs)."""
        size, (height, width) = self.net.head_dim // 2, self.grid
        side = size // 3
        parts = []
        for count, where in (
            (size - 2 * side, np.repeat(np.asarray(frames, float)[:, None], height * width, 1)),
            (side, np.tile(np.repeat(np.arange(height), width), (len(frames), 1))),
            (side, np.tile(np.arange(width), (len(frames), height))),
        ):
            parts.append(where[..., None] * self.net.rope_theta ** (-np.arange(count) / max(count, 1)))
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * np.concatenate(parts, -1))[None, :, :, None]
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    def velocity(self, x, times):
        """Return the velocity of the block ``x [B, K, h, w, C]`` at ``times [K]``, and what a cache keeps of it."""
        net, causal, p = self.net, self.causal, self.params
        eight, heads = net.linear == "int8", (net.num_heads, net.head_dim)
        batch, count = x.shape[:2]
        own = list(range(self.position, self.position + count))
        end = own[-1] + 1
        first = max(end - causal.window, causal.sink)
        moves = causal.positions == "relative" and causal.window > 0 and causal.sink > 0

        def place(frame):
            return frame + first - causal.sink if moves and frame < causal.sink else frame

        seen = [f for f in sorted(self.kept) if f < own[0]]
        if causal.window:
            seen = [f for f in seen if f < causal.sink or f >= end - causal.window]
        if self.picture is not None and net.image_channels:
            latents = np.asarray(self.picture.latents, np.float64)
            x = np.concatenate([x, latents[:, [min(f, latents.shape[1] - 1) for f in own]]], -1)
        self.grid = x.shape[2] // net.patch_size[1], x.shape[3] // net.patch_size[2]
        tokens = x.reshape(batch, count, self.grid[0], 2, self.grid[1], 2, x.shape[-1]).transpose(0, 1, 2, 4, 3, 5, 6)
        tokens = linear(p["patch_embedding"], tokens.reshape(batch, count, -1, 4 * x.shape[-1]))
        angle = np.asarray(times, float)[:, None] * 10000.0 ** (-np.arange(net.freq_dim // 2) / (net.freq_dim // 2))
        e = mlp(p["time_embedding"], np.concatenate([np.cos(angle), np.sin(angle)], -1), silu)  # [K, M]
        time = linear(p["time_projection"], silu(e)).reshape(count, 6, -1)
        context = [("", mlp(p["text_embedding"], self.text, gelu))]
        if net.image_dim:
            q = p["image_embedding"]
            hidden = mlp(q, layer_norm(np.asarray(self.picture.embeds, np.float64), 1e-5, q["norm1"]), gelu_exact)
            context.append(("_img", layer_norm(hidden, 1e-5, q["norm2"])))

        def split(y):
            return y.reshape(*y.shape[:-1], *heads)

        def flat(y):
            return y.reshape(batch, -1, *heads)

        written = []
        for i in range(net.num_layers):
            layer = self.layer(i)
            m = (layer["modulation"] + time)[:, :, None]  # [K, 6, 1, M]
            sa, y = layer["self_attn"], layer_norm(tokens, net.eps) * (1 + m[:, 1]) + m[:, 0]
            q, k = (split(rms_norm(linear(sa[n], y, eight), sa[f"norm_{n}"], net.eps)) for n in "qk")
            v = split(linear(sa["v"], y, eight))
            written.append((k, v))
            past = [self.kept[f][i] for f in seen]  # keys are unrotated, or at their true position (the int8 cache)
            keys = [self.rotate(k, [place(f) for f in own])]
            for f, (key, _) in zip(seen, past, strict=True):
                keys.insert(-1, self.rotate(key[:, None], [place(f)]) if moves else key[:, None])
            values = [value[:, None] for _, value in past] + [v]
            out = attention(
                flat(self.rotate(q, own)), flat(np.concatenate(keys, 1)), flat(np.concatenate(values, 1))
            ).reshape(*y.shape)
            tokens = tokens + linear(sa["o"], out, eight) * m[:, 2]
            ca, y = layer["cross_attn"], layer_norm(tokens, net.eps, layer["norm3"])
            q = flat(rms_norm(linear(ca["q"], y, eight), ca["norm_q"], net.eps))
            out = 0
            for name, source in context:
                k = rms_norm(linear(ca[f"k{name}"], source, eight), ca[f"norm_k{name}"], net.eps)
                out = out + attention(q, split(k), split(linear(ca[f"v{name}"], source, eight)))
            tokens = tokens + linear(ca["o"], out.reshape(*y.shape), eight)
            y = layer_norm(tokens, net.eps) * (1 + m[:, 4]) + m[:, 3]
            tokens = tokens + mlp(layer["ffn"], y, gelu, eight) * m[:, 5]
        m = (p["head"]["modulation"] + e[:, None])[:, :, None]
        y = linear(p["head"]["proj"], layer_norm(tokens, net.eps) * (1 + m[:, 1]) + m[:, 0])
        y = y.reshape(batch, count, *self.grid, 2, 2, -1).transpose(0, 1, 2, 4, 3, 5, 6)
        stored = {f: [self.stored(k[:, j], v[:, j], f, moves) for k, v in written] for j, f in enumerate(own)}
        return y.reshape(batch, count, 2 * self.grid[0], 2 * self.grid[1], -1), stored

    def stored(self, key, value, frame, moves):
        """Return keys and values of a frame as the cache gives them back: unrotated only if their place moves."""
        key = key if moves else self.rotate(key[:, None], [frame])[:, 0]
        if self.net.kv_cache == "int8":
            key, value = (q * scale for q, scale in (rounded(key, -3), rounded(value, -3)))
        return key, value

    # ---- the stream ----

    def noise(self, block, step, size):
        shape = (size, *self.recipe.latent_size, self.recipe.vae.z_dim)
        keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(s), block), step) for s in self.seeds]
        return np.stack([np.asarray(jax.random.normal(key, shape), np.float64) for key in keys])

    def next_size(self):
        return 1 if self.causal.independent_first_frame and self.position == 0 else self.causal.frames_per_block

    def keep(self, stored):
        """Keep the keys and values of a block, and of earlier frames those of the sink and the window."""
        self.kept |= stored
        end = max(stored) + 1
        if self.causal.window:
            self.kept = {f: x for f, x in self.kept.items() if f < self.causal.sink or f >= end - self.causal.window}

    def write(self, x0):
        self.keep(self.velocity(x0, [self.causal.context_noise] * x0.shape[1])[1])

    def finish(self, x0):
        self.made.append((self.position, x0))
        self.position += x0.shape[1]
        self.block += 1

    def next(self):
        """Return the latents of the next block."""
        times, size = flow.student_timesteps(self.recipe.diffusion), self.next_size()
        x = self.noise(self.block, 0, size)
        for j, t in enumerate(times):
            velocity, stored = self.velocity(x, [t] * size)
            x0 = x - t / 1000 * velocity
            after = times[j + 1] / 1000 if j + 1 < len(times) else 0
            x = (1 - after) * x0 + after * self.noise(self.block, j + 1, size)
        if self.causal.context_pass:
            self.write(x0)
        else:
            self.keep(stored)
        self.finish(x0)
        return x0

    def append(self, x0):
        self.write(x0)
        self.finish(x0)

    def switch(self, text, how):
        self.text = np.asarray(text, np.float64)
        if how == "reset":
            self.kept, self.made, self.position = {}, [], 0
        if how == "recompute":
            size, alone = self.causal.frames_per_block, int(self.causal.independent_first_frame)
            count = len(self.made)
            if self.causal.window:
                count = -(-self.causal.sink // size) + (self.causal.window - 1) // size
            last = self.made[alone:][-count:] if count else []
            begin = self.position - size * len(last) if alone else 0
            self.kept = {f: x for f, x in self.kept.items() if f < begin}
            self.position, self.made = begin, self.made[: len(self.made) - len(last)] if alone else []
            for _, x0 in last:
                self.write(x0)
                self.made.append((self.position, x0))
                self.position += size

    def rolling(self, blocks):
        """Return the latents of ``blocks`` blocks, of which ``recipe.rolling_blocks`` are denoised jointly."""
        times, size, window, entered = flow.student_timesteps(self.recipe.diffusion), self.next_size(), [], 0
        levels, begin = [t / 1000 for t in times] + [0], self.block
        while self.block < begin + blocks:
            if entered < blocks:
                window.append([begin + entered, 0, self.noise(begin + entered, 0, size)])
                entered += 1
            for _ in range(len(times) // self.recipe.rolling_blocks):
                x = np.concatenate([x for _, _, x in window], 1)
                velocity = self.velocity(x, np.repeat([times[step] for _, step, _ in window], size))[0]
                for place, entry in enumerate(window):
                    number, step, x = entry
                    x0 = x - levels[step] * velocity[:, place * size : (place + 1) * size]
                    x = (1 - levels[step + 1]) * x0 + levels[step + 1] * self.noise(number, step + 1, size)
                    entry[1:] = step + 1, x
            if window[0][1] == len(times):
                x0 = window.pop(0)[2]
                self.write(x0)
                self.finish(x0)
        return np.concatenate([x0 for _, x0 in self.made[-blocks:]], 1)
