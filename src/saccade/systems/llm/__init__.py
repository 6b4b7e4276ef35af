"""Systems that change what a language model says."""
