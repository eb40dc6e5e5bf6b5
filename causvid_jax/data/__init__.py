"""Data: moving digits, own videos, datasets that networks make, and the input pipeline."""
