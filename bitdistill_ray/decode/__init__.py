"""Decoding: the `Decoder` that serving, generation, evaluation and benchmarks drive, and what turns logits into text."""
