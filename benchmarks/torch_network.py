"""The causal Wan transformer with its streaming cache in PyTorch, to compare its speed with the JAX network.

It is the same function of its inputs as ``causvid_jax.models.transformer.cached`` for a window without a sink. It is
written to be fast: keys are rotated when they are written, attention is one ``scaled_dot_product_attention`` over the
slots in use, and the residual stream is in the compute type (ours is in float32). So it does less than the JAX network.
``python benchmarks/compare_torch.py --check`` compares the two.

Letters: B streams, K latent frames of a block, n tokens of one of them, T = K n, N heads of width D, M = N D.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def rotary(positions: torch.Tensor, rows: int, columns: int, head_dim: int, theta: float) -> torch.Tensor:
    """Return cosine and sine of interleaved rotary pairs, float32 ``[2, frames * rows * columns, 1, head_dim / 2]``.

    ``positions`` are the latent frames' indices in the stream. Of the pairs, ``head_dim // 6`` each turn with the row
    and the column, the others with the frame, by ``position * theta^(-i / pairs)``.
    """
    side = head_dim // 6
    pairs = (head_dim // 2 - 2 * side, side, side)
    device = positions.device
    axes = (
        positions.double(),
        torch.arange(rows, device=device).double(),
        torch.arange(columns, device=device).double(),
    )
    parts = []
    for axis, (place, count) in enumerate(zip(axes, pairs, strict=True)):
        frequency = theta ** (-torch.arange(count, device=device).double() / max(count, 1))
        angle = place[:, None] * frequency
        shape = [1, 1, 1, count]
        shape[axis] = len(place)
        parts.append(angle.reshape(shape).expand(len(positions), rows, columns, count))
    angle = torch.cat(parts, dim=-1).reshape(-1, 1, head_dim // 2)
    return torch.stack([angle.cos(), angle.sin()]).float()


def rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Return ``x [B, T, N, D]`` rotated by the table of :func:`rotary`, computed in float32, in the type of x."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return attention ``[B, T, N D]`` of ``[B, T, N, D]`` by the kernel that PyTorch is set to use."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Norm(nn.Module):
    """RMS norm over the full width M, computed in float32: ``x / sqrt(mean x^2 + eps) * weight``."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x [..., M]`` normalized, in its own type."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    """Projections, and norms of queries and keys, of one attention."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = Norm(dim, eps), Norm(dim, eps)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Split ``x [..., M]`` into heads ``[..., N, D]``."""
        return x.unflatten(-1, (self.heads, -1))


