"""Concept vectors: differences of means between conditions, what they separate, and files of them."""
