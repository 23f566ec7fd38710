"""The data set, the sampler, the DataLoader and its workers, and the way to the device."""
