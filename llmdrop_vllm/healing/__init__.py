"""What remains of a dropped model takes over the work of what is gone: same tensors, same shapes, better answers."""
