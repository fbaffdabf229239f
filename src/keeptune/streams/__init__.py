"""Ready-made streams: each file is one, and its `stream(seed=...)` makes it."""
