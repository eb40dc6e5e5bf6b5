"""Parameter trees on disk."""
