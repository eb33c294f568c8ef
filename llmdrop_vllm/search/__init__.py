"""A mask is searched for by what it does to the model's answers."""
