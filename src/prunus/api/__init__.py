"""What users call: attach, prune, sweep, save, load, accelerate."""
