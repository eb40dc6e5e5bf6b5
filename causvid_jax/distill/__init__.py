"""The paper's method, as losses and rollouts over functions that are handed in."""
