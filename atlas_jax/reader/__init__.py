"""The reader: T5 and Fusion-in-Decoder (arXiv 1910.10683, 2007.01282)."""
