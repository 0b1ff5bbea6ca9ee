"""Serving in parts: prefill and decode in two pools, attention and feed-forward on different GPUs."""
