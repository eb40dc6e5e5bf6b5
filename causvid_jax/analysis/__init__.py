"""Will it fit, how fast is it: memory, FLOPs, compiled programs, benchmarks."""
