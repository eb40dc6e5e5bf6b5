"""The paper's method: DMD losses, rollouts of the student, ODE regression and trajectories, as pure functions."""
