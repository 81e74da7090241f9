"""Incremental parsers of what models write: reasoning and tool calls. Pure; the same for any chunking of the text."""
