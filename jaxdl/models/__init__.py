"""Model families, one file each, read from top to bottom: blocks, model, variants, published weights."""
