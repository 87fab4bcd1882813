"""Which calls of a graph are engines', and a graph for each segment."""
