"""The OpenAI-compatible face, with vLLM's extra fields."""
