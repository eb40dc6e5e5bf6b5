"""Configuration of causal attention and of the KV cache."""

import dataclasses
from typing import ClassVar, Literal

from causvid_jax.config.errors import ConfigError, require
from causvid_jax.config.fields import Config, Count, CountOrZero
from causvid_jax.config.model import Timestep


@dataclasses.dataclass(frozen=True)
class CausalConfig(Config):
    """Causal attention and KV cache of the student, in units of latent frames.

    The blocks have ``frames_per_block`` frames. A token attends to its own block and every earlier one (CausVid, eq.
    5). With ``window > 0`` it attends to the last ``window`` frames up to the end of its own block and to the first
    ``sink`` frames of the video; the published ``local_attn_size`` counts both, so ``window = local_attn_size - sink``.
    ``independent_first_frame`` makes the blocks 1, K, K, ... instead of K, K, ..., as in the ``i2v`` branch of CausVid.

    ``positions`` chooses the rotary time positions of the frames in the cache: ``"absolute"`` (as published: the
    distance to a sink grows) or ``"relative"`` (the sink directly precedes the window, so that a stream of any length
    stays in the trained range). Without a sink both are equal: rotary attention depends on differences alone.

    ``context_pass`` runs one extra pass at the timestep ``context_noise`` (0 to 1000), which writes the finished block
    to the cache. Without it the keys and values of the last denoising step stay. ``add_context_noise`` chooses when
    that pass reads the block with noise at the level of ``context_noise`` instead of the block itself: ``"never"``, in
    ``"training"`` (as the published Self-Forcing trainer does) or ``"always"``, in streams too.

    ``on_prompt_switch`` chooses how the cache of a stream changes with its prompt: ``"keep"`` does not change it (as
    published), ``"recompute"`` computes it anew from the last blocks and the new prompt, ``"reset"`` empties it and the
    decoder's cache. After a reset the next block starts like a clip, and the video shows a cut.
    """

    label: ClassVar[str] = "causal"

    frames_per_block: Count = 3
    independent_first_frame: bool = False
    window: CountOrZero = 0
    sink: CountOrZero = 0
    positions: Literal["absolute", "relative"] = "absolute"
    context_pass: bool = True
    context_noise: Timestep = 0.0
    add_context_noise: Literal["never", "training", "always"] = "never"
    on_prompt_switch: Literal["keep", "recompute", "reset"] = "recompute"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.independent_first_frame and self.on_prompt_switch == "reset"),
            "causal.on_prompt_switch is 'reset' with causal.independent_first_frame: a clip would start with a block "
            "of one frame, but the blocks of a stream have one length; accepted: 'keep', 'recompute'",
        )
        require(
            self.add_context_noise == "never" or (self.context_pass and self.context_noise > 0),
            f"causal.add_context_noise is {self.add_context_noise!r}; it needs causal.context_pass and a "
            f"causal.context_noise above 0, which is {self.context_noise:g}",
        )
        require(
            self.window == 0 or self.window >= self.frames_per_block,
            f"causal.window is {self.window} frames; it must be 0 (no window) or at least one block "
            f"({self.frames_per_block})",
        )
        require(not self.sink or self.window > 0, f"causal.sink is {self.sink}, which needs causal.window; use sink 0")

    def past_frames(self) -> int:
        """Return the frames of earlier blocks in the window, which count whole: ``K floor((window - 1) / K)``, or 0."""
        return max(0, self.window - 1) // self.frames_per_block * self.frames_per_block

    def sink_frames(self) -> int:
        """Return the frames of the first blocks of a stream, which hold the sink: ``K ceil(sink / K)``."""
        return -(-self.sink // self.frames_per_block) * self.frames_per_block

    def context_frames(self) -> int:
        """Return the frames of the earlier blocks that a block of a long stream attends to, of the sink and window."""
        return self.sink_frames() + self.past_frames()

    def nearest_lengths(self, frames: int) -> tuple[int, int]:
        """Return the two numbers of latent frames of whole blocks that are nearest to ``frames``."""
        k, first = self.frames_per_block, int(self.independent_first_frame)
        below = max(frames - (frames - first) % k, first or k)
        return below, below + k

    def block_sizes(self, frames: int) -> tuple[int, ...]:
        """Return the latent frames of each block of a clip of ``frames`` latent frames.

        Raises:
            ConfigError: the clip is not a whole number of blocks. The message names the nearest lengths that are.
        """
        k, first = self.frames_per_block, int(self.independent_first_frame)
        if frames < max(first, 1) or (frames - first) % k:
            near = " and ".join(map(str, self.nearest_lengths(frames)))
            raise ConfigError(
                f"{frames} latent frames do not fit blocks of {'1 + ' * first}n*{k}; the nearest that do are {near}"
            )
        return ((1,) if first else ()) + (k,) * ((frames - first) // k)
