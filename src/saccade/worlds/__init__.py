"""Worlds: small seeded data with a known answer, so that "did it look at the answer" is measurable."""
