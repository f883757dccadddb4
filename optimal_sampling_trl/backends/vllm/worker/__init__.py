"""Runs inside vLLM's worker: imports vLLM at the top, and must not wait for the host within a step."""
