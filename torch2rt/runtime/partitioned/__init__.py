"""Modules of engines and torch calls, and how they are kept in files."""
