"""Checkpoints, vocabularies, corpora and indices of other projects: names, arrays, settings."""
