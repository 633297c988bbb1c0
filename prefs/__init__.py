"""prefs: stable, honest measurement of what language models say they like."""
