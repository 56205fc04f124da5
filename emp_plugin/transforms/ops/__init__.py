"""Operations on float patches (k, 3, h, w) in [0, 1], batched, each patch with its own parameters."""
