"""Sizes in traces: those to trace with, what is claimed of them, and which traces cover a range."""
