"""Content-keyed records, and what of them is missing."""
