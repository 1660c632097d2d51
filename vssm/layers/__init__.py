"""Layers that several families use: state-space models, the 2D scan, convolutions of tokens, stems, blocks."""
