"""Frozen, validated configuration. Only this package knows ``ml_collections``.

A recipe file under ``configs/`` returns an ``ml_collections.ConfigDict``. :func:`from_config_dict` turns it into a
:class:`Recipe` of frozen, hashable dataclasses, which every other module uses and which ``jax.jit`` takes as a static
argument. An unknown field, a value of the wrong type or out of bounds, and a combination that cannot work raise a
:class:`ConfigError` of one sentence before any compute. This room imports no JAX.
"""

from causvid_jax.config.causal import CausalConfig
from causvid_jax.config.distill import ConsistencyStageConfig, DistillStageConfig
from causvid_jax.config.errors import ConfigError, RunError, require
from causvid_jax.config.fields import changed_fields, flat_fields, suggest
from causvid_jax.config.model import (
    MESH_AXES,
    WAN22_LATENT_MEAN,
    WAN22_LATENT_STD,
    WAN22_VAE,
    WAN_LATENT_MEAN,
    WAN_LATENT_STD,
    CLIPConfig,
    ExpertsConfig,
    LoraConfig,
    ShardingRules,
    TAEHVConfig,
    TextConfig,
    TransformerConfig,
    UMT5Config,
    VAEConfig,
    VideoConfig,
)
from causvid_jax.config.recipe import (
    STAGES,
    ParallelConfig,
    Recipe,
    check_field,
    from_config_dict,
    from_json,
    nearest_divisors,
    to_json,
)
from causvid_jax.config.train import (
    CausalStageConfig,
    DataConfig,
    DiffusionConfig,
    InitStageConfig,
    OptimizerConfig,
    StageConfig,
    TAEHVStageConfig,
    TeacherStageConfig,
    VAEStageConfig,
)
