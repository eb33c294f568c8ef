"""Models that can be had without a hub, and GGUF files, as ordinary checkpoints."""
