"""Finds unreadable, duplicate, ignored and mislabelled images before a run."""
