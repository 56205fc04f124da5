"""One run: its folder, checkpoints, progress and pictures."""
