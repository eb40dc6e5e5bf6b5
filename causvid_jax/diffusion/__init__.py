"""Flow matching: noise schedules, conversions between x0, velocity and noise, guidance and ODE solvers."""
