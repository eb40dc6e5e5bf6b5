"""Frozen, validated configuration. ``ml_collections`` stops in this package.

A recipe file under ``configs/`` returns an ``ml_collections.ConfigDict``; :func:`from_config_dict` turns it into a
:class:`Recipe` of frozen, hashable dataclasses, which is what every other module sees and what ``jax.jit`` can take as
a static argument. A field that does not exist, a value of the wrong type and a combination that cannot work are
refused here, in one sentence, before any compute is spent.
"""

from causvid_jax.config.errors import ConfigError, RunError, require
from causvid_jax.config.model import (
    MESH_AXES,
    CausalConfig,
    CLIPConfig,
    ShardingRules,
    TAEHVConfig,
    TextConfig,
    TransformerConfig,
    UMT5Config,
    VAEConfig,
    VideoConfig,
)
from causvid_jax.config.recipe import (
    ParallelConfig,
    Recipe,
    check_renamed,
    from_config_dict,
    from_json,
    nearest_divisors,
    to_json,
)
from causvid_jax.config.train import (
    CausalStageConfig,
    DataConfig,
    DiffusionConfig,
    DistillStageConfig,
    InitStageConfig,
    OptimizerConfig,
    StageConfig,
    TAEHVStageConfig,
    TeacherStageConfig,
    VAEStageConfig,
)

__all__ = [
    "ConfigError",
    "RunError",
    "require",
    "MESH_AXES",
    "VideoConfig",
    "TextConfig",
    "UMT5Config",
    "CLIPConfig",
    "VAEConfig",
    "ShardingRules",
    "TAEHVConfig",
    "TransformerConfig",
    "CausalConfig",
    "CausalStageConfig",
    "DataConfig",
    "DiffusionConfig",
    "DistillStageConfig",
    "InitStageConfig",
    "OptimizerConfig",
    "StageConfig",
    "TeacherStageConfig",
    "TAEHVStageConfig",
    "VAEStageConfig",
    "ParallelConfig",
    "Recipe",
    "check_renamed",
    "from_config_dict",
    "from_json",
    "nearest_divisors",
    "to_json",
]
