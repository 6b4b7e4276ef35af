"""Patterns of attention: an autoencoder of maps, and groups of what it makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

CODE, HIDDEN, STEPS = 8, 64, 400


@dataclass(frozen=True, eq=False)
class Patterns:
    """codes ``[maps, 8]``, the pattern of each map, the mean map of each pattern, and the variance that codes tell."""

    codes: Tensor
    which: Tensor
    maps: Tensor
    explained: float


def learned(maps: Tensor, held: Tensor, count: int) -> Patterns:
    """Train the autoencoder on maps ``[many, P, P]``; what it makes of others ``[maps, P, P]``, in ``count`` groups."""
    from ...study.progress import bar

    mean, spread = maps.mean(0), maps.std()
    sizes = (maps[0].numel(), HIDDEN, CODE, HIDDEN, maps[0].numel())
    with torch.random.fork_rng(devices=[]), bar(STEPS, "patterns") as tell, torch.enable_grad():
        torch.manual_seed(0)
        first, code, back, last = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        encoder, decoder = nn.Sequential(first, nn.ReLU(), code), nn.Sequential(back, nn.ReLU(), last)
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 2e-3)
        for _ in range(STEPS):
            x = ((maps[torch.randint(len(maps), (64,))] - mean) / spread).flatten(1)
            loss = (decoder(encoder(x)) - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tell("patterns", 1)
    with torch.no_grad():
        x = ((held - mean) / spread).flatten(1)
        codes = encoder(x)
        left = (decoder(codes) - x).square().sum() / x.square().sum()
        which = clusters(codes, count)
    pictures = torch.stack([held[which == i].mean(0) for i in range(int(which.max()) + 1)])
    return Patterns(codes, which, pictures, 1 - float(left))


def clusters(codes: Tensor, count: int) -> Tensor:
    """k-means of codes ``[n, width]`` from centres far apart; the group of each, empty ones left out."""
    centres = codes[:1]
    for _ in range(count - 1):
        centres = torch.cat([centres, codes[torch.cdist(codes, centres).amin(1).argmax()][None]])
    for _ in range(20):
        which = torch.cdist(codes, centres).argmin(1)
        centres = torch.stack([codes[which == i].mean(0) for i in which.unique()])
    return torch.cdist(codes, centres).argmin(1).unique(return_inverse=True)[1]
