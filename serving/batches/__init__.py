"""OpenAI's Batch API: files of requests, run through vLLM's own handlers in the queue's batch class."""
