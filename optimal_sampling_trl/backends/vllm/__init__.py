"""The backend `vllm`: teacher and student as two submodules of one vLLM model."""
