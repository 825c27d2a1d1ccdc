"""Training the retriever from the reader: ADist, EMDR2, PDist, LOOP (arXiv 2208.03299)."""
