"""Recognises what lies under a path and makes the lists of labelled images."""
