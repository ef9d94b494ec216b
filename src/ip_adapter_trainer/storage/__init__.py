"""Files that others wrote or that must survive: atomic folders, checkpoints, append-only lines, documents, limits."""
