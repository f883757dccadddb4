"""One command a file: its name is the file's, its help the first line, and `run(words)` does it."""
