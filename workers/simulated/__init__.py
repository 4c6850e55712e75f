"""The simulated engine: real scheduling and KV accounting, calibrated step times, no model.

Load, chaos and scale tests run on it: thousands of streams on two cores. Take no figure about vLLM from it.
"""
