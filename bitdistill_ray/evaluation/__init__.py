"""What a student is worth: perplexity, KL and agreement with its teacher, accuracy on tasks, each with an interval."""
