"""Matrices in, matrices out: nothing here has heard of a module."""
