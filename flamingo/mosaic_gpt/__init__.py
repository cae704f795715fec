"""TODO flamingo/mosaic_gpt."""
