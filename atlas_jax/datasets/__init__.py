"""Published data sets turned into the project's files."""
