"""A mask is chosen by scores."""
