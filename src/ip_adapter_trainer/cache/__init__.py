"""Prepared sets: tables of what the frozen encoders made, found by hash."""
