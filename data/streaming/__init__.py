"""Images from remote shards, which can only be read in order."""
