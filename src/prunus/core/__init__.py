"""What everything else stands on: layers, patterns, masks, ranks, names and files."""
