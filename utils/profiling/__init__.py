"""Speed and memory of a training step and of a run."""
