"""A run on disk: folder, checkpoint, evaluation reports, lease and storage. Nothing here trains or plays."""
