"""What flow matching means: sigma grids, x0, velocity and noise, guidance, solvers."""
