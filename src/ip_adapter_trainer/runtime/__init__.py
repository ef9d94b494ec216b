"""The processes of a command: launch, signals, stopping together, precision, progress."""
