"""Penstock's own layers in front of vLLM's HTTP application: plain ASGI, one concern each.

No layer buffers a response or hides a disconnect: what vLLM streams leaves at once, and a client that goes
away still cancels its generation.
"""
