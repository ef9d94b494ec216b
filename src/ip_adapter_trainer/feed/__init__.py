"""From rows to batches: sampler, dataset, loader, workers."""
