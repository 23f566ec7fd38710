"""Checkpoints: the training state, the file format, the folder of a run and the background saver."""
