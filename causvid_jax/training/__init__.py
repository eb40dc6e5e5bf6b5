"""State, jitted steps, the loop, checkpoints, metrics and progress."""
