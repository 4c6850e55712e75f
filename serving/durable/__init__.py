"""Answers that outlive their connection.

An HTTP answer is a function of the stored request and the token log, so any ingress can render it again: vLLM's own
handler runs on the stored body and is fed the frames of the log. Nothing rendered is ever stored.
"""
