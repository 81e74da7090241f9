"""The engine's network faces: OpenAI HTTP, Open Inference Protocol v2, metrics and health."""
