"""Detects how the data under a path is laid out, and lists its labelled images."""
