"""Layers that several families use: the state-space model, convolutions of tokens, stems."""
