"""The command: the one place that knows both halves."""
