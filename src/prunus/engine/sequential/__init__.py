"""Pruning block by block, each on the outputs of the pruned ones before it."""
