"""The registry: who may do what, what exists, and how clients speak to it."""
