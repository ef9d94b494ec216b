"""Pictures: bytes to RGB or a typed fault, crops, buckets. Knows nothing of rows or training."""
