"""Small models and made-up inputs that the tests of the baselines share."""

import torch
from torch import nn


def awake(model: nn.Module, dtype=torch.float32) -> nn.Module:
    """The model with every parameter taking part, norms and biases too."""
    torch.manual_seed(0)
    model = model.to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def clips(b=3, t=5, dtype=torch.float32, seed=0):
    """Features of videos, 6 and 3 wide."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, t, dim, generator=generator, dtype=dtype) for dim in (6, 3)]


def ask(b=3, k=2, longest=6, seed=0):
    """Questions of different lengths, padded at the end."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 20, (b, k, longest), generator=generator)
    lengths = torch.randint(1, longest + 1, (b, k, 1), generator=generator)
    return tokens.masked_fill(torch.arange(longest) >= lengths, 0)
