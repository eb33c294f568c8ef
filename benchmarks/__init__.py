"""Scripts that measure, each with its results beside it."""
