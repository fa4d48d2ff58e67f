"""Decoding: the `Decoder` that serving, generation and evaluation drive, and the road from logits to text."""
