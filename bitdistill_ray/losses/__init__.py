"""Distillation losses: pure functions over tensors, in log space, with exact means over valid tokens.

    objective.py     what is minimised: terms, weights, options (plain data, costs no torch)
    divergence.py    cross entropy, forward / reverse KL, generalised JSD; one value per token
    cakld.py         BitDistiller's confidence-aware KL;   gamma.py measures its gamma
    relation.py      BitNet Distillation's attention relations
    reduction.py     sums, means and what divides them across micro-batches and ranks
    teacher_view.py  TeacherSignals (hidden states, logits, top-k) as log-probabilities
    terms.py         the registry of token losses and what they share within a chunk
    chunked.py       the whole objective, chunk by chunk: `chunked_loss`

Nothing here knows of models, Ray or DeepSpeed.  An LM head is any callable from hidden [n, D] to logits [n, V].
"""
