"""The two models of an Atlas, by the names that configs, files and metrics use."""

PARTS = ("reader", "retriever")
