"""VBench (arXiv 2311.17982): sample its prompts, run its models, compute its totals; drift curves without models."""
