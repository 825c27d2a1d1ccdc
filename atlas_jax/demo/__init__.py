"""The demonstration on the CIA World Factbook."""
