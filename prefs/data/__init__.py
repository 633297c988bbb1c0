"""Tasks, templates and the hub they may come from."""
