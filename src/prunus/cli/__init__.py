"""The command prunus."""
