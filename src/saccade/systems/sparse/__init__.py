"""Sparse attention: which keys a query visits, by a pattern or by content."""
