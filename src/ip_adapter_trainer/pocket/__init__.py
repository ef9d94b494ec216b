"""The embedded base model: its small world of pictures, the oracle that reads them, its networks and weights."""
