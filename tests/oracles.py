"""Layers as plain loops over lists of numbers: what the blocks are compared with."""

import math


def linear(layer, x):
    """W x + b of one vector."""
    return [
        sum(w * v for w, v in zip(row, x)) + b
        for row, b in zip(layer.weight.tolist(), layer.bias.tolist())
    ]


def norm(layer, x):
    """The layer norm of one vector."""
    mean = sum(x) / len(x)
    spread = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + layer.eps)
    return [
        (v - mean) / spread * w + b
        for v, w, b in zip(x, layer.weight.tolist(), layer.bias.tolist())
    ]
