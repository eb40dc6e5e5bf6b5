"""Read and write the weights of every network."""
