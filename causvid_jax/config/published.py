"""The published models that this library knows: files, licence and the settings that go with the weights.

There is one table, :data:`MODELS`. ``causvid models`` prints it. ``configs/published.py`` makes a recipe of every row
(``--config=published:self_forcing_dmd``). :func:`find` returns the row of a file by its name, so that a checkpoint is
sampled with its settings. The weights themselves were not available. Every fact comes from published code and
third-party loaders, which ``known_from`` names; ``not_known`` names the facts that could not be checked. Imports no
JAX.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

from causvid_jax.config.errors import ConfigError
from causvid_jax.config.fields import suggest

Settings = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class PublishedModel:
    """One published model.

    Attributes:
        name: the NAME of ``--config=published:NAME``.
        what: a short description.
        kind: a causal ``student``, or a ``teacher`` (also a base to train from).
        network: sizes: 1.3b and 14b of Wan2.1 (also of Wan2.2-A14B), 5b of Wan2.2-TI2V.
        repository: its name on Hugging Face.
        files: (file, bytes) of the transformer's weights and of further files; None for an unknown size. ``--student``
            takes the first file.
        licence: as published.
        paper: arXiv number, "" without one.
        settings: fields of the recipe by group, as the authors sample.
        known_from: sources of the names, shapes and settings.
        not_known: facts that could not be checked.
        part: the part of the checkpoint that the authors sample; "" takes the EMA if there is one.
        rolling_blocks: field of the recipe.
        readable: whether this version samples it.
    """

    name: str
    what: str
    kind: Literal["student", "teacher"]
    network: Literal["1.3b", "14b", "5b"]
    repository: str
    files: tuple[tuple[str, int | None], ...]
    licence: str
    paper: str
    settings: Settings
    known_from: str
    not_known: str = "the weights were not available: tests use tiny files of the same layout"
    part: str = ""
    rolling_blocks: int = 0
    readable: bool = True


# A clip of the training length sees all of its 21 latent frames; a longer stream keeps the last 21.
_CHUNK: Settings = {"causal": {"frames_per_block": 3, "window": 21}}
_FRAME: Settings = {"causal": {"frames_per_block": 1, "window": 21}}
_FOUR = (1000.0, 750.0, 500.0, 250.0)
_THREE = (1000.0, 757.0, 522.0)
# Rectified-flow times of rCM: sigma_max / (sigma_max + 1) with sigma_max = 1600, then 15/16, 5/6 and 5/8.
_RCM = (999.375, 937.5, 2500.0 / 3.0, 625.0)
_FIVE_SHIFT: Settings = {"diffusion": {"shift": 5.0, "denoising_timesteps": _FOUR}}


def _join(*parts: Settings) -> dict[str, dict[str, Any]]:
    """Return the settings of all ``parts``, the later ones last."""
    groups: dict[str, dict[str, Any]] = {}
    for part in parts:
        for group, fields in part.items():
            groups[group] = {**groups.get(group, {}), **fields}
    return groups


def _self_forcing(name: str, what: str, file: str) -> PublishedModel:
    return PublishedModel(
        f"self_forcing_{name}",
        f"Self-Forcing, {what}",
        "student",
        "1.3b",
        "gdhe17/Self-Forcing",
        ((f"checkpoints/self_forcing_{file}.pt", None),),
        "repository Apache-2.0; the model card says CC BY-NC-SA 4.0",
        "2506.08009",
        _join(_CHUNK, _FIVE_SHIFT),
        "published code and configs; file list from third-party loaders",
    )


def _causvid(name: str, what: str, folder: str, diffusion: dict[str, Any], causal: dict[str, Any]) -> PublishedModel:
    return PublishedModel(
        name,
        f"CausVid, {what}",
        "student",
        "1.3b",
        "tianweiy/CausVid",
        ((f"{folder}/model.pt", None),),
        "CC BY-NC-SA 4.0",
        "2412.07772",
        {"causal": causal, "diffusion": {"shift": 8.0, **diffusion}},
        "published code and configs",
    )


def _causal_forcing(
    name: str, what: str, file: str, causal: Settings, diffusion: dict[str, Any], part: str = ""
) -> PublishedModel:
    return PublishedModel(
        name,
        what,
        "student",
        "1.3b",
        "zhuhz22/Causal-Forcing",
        ((file, None),),
        "not known",
        "2605.15141" if "++" in what else "2602.02214",
        _join(causal, _FIVE_SHIFT, {"diffusion": diffusion}),
        "published README and config names; step lists from its users' copies of the configs",
        part=part,
    )


def _rcm(chunk: int, steps: int, later: tuple[float, ...], size: int | None = None) -> PublishedModel:
    first: Settings = {"diffusion": {"first_block_timesteps": (_RCM,)}} if steps < 4 else {}
    return PublishedModel(
        f"causal_rcm_c{chunk}_{steps}step",
        f"Causal-rCM, {'frame' if chunk == 1 else 'chunk'}-wise, {steps} steps",
        "student",
        "1.3b",
        "worstcoder/rcm-Wan",
        ((f"Causal_rCM_Wan2.1_T2V_1.3B_480p_TF-dCM-init_SF-DMD_c{chunk}-{chunk}_step{max(steps, 2)}.pt", size),),
        "code Apache-2.0; of the weights: not known",
        "2606.25473",
        _join(
            _FRAME if chunk == 1 else _CHUNK,
            {"diffusion": {"shift": 1.0, "warp": False, "denoising_timesteps": later}},
            first,
        ),
        "published README and sampler of NVlabs/rcm; prefix net. and the linear patch embedding from readers' loaders",
    )


def _sgf(name: str, folder: str, causal: dict[str, Any]) -> PublishedModel:
    return PublishedModel(
        f"sgf_{name}",
        f"Self Gradient Forcing, {name}-wise: unrotated keys, positions within the window",
        "student",
        "1.3b",
        "JunhaoZhuang/Self_Gradient_Forcing",
        ((f"{folder}/ar/model.pt", None),),
        "Apache-2.0",
        "2607.20368",
        _join(_FIVE_SHIFT, {"causal": {"positions": "relative", **causal}}),
        "published README (cache geometry, files) and training code",
        "the weights and the sampling configs were not available: the step list is that of Causal Forcing, its start",
    )


def _wan(
    name: str, network: Literal["1.3b", "14b", "5b"], what: str, files: Any, settings: Settings, **more: Any
) -> PublishedModel:
    """Return a teacher of the repository that ``what`` begins with."""
    repository = f"Wan-AI/{re.split('[:,]', what)[0]}"
    known_from = "published code of Wan2.1 and Wan2.2 (sizes, names, sampler)"
    return PublishedModel(
        name, what, "teacher", network, repository, files, "Apache-2.0", "2503.20314", settings, known_from, **more
    )


_A14B_FILES = (("high_noise_model", None), ("low_noise_model", None), ("Wan2.1_VAE.pth", 507_609_880))


def _a14b(shift: float, guidance_scale: float, experts: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Return the settings of a Wan2.2-A14B; a fake score of two experts is not trained, so it is the student's."""
    diffusion = {"shift": shift, "num_inference_steps": 40, "solver": "unipc", "guidance_scale": guidance_scale}
    return {"diffusion": diffusion, "experts": experts, "train_distill": {"critic_init": "student"}}


