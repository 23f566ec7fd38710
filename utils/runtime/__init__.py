"""What the program runs on: processes, device, precision, memory, compilation, seeds, files, signals."""
