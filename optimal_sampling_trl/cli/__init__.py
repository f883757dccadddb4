"""The command `optimal-sampling`: TRL's flags and this package's, from a shell or a YAML file."""
