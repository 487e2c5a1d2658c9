"""The only place that imports other frameworks."""
