"""OpenAI's files and batches: requests in a file, answered when there is time, resumed after a restart."""
