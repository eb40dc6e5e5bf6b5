"""Causal, few-step video diffusion in JAX: a reimplementation of CausVid (arXiv 2412.07772)."""

__version__ = "0.1.0"
