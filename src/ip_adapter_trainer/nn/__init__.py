"""Building blocks that know neither a family nor a variant."""
