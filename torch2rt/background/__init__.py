"""Work that another process does while this one goes on."""
