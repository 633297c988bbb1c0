"""Sweeps side by side: cells read back from run folders, their tables, figures, cautions, and a page of it all."""
