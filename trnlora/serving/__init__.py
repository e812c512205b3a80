"""vLLM: its arguments, adapters, engine, server and client."""
