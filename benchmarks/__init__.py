"""Speed of the project against plain PyTorch/transformers and faiss, in one run."""
