"""For trainers of other packages, a file for each. Nothing here is imported by `import fused_ema`."""
