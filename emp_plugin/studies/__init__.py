"""Runs side by side: the same data, backbone, seeds and probes for every method; a table, a plot, and the paper's figures beside them."""
