"""Prepared sets: tables of what the frozen encoders made, found by digests of all that decides it."""
