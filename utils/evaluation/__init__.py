"""Exact evaluation, per-image predictions, per-class figures, statistics and label sets."""
