"""A file a command: train, evaluate, compare, predict, export, plan, throughput, report, doctor and the show commands."""
