"""What remains is quantized by llm-compressor, in an environment of its own."""
