"""The engines that stand in a trainer where TRL has its `VLLMGeneration`."""
