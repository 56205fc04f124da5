"""A study answers a question with several trials: runs side by side, then tables and figures."""
