"""Measures Hythe beside its peers; `make bench`."""
