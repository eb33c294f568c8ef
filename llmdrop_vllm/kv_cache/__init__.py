"""What a layer stores for the tokens it has seen, in bytes, and how vLLM lays that out."""
