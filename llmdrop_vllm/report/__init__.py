"""The page and the pictures of a sweep. matplotlib is imported when a report is written, not before."""
