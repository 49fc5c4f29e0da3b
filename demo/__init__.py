"""`make demo`: semantic search, then translation, with torch's attention and with attnfast's."""
