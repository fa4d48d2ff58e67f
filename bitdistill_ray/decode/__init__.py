"""Decoding: the `Decoder` that serving, generation, evaluation and benchmarks drive, and the way from logits to text."""
