"""The one training loop, its recorder, contexts, sources of batches and trackers. Nothing here imports Ray."""
