"""What stands in a TRL trainer where it has its `VLLMGeneration`."""
