"""From files on a disk or an object store to batches of packed sequences, each in its place in one global order.

sources ► units ► readers ► documents ► runs ► packing ► blocks      pure, one unit after the other
dataset (Ray Data, many units at once) ► stream (passes, shuffle) ► mixture (weights) ► feeder (steps, ranks, ledger)
"""
