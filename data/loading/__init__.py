"""Dataset, sampler, DataLoader and its workers, and the transfer of batches to the device."""
