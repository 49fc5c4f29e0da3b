"""Semantic search over Python's standard library, with torch's attention and with attnfast's."""
