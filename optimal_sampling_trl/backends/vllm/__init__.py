"""The backend `vllm`: teacher and student as two submodules of one vLLM model."""

GPU_MEMORY_UTILIZATION = 0.5
"""vLLM's share of a device's memory, where the user gives none."""
