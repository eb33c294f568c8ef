"""Model directories: what is in their files, whether it is whole, and what it weighs."""
