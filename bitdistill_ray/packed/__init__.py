"""The packed student: its bytes, its folder, and the layer that computes with them.

    bits.py     codes to bytes and back
    weight.py   one quantised matrix to a PackedWeight and back
    linear.py   a linear layer that runs on a PackedWeight

`docs/FORMAT.md` fixes the bytes.
"""
