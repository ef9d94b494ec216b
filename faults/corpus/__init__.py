"""Hostile and odd files, made by rule, each with the verdict that is expected of a reader."""
