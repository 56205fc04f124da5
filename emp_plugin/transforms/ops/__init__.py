"""Batched operations on float patches (k, 3, h, w) in [0, 1], each patch with its own parameters.

`crop` cuts and resizes them, `colour` and `blur` change them.
"""