class Block(nn.Module):
    """One layer; the arithmetic is that of ``causvid_jax.models.transformer.block``."""

    def __init__(self, net: Any):
        super().__init__()
        self.eps = net.eps
        self.modulation = nn.Parameter(torch.zeros(6, net.dim))
        self.self_attn = Attention(net.dim, net.num_heads, net.eps)
        self.cross_attn = Attention(net.dim, net.num_heads, net.eps)
        self.norm3 = nn.LayerNorm(net.dim, net.eps)
        self.fc1, self.fc2 = nn.Linear(net.dim, net.ffn_dim), nn.Linear(net.ffn_dim, net.dim)

    def modulated(self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Return ``LN(x) (1 + scale) + shift`` of ``x [B, K, n, M]``; shift and scale are ``[B, K, M]``."""
        y = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (y * (1 + scale[:, :, None]) + shift[:, :, None]).to(x.dtype)

    def forward(self, x, time, turn, text, cache, slots, used: int):
        """Return the tokens ``x [B, K, n, M]`` after the layer, and write their keys and values to the cache in place.

        ``time [B, K, 6, M]`` is the modulation; the other arguments are those of :meth:`Student.forward`, of one layer.
        """
        shift_sa, scale_sa, gate_sa, shift_ffn, scale_ffn, gate_ffn = (self.modulation.float() + time).unbind(2)
        shape, sa, ca = x.shape, self.self_attn, self.cross_attn
        y = self.modulated(x, shift_sa, scale_sa).flatten(1, 2)  # [B, T, M]
        q = rotate(sa.split(sa.norm_q(sa.q(y))), turn)
        keys, values = cache
        keys.index_copy_(1, slots, rotate(sa.split(sa.norm_k(sa.k(y))), turn))
        values.index_copy_(1, slots, sa.split(sa.v(y)))
        out = sa.o(attend(q, keys[:, :used], values[:, :used])).reshape(shape)
        x = x + (out * gate_sa[:, :, None]).to(x.dtype)

        y = F.layer_norm(x.float(), x.shape[-1:], self.norm3.weight.float(), self.norm3.bias.float(), self.eps)
        q = ca.split(ca.norm_q(ca.q(y.to(x.dtype).flatten(1, 2))))
        x = x + ca.o(attend(q, *text)).reshape(shape)

        y = self.modulated(x, shift_ffn, scale_ffn)
        out = self.fc2(F.gelu(self.fc1(y), approximate="tanh"))
        return x + (out * gate_ffn[:, :, None]).to(x.dtype)


class Student(nn.Module):
    """The network of a recipe's student; ``net`` is its TransformerConfig."""

    def __init__(self, net: Any):
        super().__init__()
        self.net = net
        patch = net.patch_size[1] * net.patch_size[2]
        self.patch = nn.Linear(patch * net.in_channels, net.dim)
        self.text1, self.text2 = nn.Linear(net.text_dim, net.dim), nn.Linear(net.dim, net.dim)
        self.time1, self.time2 = nn.Linear(net.freq_dim, net.dim), nn.Linear(net.dim, net.dim)
        self.time_projection = nn.Linear(net.dim, 6 * net.dim)
        self.head_modulation = nn.Parameter(torch.zeros(2, net.dim))
        self.head = nn.Linear(net.dim, patch * net.out_channels)
        self.blocks = nn.ModuleList(Block(net) for _ in range(net.num_layers))

    def cast(self, dtype: torch.dtype) -> "Student":
        """Convert all parameters except the time embedding's (float32 in ours too) to ``dtype``; return self."""
        self.to(dtype)
        for layer in (self.time1, self.time2, self.time_projection):
            layer.float()
        return self

    def encode_text(self, rows: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the cross-attention keys and values ``[B, S, N, D]`` of every layer for embeddings ``[B, S, E]``."""
        x = self.text2(F.gelu(self.text1(rows.to(self.patch.weight.dtype)), approximate="tanh"))
        layers = [block.cross_attn for block in self.blocks]
        return [(ca.split(ca.norm_k(ca.k(x))), ca.split(ca.v(x))) for ca in layers]

    def forward(self, x, timestep, turn, text, cache, slots, used: int):
        """Return the velocity ``[B, K, h, w, C]`` of one block, and write its keys and values to the cache in place.

        Args:
            x: ``[B, K, h, w, C]``.
            timestep: ``[B, K]`` in [0, 1000].
            turn: of :func:`rotary`.
            text: of :meth:`encode_text`.
            cache: keys and values ``[B, slots, N, D]`` of every layer; a slot holds one token.
            slots: int ``[T]``, where the block's tokens are written.
            used: number of slots, from the first on, that the block attends to.
        """
        net, (_, p, q) = self.net, self.net.patch_size
        batch, frames, height, width, _ = x.shape
        rows, columns = height // p, width // q
        tokens = x.reshape(batch, frames, rows, p, columns, q, -1).permute(0, 1, 2, 4, 3, 5, 6)
        tokens = self.patch(tokens.reshape(batch, frames, rows * columns, -1).to(self.patch.weight.dtype))
        half = net.freq_dim // 2
        frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = timestep.float()[..., None] * frequency
        e = self.time2(F.silu(self.time1(torch.cat([angle.cos(), angle.sin()], dim=-1))))
        time = self.time_projection(F.silu(e)).unflatten(-1, (6, -1))
        for block, keys_values, part in zip(self.blocks, text, cache, strict=True):
            tokens = block(tokens, time, turn, keys_values, part, slots, used)
        shift, scale = (self.head_modulation.float() + e[:, :, None]).unbind(2)
        y = F.layer_norm(tokens.float(), tokens.shape[-1:], eps=net.eps)
        y = (y * (1 + scale[:, :, None]) + shift[:, :, None]).to(tokens.dtype)
        out = self.head(y).float().reshape(batch, frames, rows, columns, p, q, -1)
        return out.permute(0, 1, 2, 4, 3, 5, 6).reshape(batch, frames, height, width, -1)


def load_ours(student: Student, params: Mapping[str, Any]) -> None:
    """Copy the JAX student's parameters (numpy) into ``student``."""

    def linear(layer: nn.Linear, p: Mapping[str, Any], *index: int) -> None:
        layer.weight.data = torch.tensor(p["kernel"][index].T.copy())
        layer.bias.data = torch.tensor(p["bias"][index].copy())

    linear(student.patch, params["patch_embedding"])
    linear(student.time_projection, params["time_projection"])
    linear(student.head, params["head"]["proj"])
    student.head_modulation.data = torch.tensor(params["head"]["modulation"])
    for ours, theirs in (("text_embedding", "text"), ("time_embedding", "time")):
        for i in ("1", "2"):
            linear(getattr(student, theirs + i), params[ours][f"fc{i}"])
    layers = params["blocks"]
    for i, block in enumerate(student.blocks):
        block.modulation.data = torch.tensor(layers["modulation"][i])
        block.norm3.weight.data = torch.tensor(layers["norm3"]["scale"][i])
        block.norm3.bias.data = torch.tensor(layers["norm3"]["bias"][i])
        linear(block.fc1, layers["ffn"]["fc1"], i)
        linear(block.fc2, layers["ffn"]["fc2"], i)
        for name in ("self_attn", "cross_attn"):
            part, ours = getattr(block, name), layers[name]
            for projection in "qkvo":
                linear(getattr(part, projection), ours[projection], i)
            part.norm_q.weight.data = torch.tensor(ours["norm_q"]["scale"][i])
            part.norm_k.weight.data = torch.tensor(ours["norm_k"]["scale"][i])
