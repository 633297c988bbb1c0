"""What a job or a comparison found, and one renderer a medium."""
