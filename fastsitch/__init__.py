"""fastsitch: model stitching as one batched computation."""
