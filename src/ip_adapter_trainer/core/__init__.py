"""The base of every part: errors, settings, registries, random streams, log."""
