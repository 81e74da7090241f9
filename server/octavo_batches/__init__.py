"""OpenAI's files and batches without a network face: what engine and gateway share. Imports nothing else of ours."""
