"""Code that all packages share: axis names, partitioning, layers, text files, gin launcher."""
