"""The fused engine behind vLLM's HTTP server, and the client that a trainer talks to it with."""
