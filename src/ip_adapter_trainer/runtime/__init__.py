"""Where a command runs and with whom: launch, signals, stopping together, precision, progress."""
