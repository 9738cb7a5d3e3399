"""Exact log-probabilities of continuations, and the tokens they are taken over."""
