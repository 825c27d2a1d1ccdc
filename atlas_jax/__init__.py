"""Atlas in JAX: retrieval-augmented few-shot learning, retrieval in the training loop."""

__version__ = "0.1.0"
