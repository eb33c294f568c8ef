"""What dropping costs: quality and speed of a model under a mask, curves over many masks, and the choice among them."""
