"""Callbacks for the trainers of other packages, a file for each. `import fused_ema` imports none of them."""
