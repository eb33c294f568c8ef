"""The smaller checkpoint is planned, checked and written whole."""
