"""The stages of a job, each reading its inputs from the store."""
