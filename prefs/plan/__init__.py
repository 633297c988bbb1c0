"""What a run will cost: its stages, run with engines that count in place of computing. See `prefs.plan.costs`."""
