"""The page of rollouts: the data that it reads, and its HTML, CSS and JavaScript, each in a file of its own."""
