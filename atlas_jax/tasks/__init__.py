"""Tasks: records from files to (query, target) examples, and their metrics."""
