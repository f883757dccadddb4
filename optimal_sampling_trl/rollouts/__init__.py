"""One completion from request to dataset: what is asked, what comes back with its records, and how it is kept."""
