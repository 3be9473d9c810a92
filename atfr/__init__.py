"""Adaptive temporal feature resolutions for video networks."""

import warnings

__version__ = "0.1.0"

# fvcore and pytorchvideo call torch.jit.script when they are imported; that is not ours to mend.
warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=FutureWarning)
