"""Quantisation: what a graph's values range over, and the quantised calls that are made of it."""
