"""The retriever: a BERT dual encoder (Contriever, arXiv 2112.09118)."""
