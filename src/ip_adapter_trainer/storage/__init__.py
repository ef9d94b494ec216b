"""Files that must survive, or that others wrote: atomic folders, checkpoints, documents."""
