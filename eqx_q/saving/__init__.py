"""Trees on disk: files that appear whole, checkpoints, exported agents."""
