"""The published recipe's training step beside ours: same weights, rows, noise and timesteps, in one run."""
