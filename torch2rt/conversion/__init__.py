"""One conversion from its arguments to the module: whole, or as engines and torch calls."""
