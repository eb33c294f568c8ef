"""Text becomes token ids, the same ones each time."""
