"""A mask is said and checked: which sublayers are gone, and the forms in which configs say so."""
