"""Frozen models from folders, files and the hub: whole, or refused."""
