"""One pruning step, and its two larger forms: block by block, and with permuted channels."""
