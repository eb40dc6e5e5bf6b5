"""Count floating-point operations: of the transformer by formula, of any traced program by its matmuls.

A multiply and an add are two operations. Nothing is measured here. A test compares the formula with the trace.

One pass of the DiT over F frames of n tokens (T = F n, width M, MLP width P, S text tokens, L layers)::

    matmuls    L T (2 * 6 M^2 + 2 * 2 M P)          self-attention q, k, v, o; cross-attention q, o; MLP
    text       L S 2 * 2 M^2 + S (2 E M + 2 M^2)    cross-attention k, v; text embedding
    attention  L (4 T S M + sum over runs of 4 T_q T_k M)
    ends       T 2 M (patch C_in + patch C_out) + F (2 * 256 M + 2 M^2 + 2 * 6 M^2)

A trace is counted equation by equation, at any size and without running anything::

    matmul       2 (elements of the output) (elements summed over)
    convolution  2 (elements of the output) (kernel height, width and time) (input channels)

Norms, softmax and activations are left out, as is usual for model FLOPs. A training step costs three forward passes,
because the backward pass costs two. Recomputed activations are not model FLOPs; they are counted separately.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from causvid_jax.config import Recipe, TransformerConfig
from causvid_jax.models import attention


def tokens_per_frame(recipe: Recipe, net: TransformerConfig) -> int:
    """Return the number n of tokens of one latent frame, ``(h / patch height) (w / patch width)``."""
    height, width = recipe.latent_size
    return (height // net.patch_size[1]) * (width // net.patch_size[2])


def attention_pairs(plan: attention.Plan) -> int:
    """Count the pairs (query latent frame, key latent frame) that attention computes by a plan."""
    return sum((b - a) * sum(d - c for c, d in keys) for (a, b), keys in plan)


def forward(net: TransformerConfig, frames: int, tokens: int, pairs: int, *, text: bool = True) -> float:
    """Return the FLOPs of one pass for one example, by the formula of this module.

    Args:
        net: the network.
        frames: number F of latent frames.
        tokens: number n of tokens of one latent frame.
        pairs: (query frame, key frame) pairs of self-attention, :func:`attention_pairs`; F^2 for full attention.
        text: whether the prompt's keys and values are computed in this pass (a stream keeps them).
    """
    m, s, total = net.dim, net.text_length, frames * tokens
    patch = net.patch_size[0] * net.patch_size[1] * net.patch_size[2]
    layer = 4 * total * s * m + 4 * pairs * tokens**2 * m
    ends = total * 2 * m * patch * (net.in_channels + net.out_channels)
    ends += frames * (2 * net.freq_dim * m + 2 * m * m + 12 * m * m)
    if text:
        layer += 4 * s * m * m
        ends += s * (2 * net.text_dim * m + 2 * m * m)
    return float(net.num_layers * layer + ends) + linear_layers(net, total)


def linear_layers(net: TransformerConfig, tokens: int) -> float:
    """Return the FLOPs of the products of ``tokens`` tokens with the layers' weights, ``L T (12 M^2 + 4 M P)``."""
    m, p = net.dim, net.ffn_dim
    return float(net.num_layers * tokens * (12 * m * m + 4 * m * p))


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step or one streamed block: ``model`` FLOPs, and ``recomputed`` ones in addition."""

    model: float
    recomputed: float = 0.0


def stream_block(recipe: Recipe) -> float:
    """Return the FLOPs of one block of one stream with a full window.

    All denoising steps and the context pass count. The prompt is encoded once per stream and does not count.
    """
    net, causal = recipe.student, recipe.causal
    k = causal.frames_per_block
    past = causal.window - k + causal.sink if causal.window else recipe.video.latent_frames - k
    passes = len(recipe.diffusion.denoising_timesteps) + causal.context_pass
    return passes * forward(net, k, tokens_per_frame(recipe, net), k * (past + k), text=False)


def denoising_passes(recipe: Recipe, blocks: int) -> float:
    """Return the expected denoising passes of a self-rollout of so many blocks, whose exit steps are uniform."""
    return sum((recipe.diffusion.steps_of(block) + 1) / 2 for block in range(blocks))


def context_passes(recipe: Recipe) -> float:
    """Return the FLOPs of the context passes of one self-rollout: of all blocks except the last."""
    net, causal, frames = recipe.student, recipe.causal, recipe.video.latent_frames
    if not causal.context_pass:
        return 0.0
    *written, ((end, _), _) = attention.block_causal(frames, causal)
    return forward(net, end, tokens_per_frame(recipe, net), attention_pairs(written), text=False)


def recomputed(net: TransformerConfig, one_pass: float, frames: int, tokens: int, pairs: int) -> float:
    """Return the FLOPs of ``one_pass`` (of :func:`forward`) that ``net.remat`` repeats in the backward pass.

    ``"attention"`` keeps the results of attention, so everything else is repeated; ``"full"`` and ``"offload"`` repeat
    the whole pass.
    """
    attention_work = float(net.num_layers * 4 * pairs * tokens**2 * net.dim)
    return {
        "none": 0.0,
        "dots": 0.0,
        "attention": one_pass - attention_work,
        "full": one_pass,
        "offload": one_pass,
    }[str(net.remat)]


def training_step(recipe: Recipe, stage: str) -> StepFlops:
    """Return the FLOPs of one step of ``teacher``, ``init`` or ``distill`` over its whole batch.

    A DMD step: every fake-score update generates a clip and trains on it. The exit step is uniform, so a block of Q
    steps has (Q + 1) / 2 denoising passes; first blocks may have other Q. All blocks but the last have a context pass.
    The student's update generates another clip, differentiates one step of it, and runs the teacher twice (with and
    without the prompt) and the fake score once.
    """
    frames = recipe.video.latent_frames
    teacher, student = recipe.teacher, recipe.student
    n_teacher, n_student = tokens_per_frame(recipe, teacher), tokens_per_frame(recipe, student)
    full = forward(teacher, frames, n_teacher, frames**2)
    causal_pairs = attention_pairs(attention.block_causal(frames, recipe.causal))
    causal = forward(student, frames, n_student, causal_pairs)

    def trained(one: float, net: TransformerConfig, pairs: int) -> StepFlops:
        return StepFlops(3 * one, recomputed(net, one, frames, tokens_per_frame(recipe, net), pairs))

    if stage == "teacher":
        parts = [(recipe.train_teacher.batch_size, trained(full, teacher, frames**2))]
    elif stage == "init":
        parts = [(recipe.train_init.batch_size, trained(causal, student, causal_pairs))]
    else:
        config, batch = recipe.train_distill, recipe.train_distill.batch_size
        one_pass = forward(student, frames, n_student, causal_pairs, text=False)
        if config.rollout == "self":
            blocks = len(recipe.causal.block_sizes(frames))
            clip = one_pass * denoising_passes(recipe, blocks) / blocks + context_passes(recipe)
        else:
            clip = causal
        fake_score = recipe.fake_score
        fake = forward(fake_score, frames, tokens_per_frame(recipe, fake_score), frames**2)
        critic = trained(fake, fake_score, frames**2)
        # The exit step is always rematerialised, and its layers a second time if the network's ``remat`` does so.
        again = recomputed(student, one_pass, frames, n_student, causal_pairs)
        again += one_pass if config.rollout == "self" else 0.0
        back = 2 * one_pass
        if config.rollout == "self" and config.gradient == "replay":
            # The rollout, then a forward and a backward pass over the clean copies and the noisy frames.
            clean = recipe.causal.context_pass
            plan = attention.teacher_forcing(frames, recipe.causal) if clean else None
            pairs = attention_pairs(plan) if plan else causal_pairs
            replay = forward(student, 2 * frames if clean else frames, n_student, pairs)
            back = 3 * replay
            again = recomputed(student, replay, 2 * frames if clean else frames, n_student, pairs)
        # Both experts of a teacher of two run on the whole batch (models.experts).
        scored = (4 if recipe.experts.boundary else 2) * full
        generator = StepFlops(clip + back + scored + fake, again)
        parts = [
            (batch * config.critic_steps, StepFlops(clip + critic.model, critic.recomputed)),
            (batch, generator),
        ]
    return StepFlops(sum(b * p.model for b, p in parts), sum(b * p.recomputed for b, p in parts))


def count_traced(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the FLOPs of the matmuls and convolutions of ``function(*arguments)``.

    Arguments may be ``jax.ShapeDtypeStruct``. A loop counts once for each iteration. A conditional counts as its most
    expensive branch.

    Raises:
        NotImplementedError: a loop of unknown length.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: Any) -> float:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracting)
        return 2.0 * equation.outvars[0].aval.size * summed
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * equation.outvars[0].aval.size * math.prod(kernel) / features
    inner = [_count(jaxpr) for value in params.values() for jaxpr in _jaxprs(value)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "while" and any(inner):
        raise NotImplementedError("a loop of unknown length has no number of operations")
    return sum(inner)


def _jaxprs(value: Any) -> Iterator[Any]:
    """Yield the jaxprs in a parameter of an equation."""
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield value.jaxpr
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _jaxprs(part)
