"""Is it learning, and what does it draw: validation losses, samples, grids, generation and scores."""
