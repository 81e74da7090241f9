"""`/v1/responses`: OpenAI's newer shape of a chat, on the same path as chat completions. Nothing is stored."""
