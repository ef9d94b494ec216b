"""What every part shares: errors, settings, registries, random streams, log."""
