"""Which tensors share memory, and what a write to one of them does to the others."""