_BASE_14B: Settings = {"diffusion": {"num_inference_steps": 50, "solver": "unipc"}}


MODELS: tuple[PublishedModel, ...] = (
    _causvid(
        "causvid_autoregressive",
        "autoregressive, 3 steps",
        "autoregressive_checkpoint",
        {"warp": False, "denoising_timesteps": _THREE},
        {"frames_per_block": 3, "window": 21},
    ),
    _causvid(
        "causvid_autoregressive_4step",
        "autoregressive, 4 warped steps",
        "autoregressive_checkpoint_warp_4step_cfg2",
        {"denoising_timesteps": _FOUR},
        {"frames_per_block": 3, "window": 21},
    ),
    _causvid(
        "causvid_bidirectional",
        "bidirectional, 3 steps: the whole clip is one block",
        "bidirectional_checkpoint2",
        {"warp": False, "denoising_timesteps": _THREE},
        {"frames_per_block": 21, "window": 21, "context_pass": False},
    ),
    _self_forcing("dmd", "DMD", "dmd"),
    _self_forcing("sid", "SiD", "sid"),
    _self_forcing("sid_v2", "SiD, second version", "sid_v2"),
    _self_forcing("gan", "GAN", "gan"),
    _self_forcing("10s", "trained on 10 seconds", "10s"),
    _causal_forcing(
        "causal_forcing_chunk", "Causal Forcing, chunk-wise", "chunkwise/causal_forcing.pt", _CHUNK, {}, "generator"
    ),
    _causal_forcing("causal_forcing_frame", "Causal Forcing, frame-wise", "framewise/causal_forcing.pt", _FRAME, {}),
    _causal_forcing(
        "causal_forcing_cd_chunk",
        "Causal Forcing++, consistency distillation only, chunk-wise",
        "chunkwise/causal_cd.pt",
        _CHUNK,
        {},
        "generator",
    ),
    _causal_forcing(
        "causal_forcing_2step",
        "Causal Forcing++, frame-wise, 2 steps (4 for the first frame)",
        "causal-forcing++/framewise-2step.pt",
        _FRAME,
        {"denoising_timesteps": (1000.0, 500.0), "first_block_timesteps": (_FOUR,)},
    ),
    _causal_forcing(
        "causal_forcing_1step",
        "Causal Forcing++, frame-wise, 1 step (4 for the first frame)",
        "causal-forcing++/framewise-1step.pt",
        _FRAME,
        {"denoising_timesteps": (1000.0,), "first_block_timesteps": (_FOUR,)},
    ),
    _rcm(1, 4, _RCM, 2_838_292_823),
    _rcm(1, 2, (_RCM[0], _RCM[2])),
    _rcm(1, 1, (_RCM[0],)),
    _rcm(3, 4, _RCM),
    _rcm(3, 2, (_RCM[0], _RCM[2])),
    PublishedModel(
        "longlive",
        "LongLive: a base with its LoRA of rank 256, which is part of the model (--lora=lora.pt)",
        "student",
        "1.3b",
        "Efficient-Large-Model/LongLive-1.3B",
        (("models/longlive_base.pt", 5_676_334_208), ("models/lora.pt", 2_800_056_690)),
        "the model card says CC BY-NC-SA 4.0; the repository Apache-2.0",
        "2509.22622",
        # local_attn_size 12 counts the sink of 3; causal.window does not.
        _join(_FIVE_SHIFT, {"causal": {"frames_per_block": 3, "window": 9, "sink": 3}}),
        "published configs (local_attn_size 12, sink_size 3) and a reader's list of files, bytes and names",
        part="generator",
    ),
    _sgf("chunk", "chunkwise", {"frames_per_block": 3, "window": 9, "sink": 3}),
    _sgf("frame", "framewise", {"frames_per_block": 1, "window": 17, "sink": 4}),
    PublishedModel(
        "krea_14b",
        "Krea Realtime 14B",
        "student",
        "14b",
        "krea/krea-realtime-video",
        (("krea-realtime-video-14b.safetensors", None),),
        "not known: readers name Apache-2.0 and a research licence",
        "",
        # A cache of three frames and the block itself; the published server also recomputes it from latents.
        _join(_FIVE_SHIFT, {"causal": {"frames_per_block": 3, "window": 6}}),
        "the published server's configuration in readers' ports (kv_cache_num_frames 3, shift 5)",
        "the weights were not available; the published server recomputes its cache for every block and biases "
        "attention to past frames, which this version does not do",
    ),
    PublishedModel(
        "longlive2_5b",
        "LongLive-2.0 5B (one shot), on the latents of Wan2.2",
        "student",
        "5b",
        "Efficient-Large-Model/LongLive-2.0-5B",
        (("model_bf16.pt", 9_999_853_030),),
        "NVIDIA Open Model License",
        "2605.18739",
        {
            "causal": {"frames_per_block": 8, "window": 24, "sink": 8},
            "diffusion": {"shift": 5.0, "warp": False, "denoising_timesteps": (1000.0, 946.0, 854.0, 681.0)},
            "video": {"frames": 125},
        },
        "published configs and a reader's list of files, bytes and settings",
        "the weights were not available; sinks and rotary offsets of several shots are not implemented",
    ),
    PublishedModel(
        "rolling_forcing",
        "Rolling Forcing: a window of five blocks at five noise levels",
        "student",
        "1.3b",
        "TencentARC/RollingForcing",
        (("checkpoints/rolling_forcing_dmd.pt", None),),
        "not known",
        "2509.25161",
        {
            # 21 frames of attention: a sink of 3, and 18 that end with the 15 of the window.
            "causal": {"frames_per_block": 3, "window": 18, "sink": 3, "positions": "relative"},
            "diffusion": {"shift": 5.0, "denoising_timesteps": (1000.0, 800.0, 600.0, 400.0, 200.0)},
        },
        "published config in its users' copies; sampler and attention in readers' ports",
        "the weights were not available; after 21 latent frames the published pass that writes a finished block reads "
        "the 21 last frames, here the sink and the 18 last",
        rolling_blocks=5,
    ),
    PublishedModel(
        "anyflow_far",
        "AnyFlow-FAR 1.3B: a flow map of two timesteps with compressed context",
        "student",
        "1.3b",
        "nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers",
        (("transformer/diffusion_pytorch_model.safetensors", None),),
        "Apache-2.0",
        "2605.13724",
        {},
        "published class of diffusers",
        "the second time embedding and the patches of compressed frames are not implemented",
        readable=False,
    ),
    _wan(
        "wan_t2v_1_3b",
        "1.3b",
        "Wan2.1-T2V-1.3B",
        (("diffusion_pytorch_model.safetensors", None), ("Wan2.1_VAE.pth", 507_609_880)),
        _BASE_14B,
    ),
    _wan(
        "wan_t2v_14b",
        "14b",
        "Wan2.1-T2V-14B",
        (("diffusion_pytorch_model-00001-of-00006.safetensors", None), ("Wan2.1_VAE.pth", 507_609_880)),
        _join(_BASE_14B, {"diffusion": {"shift": 5.0, "guidance_scale": 5.0}}),
    ),
    _wan(
        "wan22_t2v_a14b",
        "14b",
        "Wan2.2-T2V-A14B: two experts; the folder is given whole by --checkpoint",
        _A14B_FILES,
        # sample_guide_scale (3.0, 4.0) is (low noise, high noise); boundary 0.875.
        _a14b(12.0, 4.0, {"boundary": 875.0, "low_noise_guidance_scale": 3.0}),
    ),
    _wan(
        "wan22_i2v_a14b",
        "14b",
        "Wan2.2-I2V-A14B: two experts that read the picture's latents, without CLIP",
        _A14B_FILES,
        _join(_a14b(5.0, 3.5, {"boundary": 900.0}), {"teacher": {"in_channels": 36}}),
    ),
    _wan(
        "wan22_ti2v_5b",
        "5b",
        "Wan2.2-TI2V-5B, with its VAE of 48 channels (16 x 16 x 4)",
        (("diffusion_pytorch_model-00001-of-00003.safetensors", None), ("Wan2.2_VAE.pth", 2_818_839_170)),
        {
            "diffusion": {"shift": 5.0, "num_inference_steps": 50, "solver": "unipc", "guidance_scale": 5.0},
            "causal": {"frames_per_block": 1},
            "video": {"frames": 121},
        },
        not_known="the weights were not available; the teacher starts from text only, not from a picture",
    ),
)

