"""N:M training: dense weights that are hidden between steps."""
