"""Caches of keys and values in pages: block tables, codecs, and the cache that models use."""
