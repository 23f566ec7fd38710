"""Boxes, masks and maps of classes: where they come from, how they change with their image, and batches of them."""
