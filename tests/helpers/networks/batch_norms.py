"""Batch norms that are not the identity, as those of an untrained network are."""

from __future__ import annotations

from torch import nn


def spread(network: nn.Module) -> nn.Module:
    """Give every batch norm statistics and weights of its own, so that a mix-up or a leak changes the logits; in evaluation mode."""
    for module in network.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()
