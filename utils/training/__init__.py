"""The loop over epochs, the hot path of a step, resuming, and what happens to steps that are not finite."""
