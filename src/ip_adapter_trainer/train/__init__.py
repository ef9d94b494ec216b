"""`ip-adapter train`: the loop, the optimizer, checkpoints, guards, trackers."""
