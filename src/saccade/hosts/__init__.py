"""Hosts: the only code that knows other people's model libraries. Each is imported when a model of it comes."""
