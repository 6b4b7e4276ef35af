"""Caches that hold fewer tokens: what is kept is chosen by a policy, and every byte is accounted for.

with Cache(model, H2O(recent=32), budget=512) as cache:
    model.generate(ids, past_key_values=cache)
cache.nbytes, cache.kept()
"""

from .held import Cache
from .policies import H2O, KeyNorm, Look, Policy, Recent

__all__ = ["H2O", "Cache", "KeyNorm", "Look", "Policy", "Recent"]
