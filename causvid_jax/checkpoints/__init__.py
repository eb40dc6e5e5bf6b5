"""Checkpoints: recognise, load, convert and save weights of every known format."""

from causvid_jax.checkpoints.checkpoint import Checkpoint, describe, load, open_checkpoint, state_dict
from causvid_jax.checkpoints.lora import open_lora
from causvid_jax.checkpoints.save import save
