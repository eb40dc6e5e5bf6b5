"""Predict and measure memory and speed: estimates, FLOPs, compiled programs, benchmarks."""
