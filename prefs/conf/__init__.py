"""The configs, as a package so that Hydra finds them in a checkout and in a wheel alike."""
