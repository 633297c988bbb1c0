"""The config of `python -m prefs.score`: apart from the others, where ``probe`` is a group."""
