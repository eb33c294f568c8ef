"""What runs inside vLLM: it imports the engine, and nothing outside this room does so to serve."""
