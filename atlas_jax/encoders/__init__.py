"""Text encoders, tokens to states, for the retriever, the reader and heads alike."""
