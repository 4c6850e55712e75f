"""What clients and operators talk to: the OpenAI-compatible ingress, API keys and the command line."""
