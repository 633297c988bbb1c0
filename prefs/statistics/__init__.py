"""The statistics of the project: pure functions of arrays, each with its interval by resampling tasks."""
