"""Finding what to drop and writing the smaller checkpoint."""
