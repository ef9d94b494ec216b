"""Images: bytes to RGB or a typed fault, crops, buckets. Nothing of rows or training."""
