"""The index: passage store, embeddings and nearest-neighbour search."""