BY_NAME: Mapping[str, PublishedModel] = {model.name: model for model in MODELS}
_GENERIC = ("model", "diffusion_pytorch_model", "low_noise_model")


def get(name: str) -> PublishedModel:
    """Return the model ``name``; raise a ConfigError that suggests the nearest name if there is none."""
    if name not in BY_NAME:
        raise ConfigError(f"no published model is called {name!r}; {suggest(name, BY_NAME)}")
    return BY_NAME[name]


def find(path: str | os.PathLike) -> PublishedModel | None:
    """Return the model whose first file is called ``path``, such as ``chunkwise/causal_forcing.pt``; None if unknown.

    The last parts of both paths are compared, without suffixes. A generic name, such as ``model.pt``, needs its folder.
    """
    words = _words(path)
    matches: dict[int, list[PublishedModel]] = {}
    for model in MODELS:
        own = _words(model.files[0][0])
        same = 0
        while same < min(len(own), len(words)) and own[-1 - same] == words[-1 - same]:
            same += 1
        if same > 1 or (same == 1 and own[-1] not in _GENERIC):
            matches.setdefault(same, []).append(model)
    best = matches.get(max(matches, default=0), [])
    # Several rows may sample one file with different step lists; the first is its authors' default.
    return best[0] if best and len({model.files[0] for model in best}) == 1 else None


def recipe_of(values: Mapping[str, Any]) -> str | None:
    """Return the name of the recipe of the published file among the flags ``student`` and ``checkpoint``, if any."""
    model = find(values.get("student") or values.get("checkpoint") or "")
    return f"published:{model.name}" if model else None


def _words(path: str | os.PathLike) -> tuple[str, ...]:
    pure = pathlib.PurePath(path)
    name = pure.name
    for suffix in (".pt", ".pth", ".safetensors"):
        name = name.removesuffix(suffix)
    return (*pure.parts[:-1], name)


def differences(model: PublishedModel, recipe: Any) -> list[str]:
    """Return a text for every setting of ``model``, except those of ``video``, that differs in ``recipe``."""
    texts = []
    if model.rolling_blocks != recipe.rolling_blocks:
        texts.append(f"rolling_blocks {model.rolling_blocks} (the recipe has {recipe.rolling_blocks})")
    for group, fields in model.settings.items():
        for field, value in fields.items():
            have = getattr(getattr(recipe, group), field)
            if group != "video" and have != value:
                texts.append(f"{group}.{field} {value} (the recipe has {have})")
    return texts
