"""Train the stages of a recipe: state, jitted steps, runs, checkpoints, metrics and progress."""
