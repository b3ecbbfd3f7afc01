"""Many architectures, each through every kind of pruning."""
