"""How each architecture names the sublayers of its decoder layer; a new one is a row in `families.py`."""
