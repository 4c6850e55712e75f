"""OpenAI's Files API: objects in a folder or a bucket, their descriptions in Redis."""
