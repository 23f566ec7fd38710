"""Optimizer, learning-rate schedule, averaged weights and freezing."""
