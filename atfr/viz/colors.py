"""The colours of all pictures."""

COLORS = ("#4c78c8", "#e8853d", "#4ca66b", "#c9504f", "#8d6cc2", "#8a6553", "#d474b0", "#b0a72c", "#35a5b5")
GREY, DARK = "#d0d4d9", "#24292f"
