"""Tokens go through the layers, one layer in memory at a time, and importance comes out."""
