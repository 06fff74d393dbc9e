"""The runner: images from any registry, as isolated processes on this host."""
