"""Model back-ends: one file an engine, behind the small protocol in `prefs.models.types`."""
