"""Callbacks for the trainers of other packages, one file for each. `import fused_ema` does not import them."""
