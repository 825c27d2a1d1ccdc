"""What every part shares: axis names, partitioning, layers, text files, gin launcher."""
