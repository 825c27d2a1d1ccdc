"""The paper's claims at nano scale: rows, their runs, a table and a figure."""
