"""Training images from remote shards: an order, no numbers."""
