"""Console, progress line, metrics files, run log, TensorBoard and experiment trackers."""
