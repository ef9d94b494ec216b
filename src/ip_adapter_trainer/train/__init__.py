"""The training loop and what surrounds it: launch, optimizer, checkpoints, guard, tracking."""
