"""Adaptive temporal feature resolutions for video networks."""
