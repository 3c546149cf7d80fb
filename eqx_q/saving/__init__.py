"""Trees on disk: atomic file writes, checkpoints, exported agents."""
