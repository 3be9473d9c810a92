"""Adaptive temporal feature resolutions for video networks."""

import warnings

# fvcore and pytorchvideo call torch.jit.script when they are imported; that is not ours to mend.
warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=FutureWarning)
